"""What pages show is what the program takes: every command line, every configuration, every test and file they name."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import click
import pytest
from _pytest.mark import ParameterSet

from nbdzram import settings
from nbdzram.cli.main import front
from nbdzram.cli.perils import state_perils
from nbdzram.config import Limits, ServerConfig
from tests.docs.pages import ROOT, blocks, pages

COMMAND = re.compile(r"(?:^[$#] |; do |&& )(?:sudo )?(nbdzram [^|;&<>#\n]*)", re.MULTILINE)
CONTINUED = re.compile(r"\\\n\s*")
IN_THE_BACKGROUND = re.compile(r"nbdzram serve [^#\n]*[^&]&\s*(?:#.*)?$", re.MULTILINE)
WAIT = "until nbdzram health"
STATE_DIRECTORY = re.compile(r"""(?:--state-dir[ =]|state_dir = )["']?([^\s"'#]+)""")
NAMED = re.compile(r"`([^`]+)`")
DEFINITION = re.compile(r"^\s*(?:async )?(?:c?p?def|class)\b[^\n(:]*?(\w+)\s*(?:[(:]|$)", re.MULTILINE)
NAMED_TEST = re.compile(r"`(test_\w+)`")
NAMED_FILE = re.compile(r"`((?:tests|deploy|nbdzram|docs)/[\w./-]+)`")


def command_lines() -> list[ParameterSet]:
    """Each `nbdzram ...` of every shell block."""
    found: list[ParameterSet] = []
    for page in pages():
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.language in {"bash", "console"}:
                lines = COMMAND.findall(CONTINUED.sub("", block.content))
                told = [line.strip().removesuffix("...").strip() for line in lines]
                found += [pytest.param(line, id=f"{page.relative_to(ROOT)}: {line}") for line in told]
    return found


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_is_understood(line: str) -> None:
    """Commands and options exist, and values are of the kind that they take. Nothing is run."""
    parse(front, shlex.split(line)[1:])


def hasty(content: str) -> list[str]:
    """Servers that a block starts in the background and goes on to use, without waiting until they serve."""
    told = CONTINUED.sub("", content).splitlines()
    commands = [line.removeprefix("$ ") for line in told if not line.startswith("# ") and line.strip()]
    pairs = zip(commands, [*commands[1:], WAIT], strict=False)  # of none there are none
    return [line for line, behind in pairs if IN_THE_BACKGROUND.search(line) and not behind.startswith(WAIT)]


def test_who_pastes_a_page_does_not_come_before_the_server_that_it_starts() -> None:
    """The line behind `serve ... &` was refused: the server was not there yet."""
    content = [block.content for page in pages() for block in blocks(page.read_text(encoding="utf-8"))]
    assert sum(bool(IN_THE_BACKGROUND.search(one)) for one in content) > 2
    assert [line for one in content for line in hasty(one)] == []
    assert hasty("$ nbdzram serve -e a=1G &  # a disk\n$ nbdzram stat\n") == ["nbdzram serve -e a=1G &  # a disk"]


def parse(command: click.Command, words: list[str]) -> None:
    """Let click read a command line down to the subcommand that would run."""
    if not isinstance(command, click.Group):
        command.make_context(command.name, words)
        return
    context = click.Context(command)
    assert words, f"{command.name} needs a subcommand"
    _, subcommand, rest = command.resolve_command(context, words)
    assert subcommand is not None
    parse(subcommand, rest)


@pytest.mark.parametrize("line", ["nbdzram stat --no-such-option", "nbdzram no-such-command", "nbdzram clone onlyone"])
def test_a_wrong_command_line_is_found(line: str) -> None:
    """The check above can fail."""
    with pytest.raises(click.UsageError):
        parse(front, shlex.split(line)[1:])


def configurations() -> list[ParameterSet]:
    return [
        pytest.param(block.content, id=str(page.relative_to(ROOT)))
        for page in pages()
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language == "toml"
    ]


@pytest.mark.parametrize("content", configurations())
def test_every_configuration_is_valid(content: str, tmp_path: Path) -> None:
    """A TOML block can be used as it stands."""
    file = tmp_path / "nbdzram.toml"
    file.write_text(content, encoding="utf-8")
    settings.load(file, {}, {})


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_keeps_disks_where_others_clean_up(page: Path) -> None:
    """Whoever follows it would lose them. What the program itself warns of is not what its pages advise."""
    content = [block.content for block in blocks(page.read_text(encoding="utf-8"))]
    named = [directory for one in content for directory in STATE_DIRECTORY.findall(one)]
    config = ServerConfig()
    perils = [peril for name in named for peril in state_perils(replace(config, state_dir=Path(name).expanduser()))]
    assert perils == []
    assert named or page.name != "survive-a-restart.md"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_and_file_that_a_page_names_is_there(page: Path) -> None:
    """Whoever looks a claim up finds what holds it."""
    text = page.read_text(encoding="utf-8")
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in NAMED_TEST.findall(text) if f"def {name}(" not in tests] == []
    assert [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()] == []


def definitions() -> set[str]:
    """Functions and classes of the program, also those of its compiled half."""
    sources = [path for kind in ("*.py", "*.pyx", "*.pxd") for path in (ROOT / "nbdzram").rglob(kind)]
    return {name for path in sources for name in DEFINITION.findall(path.read_text(encoding="utf-8"))}


def clauses() -> list[list[str]]:
    """What stands in the rows of the page on the protocol: a clause, where it is answered, and what holds it."""
    lines = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "clause (section)"]


def test_every_place_and_test_that_the_protocols_clauses_name_is_there() -> None:
    """A function that moved or went leaves no clause behind that leads nowhere."""
    defined, wrong = definitions(), []
    for _, place, test in clauses():
        for name in NAMED.findall(place):
            if "/" in name:
                there = any((ROOT / "nbdzram" / f"{name}{kind}").exists() for kind in (".py", ".pyx"))
            else:
                there = name.rpartition(".")[2] in defined
            wrong += [] if there else [name]
        named = (name.partition(".")[0] for name in NAMED.findall(test))
        wrong += [name for name in named if not (ROOT / "tests" / f"{name}.py").exists()]
    assert len(clauses()) > 60
    assert wrong == []


def test_the_page_on_sizing_tells_the_limits_that_there_are() -> None:
    text = " ".join((ROOT / "docs" / "howto" / "sizing.md").read_text(encoding="utf-8").split())
    limits = Limits()
    told = (
        f"{limits.connections:,} connections, {limits.payload_bytes >> 20} MiB a request, "
        f"{limits.connection_bytes >> 20} MiB of buffers a connection and {limits.total_bytes >> 20} MiB over all, "
        f"{limits.handshake_seconds:.0f} seconds for a handshake"
    )
    assert told in text
    assert f"{limits.total_bytes >> 20} MiB more at most for requests under way" in text
