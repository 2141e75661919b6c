"""A bare Debian in a directory, made by debootstrap and kept under .cache, to be used through a layer that goes again.

What runs in it is a chroot, a container of systemd-nspawn in which systemd is the first process, or a Docker image.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.debian13 import mirror
from tests.support.programs import missing, require_program, require_root

CACHE = Path(__file__).resolve().parents[2] / ".cache"
BOOTSTRAP_SECONDS = 1800
BOOT_SECONDS = 300
MACHINE_ID = "uninitialized\n"  # machine-id(5): systemd makes one at the first boot
AUTHORITIES = "etc/ssl/certs/ca-certificates.crt"
PIP_REACHES_BY = ("index-url", "extra-index-url", "proxy", "trusted-host", "default-timeout", "timeout")


def require_base(release: str, *packages: str) -> Path:
    """The root directory of a minimal Debian with these packages. Nobody writes to it."""
    require_root("makes and enters a root directory")
    debootstrap = require_program("debootstrap", package="debootstrap")
    base = CACHE / f"base-{release}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:8]}"
    if not base.exists():
        making = base.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        include = [f"--include={','.join(('ca-certificates', *packages))}"]
        command = [debootstrap, "--variant=minbase", *include, release, str(making), mirror()]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=BOOTSTRAP_SECONDS)
        except subprocess.SubprocessError as error:
            missing(f"debootstrap cannot make {release} from {mirror()}: {error}")
        (making / "etc/machine-id").write_text(MACHINE_ID)
        making.rename(base)
    return base


@contextlib.contextmanager
def layer_over(base: Path, directory: Path) -> Iterator[Path]:
    """A root directory that looks like `base`; what is written to it is gone with the layer."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
    try:
        parts = {name: directory / name for name in ("upper", "work", "root")}
        for part in parts.values():
            part.mkdir()
        options = f"lowerdir={base},upperdir={parts['upper']},workdir={parts['work']}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, parts["root"]], check=True)
        try:
            yield parts["root"]
        finally:
            subprocess.run(["umount", parts["root"]], check=True)
    finally:
        subprocess.run(["umount", directory], check=True)


def reach_packages(root: Path) -> None:
    """Let apt and pip in `root` reach what this machine's own reach, by the same servers, proxies and authorities."""
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    shutil.copy(Path("/", AUTHORITIES), root / AUTHORITIES)
    told = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout
    (root / "etc/apt/apt.conf.d/99-as-outside").write_text(told)
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {"cert": f"/{AUTHORITIES}"}
    for key, value in re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", told, re.MULTILINE):
        if key in PIP_REACHES_BY and "file:" not in value:
            settings[key] = value
    (root / "etc/pip.conf").write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))


def run_in(root: Path, words: Sequence[str], *, seconds: float) -> subprocess.CompletedProcess[str]:
    """A command in a chroot, in namespaces of its own for mounts and processes: nothing of it stays."""
    return subprocess.run(enter(root, words), capture_output=True, text=True, timeout=seconds, check=False)


def enter(root: Path, words: Sequence[str]) -> list[str]:
    """The command that runs `words` in a chroot so; whoever kills it kills all that runs there."""
    isolate = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={root}/proc"]
    return [*isolate, "chroot", str(root), *words]


def boot(root: Path, trial: str) -> str:
    """Boot systemd in `root`, run the shell script `trial` there, and power off. What it printed.

    It is not the first boot: at that systemd would enable, and start beside the trial, whatever is installed.
    """
    (root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
    nspawn = require_program("systemd-nspawn", package="systemd-container")
    told = root / "trial.out"
    script = root / "usr/local/bin/trial"
    script.write_text(f"#!/bin/bash\nexec >/trial.out 2>&1\n{trial}\nsystemctl poweroff\n")
    script.chmod(0o755)
    unit = root / "etc/systemd/system/trial.service"
    unit.write_text("[Service]\nType=exec\nExecStart=/usr/local/bin/trial\n")
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / unit.name).symlink_to(f"../{unit.name}")
    machine = [nspawn, "--quiet", "--register=no", "--keep-unit", "--private-network", f"--directory={root}", "--boot"]
    try:
        subprocess.run(machine, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOOT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it did not power off:\n{told.read_text() if told.exists() else ''}") from None
    return told.read_text()
