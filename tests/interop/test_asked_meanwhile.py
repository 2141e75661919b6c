"""Who asks for something while another process takes over is answered by it, once it has what is asked for."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.control import messages
from tests.interop.test_takeover_kills import Held
from tests.support.takeover import listening

pytestmark = pytest.mark.interop


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    made = Held(tmp_path, "new has opened", in_memory=True)
    yield made
    made.end()


def test_an_act_that_is_asked_for_while_the_next_server_starts_is_done_by_it(held: Held) -> None:
    """It was refused, and of some disks a command was told that there are none."""
    with listening(held.place) as steps, socket.socket(socket.AF_UNIX) as asking:
        held.begin()
        with held.at_step(steps) as waiting:
            asking.connect(str(held.line.control))
            asking.sendall(messages.request("exports.change", {"name": "disk", "description": "changed"}, 1))
            waiting.shutdown(socket.SHUT_RDWR)
        with asking.makefile("rb") as answers:
            answer = json.loads(answers.readline())
    assert answer.get("result", {}).get("description") == "changed", answer
