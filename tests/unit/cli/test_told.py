"""What each command asks of the server with each of its options, and where each figure that it answers is printed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
