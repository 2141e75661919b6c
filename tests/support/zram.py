"""A device of the kernel's own zram (Documentation/admin-guide/blockdev/zram), made and removed through sysfs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.programs import missing, require_program, require_root, run

CONTROL = Path("/sys/class/zram-control")


class Zram:
    def __init__(self, number: int) -> None:
        self.device = Path(f"/dev/zram{number}")
        self._settings = Path(f"/sys/block/zram{number}")

    def set(self, name: str, value: str) -> None:
        (self._settings / name).write_text(value)

    def write(self, image: Path) -> None:
        """Write the whole image from the start, past the page cache: what zram counts is then there."""
        run(["dd", f"if={image}", f"of={self.device}", "bs=1M", "oflag=direct", "status=none"])

    def discard(self, offset_bytes: int, size_bytes: int) -> None:
        """Give back a range, as a file system does that deletes a file."""
        run(["blkdiscard", "-o", str(offset_bytes), "-l", str(size_bytes), str(self.device)])

    def mm_stat(self) -> list[int]:
        return [int(word) for word in (self._settings / "mm_stat").read_text().split()]


@contextmanager
def zram_device(size_bytes: int, *, codec: str = "lz4") -> Iterator[Zram]:
    """A fresh device of `size_bytes`; it is gone afterwards, whatever happened."""
    require_root("zram is set up through /sys/class/zram-control")
    if not (CONTROL / "hot_add").exists():
        missing(f"{CONTROL}/hot_add is not there: this kernel has no zram; try: modprobe zram")
    require_program("dd", package="coreutils")
    require_program("blkdiscard", package="util-linux")
    number = int((CONTROL / "hot_add").read_text())
    device = Zram(number)
    try:
        if codec not in device_codecs(number):
            missing(f"this kernel's zram has no {codec}")
        device.set("comp_algorithm", codec)
        device.set("disksize", str(size_bytes))
        yield device
    finally:
        device.set("reset", "1")
        (CONTROL / "hot_remove").write_text(str(number))


def device_codecs(number: int) -> list[str]:
    listing = Path(f"/sys/block/zram{number}/comp_algorithm").read_text()
    return listing.replace("[", "").replace("]", "").split()
