"""The C entry points that were found in the wheels do what their Python APIs do."""

from __future__ import annotations

import contextlib

import lz4.block
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nbdzram.engine import codec
from tests.unit.engine.blocks import BLOCK, half_random, noise, text

BLOCKS = [text(1), half_random(2), noise(3), bytes(BLOCK), b"\xff" * BLOCK]


@pytest.mark.parametrize("block", BLOCKS)
def test_lz4_encoding_is_the_one_that_the_wheel_gives(block: bytes) -> None:
    encoded = codec.compress_lz4(block)
    assert encoded == lz4.block.compress(block, store_size=False)
    assert codec.decompress_lz4(encoded) == block


@pytest.mark.parametrize("block", BLOCKS)
def test_zstd_frames_are_magicless_and_decode_in_the_wheel(block: bytes) -> None:
    frames = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    encoded = codec.compress_zstd(block)
    assert not encoded.startswith(zstandard.FRAME_HEADER)
    assert frames.decompress(encoded, max_output_size=BLOCK) == block
    assert codec.decompress_zstd(encoded) == block
    assert encoded[0] == 0  # no size, no checksum, no number of a dictionary: RFC 8878, section 3.1.1.1.1


@pytest.mark.parametrize("block", BLOCKS)
def test_fingerprint_is_seeded_xxh3(block: bytes) -> None:
    assert codec.fingerprint_of(block, 12345) == xxhash.xxh3_64_intdigest(block, 12345)
    assert codec.fingerprint_of(block, 12345) != codec.fingerprint_of(block, 12346)


@given(st.binary(max_size=5000))
def test_bytes_that_are_no_block_are_refused_and_write_nothing_outside(garbage: bytes) -> None:
    for decode in (codec.decompress_lz4, codec.decompress_zstd):
        with contextlib.suppress(ValueError):
            assert len(decode(garbage)) == BLOCK


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 100, text(1)[:500]])
def test_a_refusal_names_the_codec_and_the_length(garbage: bytes) -> None:
    with pytest.raises(ValueError, match=f"{len(garbage)} bytes are not an LZ4 block"):
        codec.decompress_lz4(garbage)
    with pytest.raises(ValueError, match=f"{len(garbage)} bytes are not a Zstandard block"):
        codec.decompress_zstd(garbage)
