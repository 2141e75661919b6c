"""The estimate says what a pool then needs."""

from __future__ import annotations

import pytest

from nbdzram.engine.estimate import Estimate
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import UserError
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text

CONTENT = b"".join(
    [half_random(number % 400, 100 + number % 60 * 60) for number in range(1000)]
    + [noise(number % 30) for number in range(60)]
    + [text(number) for number in range(200)]
    + [bytes(4096)] * 40
)


def test_an_estimate_of_every_block_is_what_the_pool_says_afterwards() -> None:
    estimate = Estimate()
    for start in range(0, len(CONTENT), 1 << 20):
        estimate.feed(CONTENT[start : start + (1 << 20)])
    figures = estimate.figures()
    pool = Pool()
    pool.create("disk", len(CONTENT)).write(0, CONTENT)
    written = pool.stats()
    assert (figures.blocks, figures.same_filled) == (len(CONTENT) // 4096, written.same_pages)
    assert figures.needs["lz4"].compressed == written.compr_data_size
    assert figures.needs["lz4"].memory == written.mem_used_total
    run(Fold(pool))
    run(Compact(pool))
    folded = pool.stats()
    assert figures.distinct_objects == folded.objects
    assert figures.needs["lz4"].distinct == folded.compr_data_size
    assert figures.needs["lz4"].memory_folded == folded.mem_used_total
    run(Recompress(pool))
    run(Compact(pool))
    assert figures.needs["zstd"].distinct == pool.stats().compr_data_size
    assert figures.needs["zstd"].memory_folded == pool.stats().mem_used_total


def test_a_sample_by_content_keeps_the_share_of_duplicates() -> None:
    content = b"".join(half_random(number % 3000) for number in range(12000))
    whole, sampled = Estimate(), Estimate(sample=4)
    whole.feed(content)
    sampled.feed(content)
    truth, guess = whole.figures(), sampled.figures()
    assert truth.objects == guess.objects
    assert guess.distinct_objects == pytest.approx(truth.distinct_objects, rel=0.1)
    assert guess.needs["lz4"].distinct == pytest.approx(truth.needs["lz4"].distinct, rel=0.1)


def test_an_image_may_end_within_a_block() -> None:
    estimate = Estimate()
    estimate.feed(text(1) + b"tail")
    assert estimate.figures().blocks == 2


def test_values_outside_their_range_are_refused() -> None:
    with pytest.raises(UserError, match="level 0"):
        Estimate(level=0)
    with pytest.raises(UserError, match="one in 0"):
        Estimate(sample=0)


def test_nothing_is_said_of_blocks_of_which_none_is_in_the_sample() -> None:
    """It would say that all of them together need no memory, and are equal."""
    estimate = Estimate(sample=1 << 20)
    estimate.feed(bytes(BLOCK))
    assert (estimate.figures().objects, estimate.figures().needs["lz4"].memory) == (0, 0)
    estimate.feed(noise(1))
    with pytest.raises(UserError, match=r"none of 1 blocks is in a sample of one in 1048576.*--sample"):
        estimate.figures()
