"""What each thing that is to outlive a power cut asks of the disk, call by call, and what is left where one is refused:
asked_of_the_disk.txt.

python -m tests.unit.server.test_asked_of_the_disk        writes it anew, after a change that is meant
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdzram.errors import UserError
from nbdzram.server import segments
from nbdzram.server.chains import name_of, segment_name
from nbdzram.server.checkpoints import _durable
from nbdzram.server.segments import SPARE, begin_segment, forget_journal, retire_segments, write_again
from nbdzram.server.state import Noted, State, note_in
from nbdzram.stream.journal import MAGIC

ASKED = Path(__file__).with_name("asked_of_the_disk.txt")
ROOM = 8192
OF_DESCRIPTORS = ("fsync", "fdatasync", "close", "posix_fallocate", "pwrite", "write")
OF_PATHS = ("open", "rename", "replace", "unlink")

Act = Callable[[Path], object]


def begin(directory: Path) -> None:
    begin_segment(directory, 7, bytes(16)).close()


def again(directory: Path) -> None:
    path = directory / segment_name(7)
    write_again(path, path.stat().st_size)


def checkpoint(directory: Path) -> None:
    with _durable(directory / name_of(3, None)) as descriptor:
        os.write(descriptor, b"a stream")


def cut_off(directory: Path) -> None:
    with _durable(directory / name_of(3, None)) as descriptor:
        os.write(descriptor, b"half a stream")
        raise UserError("the server ends")


def journals(*numbers: int) -> Act:
    def make(directory: Path) -> None:
        for number in numbers:
            begin_segment(directory, number, bytes(16)).close()

    return make


def spare(directory: Path) -> None:
    (directory / SPARE).write_bytes(MAGIC.ljust(ROOM, b"\0"))


def of_others(directory: Path) -> None:
    """A file of that name which was no segment."""
    (directory / SPARE).write_bytes(bytes(ROOM))


def head_alone(directory: Path) -> None:
    """A segment without a group, and without the room for one."""
    file = begin_segment(directory, 7, bytes(16))
    os.truncate(file.path, file.end)
    file.close()


def nothing(directory: Path) -> None:
    del directory


ACTS: dict[str, tuple[Act, Act]] = {  # what was there before, and what is done
    "a journal begins": (nothing, begin),
    "a journal begins in what was another": (spare, begin),
    "a journal begins beside another's file of that name": (of_others, begin),
    "a journal is written again": (head_alone, again),
    "a journal is not needed any more": (journals(1, 2), lambda directory: retire_segments(directory, [1, 2, 5])),
    "a journal goes": (journals(1, 2, 3), lambda directory: forget_journal(directory, 3)),
    "there is no journal to go": (nothing, lambda directory: forget_journal(directory, 3)),
    "a checkpoint": (nothing, checkpoint),
    "a checkpoint that is cut off": (nothing, cut_off),
    "a change is remembered": (nothing, lambda directory: State(directory).remember_kept_in("here", "")),
    "another is remembered": (
        lambda directory: State(directory).remember_kept_in("here", ""),
        lambda directory: State(directory).remember_kept_in("there", ""),
    ),
    "it is noted beside checkpoints": (nothing, lambda directory: note_in(directory, Noted())),
}


class Disk:
    """Stands between an act and the system: writes down what is asked, and refuses one thing."""

    def __init__(self, directory: Path, refused: int | None) -> None:
        self.asked: list[str] = []
        self._directory = directory
        self._refused = refused

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "ROOM_BYTES", ROOM)
            for call in (*OF_DESCRIPTORS, *OF_PATHS):
                patch.setattr(os, call, self._instead(call, getattr(os, call)))
            yield

    def _instead(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*given: Any, **named: Any) -> Any:
            what = given[:2] if call in ("rename", "replace") else given[:1]
            try:
                paths = [Path(f"/proc/self/fd/{one}").readlink() if isinstance(one, int) else Path(one) for one in what]
            except OSError:
                return real(*given, **named)
            if not paths[0].is_relative_to(self._directory):
                return real(*given, **named)
            named_so = ["." if path == self._directory else path.name for path in paths]
            self.asked.append(f"{call} {' '.join(named_so)}")
            if call != "close" and len(self.asked) - 1 == self._refused:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*given, **named)

        return ask


def open_in(directory: Path) -> int:
    """Descriptors of it, and of what is there or was: others of this process come and go."""
    count = 0
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names, which may be gone by the time that they are read
        with contextlib.suppress(OSError):
            count += Path(f"/proc/self/fd/{number}").readlink().is_relative_to(directory)
    return count


def played(before: Act, act: Act, refused: int | None) -> tuple[list[str], str]:
    """What was asked, and what came of it."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place).resolve()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "ROOM_BYTES", ROOM)
            before(directory)
        disk = Disk(directory, refused)
        outcome = "done"
        with disk.between():
            try:
                act(directory)
            except (OSError, UserError) as error:
                outcome = f"{type(error).__name__} {str(error).replace(place, '.')}"
        left = " ".join(f"{path.name} {path.stat().st_size}" for path in sorted(directory.iterdir()))
        leaked = open_in(directory)
        return disk.asked, f"{outcome}; there is {left or 'nothing'}{f'; {leaked} open' * (leaked != 0)}"


def lines() -> Iterator[str]:
    for name, (before, act) in ACTS.items():
        asked, outcome = played(before, act, None)
        yield f"{name}: {', '.join(asked) or 'nothing'}: {outcome}"
        for number, call in enumerate(asked):
            if not call.startswith("close"):
                yield f"{name}, refused {call}: {played(before, act, number)[1]}"


def test_each_call_of_what_outlives_a_power_cut_is_in_its_place_and_leaves_what_it_says() -> None:
    assert list(lines()) == ASKED.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    ASKED.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
