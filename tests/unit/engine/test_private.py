"""A private export shares objects with itself and its clones, and with nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text

SIZE = 8 << 20
CONTENT = b"".join([text(1), half_random(2), noise(3), prose(4), b"\x07" * BLOCK])
OBJECTS = 4  # of CONTENT; the repeated byte is none


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("mask", [-1, 0xFF, 0])
def test_a_private_export_never_shares_with_others(inline: bool, mask: int) -> None:
    """Whether its twin was there before or comes later, at the write and in a fold, and whatever the hash is worth."""
    pool = Pool(inline_dedup=inline, fingerprint_mask=mask & 0xFFFFFFFFFFFFFFFF)
    pool.create("before", SIZE).write(0, CONTENT)
    secret = pool.create("secret", SIZE, private=True)
    secret.write(0, CONTENT)
    pool.create("other secret", SIZE, private=True).write(0, CONTENT)
    pool.create("after", SIZE).write(0, CONTENT)
    run(Fold(pool))
    assert pool.stats().objects == 3 * OBJECTS  # one that the two others share, and one of each private export
    assert secret.usage().unique == secret.usage().compressed
    assert all(disk.read(0, len(CONTENT)) == CONTENT for disk in pool.disks())
    pool.check()


@pytest.mark.parametrize("inline", [False, True])
def test_a_private_export_shares_with_itself(inline: bool) -> None:
    pool = Pool(inline_dedup=inline)
    secret = pool.create("secret", SIZE, private=True)
    assert secret.private
    assert not pool.create("open", SIZE).private
    secret.write(0, CONTENT * 3)
    run(Fold(pool))
    run(Recompress(pool))
    assert pool.stats().objects == OBJECTS
    assert secret.read(0, len(CONTENT) * 3) == CONTENT * 3
    pool.check()


def test_no_dictionary_is_made_of_what_a_private_export_holds() -> None:
    """A stream of any other export would bring it along, to whoever receives that."""
    pool = Pool()
    secret = pool.create("secret", SIZE, private=True)
    secret.write(0, b"".join(prose(number) for number in range(300)))
    report = run(Recompress(pool, dictionary=True))
    assert (report.dictionary_bytes, report.objects_recompressed) == (0, 300)


def test_a_clone_of_a_private_export_is_of_its_domain() -> None:
    """They have the same blocks, so nothing is kept from one by keeping it from the other."""
    pool = Pool()
    secret = pool.create("secret", SIZE, private=True)
    secret.write(0, CONTENT)
    clone = pool.clone(secret, "clone")
    assert clone.private
    clone.write(SIZE // 2, CONTENT)
    pool.create("open", SIZE).write(0, CONTENT)
    run(Fold(pool))
    assert pool.stats().objects == 2 * OBJECTS
    pool.check()


def test_a_domain_is_not_given_to_another_while_a_clone_has_it() -> None:
    pool = Pool()
    first = pool.create("first", SIZE, private=True)
    first.write(0, CONTENT)
    pool.clone(first, "clone")
    pool.delete(first)
    second = pool.create("second", SIZE, private=True)
    second.write(0, CONTENT)
    run(Fold(pool))
    assert pool.stats().objects == 2 * OBJECTS
    pool.check()


def test_what_is_private_stays_so_when_a_pool_is_opened_again(tmp_path: Path) -> None:
    path = str(tmp_path / "pool")
    with Pool(path=path) as pool:
        pool.create("secret", SIZE, private=True).write(0, CONTENT)
        pool.create("open", SIZE).write(0, CONTENT)
    with Pool(path=path) as pool:
        secret, other = pool.disks()
        assert (secret.private, other.private) == (True, False)
        other.write(SIZE // 2, CONTENT)
        secret.write(SIZE // 2, CONTENT)
        pool.create("new secret", SIZE, private=True).write(0, CONTENT)
        run(Fold(pool))
        assert pool.stats().objects == 3 * OBJECTS
        pool.check()
