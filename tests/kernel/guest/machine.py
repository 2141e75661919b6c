"""One run of the guest: QEMU, its console in a log, and a second serial port over which it asks the host to act."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tests.kernel.guest.initramfs import build_initramfs
from tests.kernel.guest.kernel import fetch_kernel
from tests.support.programs import require_program

# A run takes about a minute emulated; a hung guest must not hang the tests.
RUN_SECONDS = 600


def accelerator() -> list[str]:
    """Emulation, unless NBDZRAM_TEST_KVM=1 says that /dev/kvm is a real host's."""
    if os.environ.get("NBDZRAM_TEST_KVM") == "1":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]


def run_guest(
    directory: Path,
    *,
    port: int,
    connections: int = 1,
    actions: Mapping[str, Callable[[], object]],
    work: str = "all",
    arguments: Mapping[str, object] = MappingProxyType({}),
    memory_mib: int = 512,
) -> str:
    """Boot, let the guest work through its script, and return its console.

    port: the server's, on the host's loopback. actions: what the guest may ask for, by name; each ask is answered when
    the action has returned. work: which of the stories at the end of init.sh; in all but "all" the guest attaches by
    `nbdzram attach --persist`. arguments: what else that story reads from the kernel's command line.
    """
    told = {"port": port, "connections": connections, "work": work, **arguments}
    kernel = fetch_kernel()
    initramfs = directory / "initramfs.cpio"
    initramfs.write_bytes(build_initramfs(kernel, with_nbdzram=work != "all"))
    words = " ".join(f"nbd.{name}={value}" for name, value in told.items())
    return boot(directory, kernel.image, initramfs, words, actions, memory_mib=memory_mib)


def boot(
    directory: Path,
    kernel: Path,
    initramfs: Path,
    words: str,
    actions: Mapping[str, Callable[[], object]],
    *,
    memory_mib: int = 512,
    behind: Sequence[str] = (),
) -> str:
    """Boot a kernel with these `words` on its command line, until it powers off; its console. `actions`: as run_guest.

    behind: a command that runs the machine.
    """
    qemu = require_program("qemu-system-x86_64", package="qemu-system-x86")
    console = directory / "console.log"
    asks = directory / "asks.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(asks))
        listener.listen()
        listener.settimeout(0.1)
        command = [
            *(
                *behind,
                qemu,
                *accelerator(),
                "-smp",
                "1",  # with two, emulation now and then trips over the kernel patching its own code while it boots
                "-m",
                str(memory_mib),
                "-nodefaults",
                "-no-reboot",
                "-display",
                "none",
            ),
            *("-kernel", str(kernel), "-initrd", str(initramfs)),
            # no_timer_check: an emulator that waits for a processor shows no tick to a kernel that counts them.
            *("-append", f"console=ttyS0 quiet panic=-1 no_timer_check {words}"),
            *("-serial", f"file:{console}"),
            *("-chardev", f"socket,id=asks,path={asks}", "-serial", "chardev:asks"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
        ]
        machine = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            with _accept(listener, machine) as connection:
                connection.settimeout(RUN_SECONDS)
                _answer(connection, actions)
            machine.wait(timeout=RUN_SECONDS)
        finally:
            machine.kill()
            machine.wait()
    return console.read_text(errors="replace")


def _accept(listener: socket.socket, machine: subprocess.Popen[bytes]) -> socket.socket:
    """QEMU's end of the second serial port, or its exit code when it did not even start."""
    while True:
        try:
            return listener.accept()[0]
        except TimeoutError:
            assert machine.poll() is None, f"QEMU ended with {machine.returncode} before the guest began"


def _answer(connection: socket.socket, actions: Mapping[str, Callable[[], object]]) -> None:
    """Serve the guest's asks until it powers off, which closes the serial port."""
    with connection.makefile("rw", newline="\n") as stream:
        for line in stream:
            actions[line.strip()]()
            stream.write("done\n")
            stream.flush()
