"""The reference says what the code says: the pages are current, and the example in them can be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdzram.cli.main import COMMANDS
from nbdzram.control.methods import method_table
from nbdzram.metrics.families import FAMILIES
from nbdzram.settings import KEYS, load
from tools import reference


@pytest.mark.parametrize("page", reference.PAGE_MAKERS)
def test_a_page_is_current(page: str) -> None:
    path = reference.PAGES / page
    assert path.read_text() == reference.pages()[path], "run: python -m tools.reference"


def test_nothing_is_left_out() -> None:
    written = {path.name: content for path, content in reference.pages().items()}
    assert [name for name in COMMANDS if f"\n## nbdzram {name}\n" not in written["cli.md"]] == []
    assert [key.path for key in KEYS if f"| `{key.path[-1]}` |" not in written["configuration.md"]] == []
    assert [family.name for family in FAMILIES if f"| `{family.name}` |" not in written["metrics.md"]] == []
    methods = method_table(reference._nobody(), reference._nobody())
    assert [name for name in methods if f"\n### `{name}`\n" not in written["control.md"]] == []


def test_the_example_configuration_can_be_used(tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text(reference.EXAMPLE)
    config = load(file, {}, {})
    assert [export.name for export in config.exports] == ["root", "scratch"]
