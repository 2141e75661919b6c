"""The reference says what the code says: the pages are current, and the example in them can be used."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import click
import pytest

from nbdzram.cli.main import COMMANDS, GROUPS
from nbdzram.control.methods import method_table
from nbdzram.metrics.families import FAMILIES
from nbdzram.settings import KEYS, load
from tests.support.programs import require_program
from tools import manual, reference


@pytest.mark.parametrize("page", reference.PAGE_MAKERS)
def test_a_page_is_current(page: str) -> None:
    path = reference.PAGES / page
    assert path.read_text() == reference.pages()[path], "run: python -m tools.reference"


def test_each_command_has_a_manual_page() -> None:
    assert set(manual.pages()) == {f"nbdzram-{name}.1" for name in COMMANDS} | {"nbdzram.1", "nbdzram.toml.5"}


def test_the_manual_says_every_key_and_every_option() -> None:
    pages = manual.pages()
    assert [key.path for key in KEYS if f".B {key.path[-1]}\n" not in pages["nbdzram.toml.5"]] == []
    assert "\\-\\-mem\\-limit" in pages["nbdzram-serve.1"]
    assert ".SH EXPORTS ADD" in pages["nbdzram-exports.1"]
    for name in GROUPS:  # which list, alone, and have options for that
        page = pages[f"nbdzram-{name}.1"]
        assert f".B nbdzram {name}\n[OPTIONS] [COMMAND] [ARGS]...\n" in page
        assert ".B \\-\\-json" in page.split(f".SH {name.upper()} ")[0]


def test_roff_takes_the_manual_as_it_is(tmp_path: Path) -> None:
    """mandoc's lint, which knows man(7): no error, and nothing that it cannot show."""
    mandoc = require_program("mandoc", package="mandoc")
    for name, content in manual.pages().items():
        page = tmp_path / name
        page.write_text(content)
        done = subprocess.run([mandoc, "-Tlint", "-Wwarning", page], capture_output=True, text=True, check=False)
        told = [line for line in done.stdout.splitlines() if "missing date" not in line]
        assert not told, "\n".join(told)


def test_nothing_is_left_out() -> None:
    written = {path.name: content for path, content in reference.pages().items()}
    assert [name for name in COMMANDS if f"\n## nbdzram {name}\n" not in written["cli.md"]] == []
    assert [key.path for key in KEYS if f"| `{key.path[-1]}` |" not in written["configuration.md"]] == []
    assert [family.name for family in FAMILIES if f"| `{family.name}` |" not in written["metrics.md"]] == []
    methods = method_table(reference._nobody(), reference._nobody())
    assert [name for name in methods if f"\n### `{name}`\n" not in written["control.md"]] == []


def test_what_each_command_prints_as_json_is_told() -> None:
    """A command by its name behind `nbdzram`, or alone where it shares a line with others."""
    told = {
        code.removeprefix("nbdzram ") for line, _ in reference.JSON_COMMANDS for code in re.findall("`(.+?)`", line)
    }
    told = {code.split(" --", 1)[0] for code in told}
    assert with_json() <= told
    assert told - with_json() == {"--dry-run"}


def with_json() -> set[str]:
    """The names of all commands that have --json."""
    found = set()
    left = [(name, importlib.import_module(f"nbdzram.cli.{name}").command) for name in COMMANDS]
    while left:
        name, command = left.pop()
        if any("--json" in parameter.opts for parameter in command.params):
            found.add(name)
        if isinstance(command, click.Group):
            left += [(f"{name} {part}", child) for part, child in command.commands.items()]
    return found


def test_the_example_configuration_can_be_used(tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text(reference.EXAMPLE)
    config = load(file, {}, {})
    assert [export.name for export in config.exports] == ["root", "scratch"]
