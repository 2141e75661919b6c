"""Debian's cloud kernel: fetched with apt, unpacked under .cache, never installed."""

from __future__ import annotations

import lzma
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.programs import missing, require_program, run

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "kernel"

# The first that apt knows: the series that ships nbd with the fixes of 2025, then whatever this release has.
PACKAGES = ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One unpacked kernel package."""

    version: str
    image: Path
    modules: Path

    def modules_for(self, *names: str) -> list[tuple[str, bytes]]:
        """The named modules and all that they depend on, uncompressed, each after its dependencies."""
        ordered: dict[str, bytes] = {}
        for name in names:
            self._collect(name, ordered)
        return list(ordered.items())

    def _collect(self, name: str, ordered: dict[str, bytes]) -> None:
        if name in ordered:
            return
        path = next(self.modules.rglob(f"{name}.ko*"), None)
        if path is None:  # built into this kernel
            assert self._is_builtin(name), f"kernel {self.version} has no module {name}"
            return
        module = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        depends = re.search(rb"\0depends=([^\0]*)\0", module)
        for needed in depends.group(1).decode().split(",") if depends else []:
            if needed:
                self._collect(needed, ordered)
        ordered[name] = module

    def _is_builtin(self, name: str) -> bool:
        return f"/{name}.ko\n" in (self.modules.parent / "modules.builtin").read_text()


def fetch_kernel() -> Kernel:
    """The kernel under .cache, downloaded on the first use (34 MB)."""
    kernel = _unpacked()
    if kernel is None:
        _download()
        kernel = _unpacked()
    assert kernel is not None, f"the kernel package holds no vmlinuz under {CACHE}"
    return kernel


def _unpacked() -> Kernel | None:
    for image in sorted((CACHE / "root" / "boot").glob("vmlinuz-*")):
        version = image.name.removeprefix("vmlinuz-")
        modules = CACHE / "root" / "lib" / "modules" / version / "kernel"
        if modules.is_dir():
            return Kernel(version, image, modules)
    return None


def _download() -> None:
    apt_cache = require_program("apt-cache", package="apt")
    for package in PACKAGES:
        # It fails for a package that it does not know.
        words = [apt_cache, "depends", package]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        depends = re.search(r"Depends: (linux-image-\S+)", answer.stdout)
        if depends:
            break
    else:
        missing(f"apt knows none of {', '.join(PACKAGES)}; try: apt-get update")
    CACHE.mkdir(parents=True, exist_ok=True)
    run(["sh", "-c", 'cd "$1" && apt-get download -qq "$2"', "sh", CACHE, depends.group(1)])
    archive = next(CACHE.glob("linux-image-*.deb"))
    run([require_program("dpkg-deb", package="dpkg"), "--extract", archive, CACHE / "root"])
    archive.unlink()  # unpacked is all that is needed
