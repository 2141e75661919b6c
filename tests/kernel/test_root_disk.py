"""A machine whose root disk is an export: Debian's initramfs boots from it as docs/howto/nbd-client.md says.

Slow lane: the initramfs is made in a bare Debian 12, by initramfs-tools and by dracut; the machine is emulated. Root.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from tests.docs.pages import ROOT
from tests.kernel.guest.initramfs import build_root
from tests.kernel.guest.kernel import Kernel, fetch_kernel
from tests.kernel.guest.machine import boot
from tests.support.machine import layer_over, require_base, run_in
from tests.support.programs import require_program, require_root, run
from tests.support.server import Nbdzram

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

PORT = 10809  # as the page's lines have it: what they start takes no other
HOST = "10.0.2.2"  # this machine, as QEMU's guests see it
MAKE_SECONDS = 1800  # dracut looks at every module, and other tests may run meanwhile
PAGE = (ROOT / "docs" / "howto" / "nbd-client.md").read_text().split("### A root disk\n")[1].split("\n## ")[0]
MAKERS = {
    "initramfs-tools": ("initramfs-tools", "nbd-client", "e2fsprogs", "udev", "zstd"),
    "dracut": ("dracut", "dracut-network", "nbd-client", "e2fsprogs", "isc-dhcp-client", "iputils-arping", "procps"),
}
"""Packages of each."""


class Alone:
    """A network of the test's own, in which nobody else has the port."""

    def __init__(self) -> None:
        require_program("ip", package="iproute2")
        script = "ip link set lo up && echo && exec cat"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"\n"
        self.enter = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]

    def close(self) -> None:
        self._holder.communicate()


class OnPort(Nbdzram):
    """A server there, that comes back with its disk."""

    def __init__(self, directory: Path, alone: Alone) -> None:
        self.alone = alone
        super().__init__(directory, {"disk": "256M"}, arguments=["--state-dir", str(directory / "state")])

    def environment(self) -> dict[str, str]:
        self.command[self.command.index("-p") + 1] = str(PORT)
        self.command[:0] = self.alone.enter
        return super().environment()


@pytest.fixture
def alone() -> Iterator[Alone]:
    require_root("makes a network, and a root directory for each initramfs")
    made = Alone()
    yield made
    made.close()


def by_initramfs_tools(root: Path, kernel: Kernel) -> str:
    """Make it with the page's own hook; the page's words for the kernel's command line."""
    (hook,) = re.findall(r"^# cat (/etc/initramfs-tools/hooks/\S+)\n(.*?)^# chmod 755 \1 && ", PAGE, re.M | re.S)
    (root / hook[0].lstrip("/")).write_text(hook[1])
    (root / hook[0].lstrip("/")).chmod(0o755)
    _do(root, "update-initramfs", "-c", "-k", kernel.version)
    (words,) = re.findall(r"`(root=/dev/nbd0 nbdroot=.*?)`", PAGE)
    return str(words)


def by_dracut(root: Path, kernel: Kernel) -> str:
    _do(root, "dracut", "--no-hostonly", "--add", "nbd", f"/boot/initrd.img-{kernel.version}", kernel.version)
    (words,) = re.findall(r"`(root=nbd:.*?)`", PAGE)
    return str(words)


def _do(root: Path, *words: str) -> None:
    done = run_in(root, ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *words], seconds=MAKE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def _initramfs(directory: Path, made_by: str, kernel: Kernel) -> tuple[Path, str]:
    """The file, and the words that it wants on the kernel's command line, with our address and export."""
    with layer_over(require_base("bookworm", *MAKERS[made_by]), directory / "layer") as root:
        modules = root / "lib" / "modules" / kernel.version
        shutil.copytree(kernel.modules.parent, modules)
        for file in kernel.image.parent.glob(f"*-{kernel.version}"):
            shutil.copy(file, root / "boot")
        _do(root, "depmod", kernel.version)
        words = (by_dracut if made_by == "dracut" else by_initramfs_tools)(root, kernel)
        made = directory / "initrd"
        shutil.copy(root / "boot" / f"initrd.img-{kernel.version}", made)
    return made, words.replace("192.0.2.10", HOST).replace(":root:", ":disk:").replace(",root,", ",disk,")


def _write_root(directory: Path, server: Nbdzram) -> None:
    root, image = directory / "root", directory / "root.img"
    root.mkdir()
    build_root(root)
    mke2fs = require_program("mke2fs", package="e2fsprogs")
    run([mke2fs, "-q", "-t", "ext4", "-b", "4096", "-d", root, image, "256M"])
    run([require_program("nbdcopy", package="libnbd-bin"), image, server.uri()])


@pytest.mark.parametrize("made_by", MAKERS)
def test_a_machine_boots_from_an_export_and_lives_through_restarts_of_its_server(
    tmp_path: Path, alone: Alone, made_by: str
) -> None:
    """With two connections and the page's request timeout, which the keeper takes over."""
    kernel = fetch_kernel()
    initramfs, words = _initramfs(tmp_path, made_by, kernel)
    servers = [OnPort(tmp_path, alone)]
    attached: list[int] = []

    def look() -> None:
        with ControlClient(servers[-1].control) as control:
            attached.append(len(control.clients()))

    def start_anew(how: str) -> None:
        getattr(servers[-1], how)()
        servers.append(OnPort(tmp_path, alone))

    actions: dict[str, Callable[[], object]] = {"look": look}
    actions |= {how: partial(start_anew, how) for how in ("kill", "stop")}
    try:
        _write_root(tmp_path, servers[-1])
        words = f"{words} rw nbd.port={PORT} nbd.work=root"
        console = boot(tmp_path, kernel.image, initramfs, words, actions, memory_mib=1024, behind=alone.enter)
        print(console)
        assert "PASS:" in console, console
        assert attached == [2]
    finally:
        with contextlib.suppress(AssertionError):
            servers[-1].stop()
