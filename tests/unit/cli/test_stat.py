"""`nbdzram stat` of an export whose blocks nobody has counted yet: it was made behind the walk that is told."""

from __future__ import annotations

import random
from itertools import pairwise

import click
import pytest

from nbdzram.cli.columns import INDENT, Column, render
from nbdzram.cli.stat import COLUMNS, WALKED, Line, _verdict, column_lists, command, explain
from tests.unit.records import EXPORT, OTHER_EXPORT, TWO_OF_EACH, USAGE

FRESH = Line(TWO_OF_EACH.pools[0], OTHER_EXPORT, (EXPORT, OTHER_EXPORT), {EXPORT.name: USAGE})


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.heading)
def test_only_what_has_to_be_counted_is_left_out(column: Column[Line]) -> None:
    """Of the pool the others are told."""
    cells = {
        name: column.cell(FRESH._replace(usage={**FRESH.usage, **usage}))
        for name, usage in (("fresh", {}), ("counted", {OTHER_EXPORT.name: USAGE}))
    }
    if column.heading in WALKED:
        assert cells["fresh"] is None
        assert cells["counted"] is not None
    else:
        assert cells["fresh"] == cells["counted"]


def test_where_its_memory_went_is_not_told_yet() -> None:
    assert list(explain(FRESH)) == [
        "export other of pool fast",
        "  it was made a moment ago, and its blocks are not counted yet",
    ]
    of_pool = list(explain(FRESH._replace(export=None)))
    assert of_pool == list(explain(FRESH._replace(export=None, exports=(EXPORT,))))


@pytest.mark.parametrize(
    ("stored", "taken", "told"),
    [
        (0, 4096, "nothing is stored yet: empty tables"),
        (4095, 4096, "below zero: the tables take more"),
        (4096, 4096, "1.00 to 1"),
        (9999, 4096, "2.44 to 1"),
    ],
)
def test_what_a_pool_saves_is_told_in_words_where_a_figure_would_say_little(stored: int, taken: int, told: str) -> None:
    assert _verdict(stored, taken) == told


def test_a_line_of_a_folded_table_ends_where_the_next_cell_finds_no_room() -> None:
    """And no sooner; but for a cell that is wider than the screen itself."""
    chance = random.Random(5)
    for _ in range(400):
        cells = ["x" * chance.randint(1, 30) for _ in range(chance.randint(1, 9))]
        width = chance.randint(6, 70)
        columns = [Column[str]("", "", lambda _, cell=cell: cell) for cell in cells]  # type: ignore[misc]
        lines = render(columns, ["row"], headings=False, width=width)
        assert " ".join(line.strip() for line in lines).split() == cells
        for line, following in pairwise(lines):
            assert following.startswith(INDENT)
            assert len(line) + 1 + len(following.split()[0]) > width
        assert all(len(line) <= width or len(line.split()) == 1 for line in lines)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("RE", ["READS"]),
        ("na", ["NAME"]),
        ("NAME,D", ["NAME,DISKSIZE", "NAME,DATA", "NAME,DESCRIPTION"]),
        ("name, data,DI", ["name, data,DISKSIZE"]),
        ("DATA,DA", []),
        ("x", []),
    ],
)
def test_columns_are_completed_behind_a_comma_too(typed: str, offered: list[str]) -> None:
    """Each once."""
    context = click.Context(command)
    assert column_lists(context, context.command.params[1], typed) == offered
