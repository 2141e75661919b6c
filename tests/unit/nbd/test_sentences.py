"""What a refused request is told, word for word: its client shows it to a person, and the log repeats it."""

from __future__ import annotations

import pytest

from nbdzram.nbd.constants import Command, CommandFlag
from nbdzram.nbd.verdicts import Asked, Verdict, explain

SENTENCES = {
    Verdict.OK: "READ of 512 bytes at 4096 succeeded",
    Verdict.UNKNOWN_COMMAND: "command 0 is not known",
    Verdict.WRONG_FLAGS: "READ with flags 0x3 (FUA|NO_HOLE) is not allowed here",
    Verdict.READ_ONLY: "READ of 512 bytes at 4096: the export is read-only",
    Verdict.OUT_OF_RANGE: "READ of 512 bytes at 4096 goes past the end of the export (1024 bytes)",
    Verdict.TOO_LONG: "READ of 512 bytes at 4096: at most 256 bytes a request are served",
    Verdict.FRAGMENTED: "READ of 512 bytes at 4096 with DF: at most 256 bytes are sent unfragmented",
    Verdict.NO_CONTEXT: "READ of 512 bytes at 4096: SET_META_CONTEXT selected no metadata context for this export",
    Verdict.WRONG_SHAPE: "READ of 512 bytes at 4096 is not a valid form of this request",
    Verdict.POOL_FULL: "READ of 512 bytes at 4096: the pool is at its memory limit",
    Verdict.UNREADABLE: "READ of 512 bytes at 4096: stored bytes do not decode",
    Verdict.NOT_SYNCED: ("READ of 512 bytes at 4096: the disk below the state directory did not take what was stored"),
    Verdict.OVER_QUOTA: "READ of 512 bytes at 4096: the export stores as much as its quota allows",
}


@pytest.mark.parametrize("verdict", Verdict)
def test_every_verdict_has_its_sentence(verdict: Verdict) -> None:
    asked = Asked(Command.READ, CommandFlag.FUA | CommandFlag.NO_HOLE, b"", 4096, 512)
    assert explain(verdict, asked, size=1024, limit=256) == SENTENCES[verdict]


@pytest.mark.parametrize("command", Command)
def test_commands_are_told_by_their_names(command: Command) -> None:
    told = explain(Verdict.READ_ONLY, Asked(command, 0, b"", 0, 0), size=0, limit=0)
    assert told == f"{command.name} of 0 bytes at 0: the export is read-only"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (0, "0 (0)"),
        (63, "0x3f (FUA|NO_HOLE|DF|REQ_ONE|FAST_ZERO|PAYLOAD_LEN)"),
        (0x8001, "0x8001 (FUA|0x8000)"),
        (0xFFFF, "0xffff (FUA|NO_HOLE|DF|REQ_ONE|FAST_ZERO|PAYLOAD_LEN|0xffc0)"),
    ],
)
def test_flags_are_told_by_their_names_and_the_rest_as_a_number(flags: int, told: str) -> None:
    largest = Asked(0xFFFF, flags, b"", (1 << 64) - 1, (1 << 64) - 1)
    sentence = explain(Verdict.WRONG_FLAGS, largest, size=(1 << 64) - 1, limit=(1 << 64) - 1)
    assert sentence == f"command 65535 with flags {told} is not allowed here"
