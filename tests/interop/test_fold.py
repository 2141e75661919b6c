"""Folding judged from outside: by a program that reads every block over NBD and counts for itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.conftest import IMAGE_BYTES
from tests.support import images
from tests.support.nbd_client import PIECE
from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop

BLOCK = 4096
EXPORTS: dict[str, str | int] = {"one": IMAGE_BYTES, "two": IMAGE_BYTES}


def pieces(image: bytes) -> Iterable[bytes]:
    return (image[offset : offset + PIECE] for offset in range(0, len(image), PIECE))


def same_filled(block: bytes) -> bool:
    return block == block[:8] * (BLOCK // 8)


def distinct_blocks(server: Nbdzram, exports: Iterable[str]) -> int:
    """Different contents over all exports, same-filled ones (which take no object) left out."""
    digests: set[bytes] = set()
    for name in exports:
        with server.client(name) as client:
            for piece in client.read_all():
                blocks = (piece[offset : offset + BLOCK] for offset in range(0, len(piece), BLOCK))
                digests.update(hashlib.sha256(block).digest() for block in blocks if not same_filled(block))
    return len(digests)


def test_no_duplicate_is_left_after_a_fold_across_exports(serve: Callable[..., Nbdzram], ext4_image: Path) -> None:
    """The server's count of objects equals an independent count of distinct blocks, and every block is as written."""
    server = serve(EXPORTS)
    image = ext4_image.read_bytes()
    clone = images.changed(image, seed=5)
    for name, content in (("one", image), ("two", clone)):
        with server.client(name) as client:
            client.write_all(pieces(content))
    before = server.pool_status()
    server.fold()
    after = server.pool_status()
    assert after["objects"] == distinct_blocks(server, EXPORTS)
    assert after["objects"] < before["objects"]
    assert after["mem_used_total"] < before["mem_used_total"]
    for name, content in (("one", image), ("two", clone)):
        with server.client(name) as client:
            assert b"".join(client.read_all()) == content


def test_a_second_fold_finds_nothing(server: Nbdzram, ext4_image: Path) -> None:
    """After a fold with nobody writing, another one merges no object."""
    with server.client() as client:
        client.write_all(pieces(ext4_image.read_bytes()))
    (first,) = server.fold()
    (second,) = server.fold()
    assert first["result"]["objects_merged"] > 0
    assert second["result"]["objects_merged"] == 0


def test_trimming_everything_gives_the_memory_back(server: Nbdzram, ext4_image: Path) -> None:
    """A folded disk that is trimmed whole leaves no object and no page, and the process shrinks."""
    with server.client() as client:
        client.write_all(pieces(ext4_image.read_bytes()))
        server.fold()
        used, full = server.pool_status()["mem_used_total"], server.resident_bytes()
        client.trim(0, IMAGE_BYTES)
        assert client.read(0, PIECE) == bytes(PIECE)
    after = server.pool_status()
    assert (after["objects"], after["mem_used_total"], after["orig_data_size"]) == (0, 0, 0)
    assert full - server.resident_bytes() > used / 2
