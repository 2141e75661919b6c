"""What each command asks of the server with each of its options, and where each figure that it answers is printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from nbdzram.cli.main import front
from tests.unit.cli.told import Recorder, serving, tell, told

TOLD = told()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Path, Recorder]]:
    with serving() as both:
        yield both


@pytest.mark.parametrize("line", TOLD)
def test_a_command_asks_and_tells_what_it_did(line: str, server: tuple[Path, Recorder]) -> None:
    """Where that is meant to be otherwise: python -m tests.unit.cli.told"""
    assert tell(line, *server).splitlines() == TOLD[line].splitlines()


def command_of(line: str) -> click.Command:
    found: click.Command = front
    for word in shlex.split(line)[1:]:
        if not isinstance(found, click.Group):
            break
        found = found.get_command(click.Context(found), word) or found
    return found


IN_OTHER_WORDS = {"stat", "top", "send"}  # their forms tell different things; the output of the last is the stream
AS_JSON = [
    line
    for line in TOLD
    if any(option.name == "as_json" for option in command_of(line).params)
    and "--json" not in line
    and "exit: " not in TOLD[line]
    and line.split()[1] not in IN_OTHER_WORDS
]


@pytest.mark.parametrize("line", AS_JSON)
def test_as_json_a_command_asks_for_the_same_and_prints_one_document_and_nothing_else(
    line: str, server: tuple[Path, Recorder]
) -> None:
    def asked(told: str) -> set[str]:
        return {one for one in told.splitlines() if one.startswith("asked: ") and one != "asked: status()"}

    told = tell(f"{line} --json", *server)
    assert asked(told) == asked(TOLD[line])
    printed = [one for one in told.splitlines()[1:] if not one.startswith(("asked: ", "stderr: "))]
    json.loads("\n".join(printed))
