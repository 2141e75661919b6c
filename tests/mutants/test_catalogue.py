"""The catalogue keeps up with the code: each mistake can still be made, and is to be found by tests that there are."""

from __future__ import annotations

import datetime
import itertools
import random
from pathlib import Path

import pytest

from tests.mutants.__main__ import in_chance_order
from tests.mutants.catalogue import PROJECT, Mutant, draw, read

MUTANTS = read()
FEWEST = 200
MOST_EXPLAINED = 0.1  # of all: what no test can find


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_can_still_be_made(mutant: Mutant) -> None:
    text = (PROJECT / mutant.file).read_text(encoding="utf-8")
    assert mutant.applied_to(text) != text
    assert mutant.tests
    for words in mutant.tests:
        file, _, name = words.partition("::")
        assert (PROJECT / file).exists(), words
        function = name.partition("[")[0].rpartition("::")[2]
        assert not function or f"def {function}(" in (PROJECT / file).read_text(encoding="utf-8"), words


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert sorted(set(names)) == sorted(names)


def test_few_survivors_are_explained_away() -> None:
    assert sum(bool(mutant.survives) for mutant in MUTANTS) <= MOST_EXPLAINED * len(MUTANTS)


def test_a_draw_is_the_same_all_day_and_another_one_tomorrow() -> None:
    today = datetime.date(2026, 1, 1)
    drawn = draw(MUTANTS, 10, today)
    assert drawn == draw(MUTANTS, 10, today)
    assert drawn != draw(MUTANTS, 10, today + datetime.timedelta(days=1))
    assert len(drawn) == -(-len(MUTANTS) // 10)


def test_those_of_the_same_tests_are_tried_together_and_the_order_is_chance() -> None:
    """Their tests are proved once; and of a day that is too short others are left."""
    orders = [in_chance_order(MUTANTS, random.Random(day)) for day in range(2)]
    assert orders[0] != orders[1]
    for ordered in orders:
        assert sorted(ordered, key=lambda mutant: mutant.name) == sorted(MUTANTS, key=lambda mutant: mutant.name)
        begun = [tests for tests, _ in itertools.groupby(mutant.tests for mutant in ordered)]
        assert len(begun) == len(set(begun))


def test_an_entry_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "area.toml").write_text('[[mutant]]\nname = "a"\nfiles = "b"\n')
    with pytest.raises(ValueError, match="files"):
        read(tmp_path)
