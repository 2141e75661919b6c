"""Programs of Debian 13 beside the system's own: libnbd 1.22 and QEMU 10, which speak extended headers.

Fetched once by apt, from the mirror that the machine uses, with a configuration of its own, so that nothing is
installed and no file of the system's apt is touched; unpacked under .cache and run by their own dynamic loader.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.support.programs import PROGRAM_SECONDS, missing, require_program

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "debian13"
PACKAGES = ("libnbd-bin", "qemu-utils")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEFAULT_MIRROR = "http://deb.debian.org/debian"


def require_debian13() -> Path:
    """The directory that Debian 13's files were unpacked into."""
    root = CACHE / "root"
    if not (CACHE / "ready").exists():
        apt_get = require_program("apt-get", package="apt")
        require_program("dpkg-deb", package="dpkg")
        try:
            _fetch(apt_get, root)
        except (subprocess.SubprocessError, OSError) as error:
            detail = getattr(error, "stderr", None) or error
            missing(f"Debian 13's packages cannot be had from {mirror()}: {detail}")
        (CACHE / "ready").touch()
    return root


def program(name: str) -> list[str]:
    """The words that start one of its programs."""
    root = require_debian13()
    libraries = root / "usr/lib/x86_64-linux-gnu"
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(root / "usr/bin" / name)]


def _fetch(apt_get: str, root: Path) -> None:
    for directory in ("state/lists/partial", "cache/archives/partial", "etc", "root"):
        (CACHE / directory).mkdir(parents=True, exist_ok=True)
    (CACHE / "status").touch()
    (CACHE / "etc/sources.list").write_text(f"deb [arch=amd64 signed-by={KEYRING}] {mirror()} trixie main\n")
    settings = {
        "Dir::State": CACHE / "state",
        "Dir::State::status": CACHE / "status",
        "Dir::Cache": CACHE / "cache",
        "Dir::Etc": CACHE / "etc",
        "APT::Architecture": "amd64",
        "APT::Keep-Downloaded-Packages": "true",
        "Acquire::Retries": "2",
        "Debug::NoLocking": "true",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    install = ["install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES]
    for words in (["update"], install):
        _run([apt_get, *options, *words])
    for package in sorted((CACHE / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(root)])


def mirror() -> str:
    """Where the system's own packages come from."""
    for file in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("debian*"))):
        found = (
            re.search(r"^(?:deb |URIs:).*?(https?://\S+/debian)/?\s", file.read_text(), re.MULTILINE)
            if file.exists()
            else None
        )
        if found:
            return found[1]
    return DEFAULT_MIRROR


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=PROGRAM_SECONDS)
