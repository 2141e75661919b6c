"""The kernel's own zram as oracle: the same image to both, and the counters agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.engine.pool import Pool
from tests.support import images
from tests.support.zram import zram_device

pytestmark = pytest.mark.kernel

MIB = 1 << 20
REQUEST_BYTES = 256 * 1024


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
