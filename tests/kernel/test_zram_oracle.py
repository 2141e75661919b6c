"""The kernel's own zram as oracle: the same image to both, and the counters agree."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.engine.pool import Pool
from tests.support import images
from tests.support.zram import zram_device

pytestmark = pytest.mark.kernel

MIB = 1 << 20
REQUEST_BYTES = 256 * 1024
SPARE_BYTES = 15 * 4096  # pages that were freed last, kept for the next write


def ext4(directory: Path) -> bytes:
    tree = images.python_tree(directory / "tree")
    return images.ext4_image(directory / "ext4.img", tree, 128 * MIB).read_bytes()


def same_filled(_: Path) -> bytes:
    return images.same_filled_mix(8192)


def incompressible(_: Path) -> bytes:
    return images.random_bytes(4096)


def swap_like(_: Path) -> bytes:
    return images.process_memory()


@pytest.mark.parametrize("make_image", [ext4, same_filled, incompressible, swap_like])
def test_the_counters_agree_with_the_kernels_zram(tmp_path: Path, make_image: Callable[[Path], bytes]) -> None:
    """The same writes leave the kernel's zram (LZ4) and a pool with the same mm_stat, and the pool no larger."""
    image = make_image(tmp_path)
    file = tmp_path / "image"
    file.write_bytes(image)
    with zram_device(len(image)) as zram:
        zram.write(file)
        kernel = zram.mm_stat()
    with Pool() as pool:
        disk = pool.create("disk", len(image))
        for offset in range(0, len(image), REQUEST_BYTES):
            disk.write(offset, image[offset : offset + REQUEST_BYTES])
        ours = pool.stats().mm_stat()
        assert disk.read(0, len(image)) == image
    assert ours[0] == kernel[0], "orig_data_size"
    assert ours[5] == kernel[5], "same_pages"
    assert ours[1] == pytest.approx(kernel[1], rel=0.02), "compr_data_size"
    assert ours[2] <= kernel[2], "mem_used_total"
    assert ours[7] == pytest.approx(kernel[7], rel=0.02, abs=2), "huge_pages"


def test_deleted_files_that_do_not_compress_leave_as_little_behind_as_in_the_kernels_zram(tmp_path: Path) -> None:
    """Files of 16 KiB, one of ten kept: no page stays for the sake of its neighbours."""
    size, file_bytes = 64 * MIB, 16 << 10
    image = tmp_path / "image"
    image.write_bytes(random.Random(1).randbytes(size))
    deleted = [offset for offset in range(0, size, file_bytes) if offset // file_bytes % 10]
    with zram_device(size) as zram:
        zram.write(image)
        for offset in deleted:
            zram.discard(offset, file_bytes)
        kernel = zram.mm_stat()
    with Pool() as pool:
        disk = pool.create("disk", size)
        disk.write(0, image.read_bytes())
        for offset in deleted:
            disk.trim(offset, file_bytes)
        ours = pool.stats().mm_stat()
    assert ours[0] == kernel[0], "orig_data_size"
    assert ours[2] <= kernel[2] + SPARE_BYTES, "mem_used_total"
    print(f"16 KiB files, one of ten kept: {ours[2] / MIB:.2f} MiB here, {kernel[2] / MIB:.2f} MiB in zram")
