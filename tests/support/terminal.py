"""A real terminal for commands that behave differently in one: tmux, driven from outside."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.programs import require_program

SECONDS = 30


class Terminal:
    """One tmux server of our own with one window, in which a shell runs a command and then tells its exit code."""

    def __init__(
        self, directory: Path, command: Sequence[str], environment: Mapping[str, str], *, width: int = 80
    ) -> None:
        self._tmux = [require_program("tmux", package="tmux"), "-S", str(directory / "tmux"), "-f", "/dev/null"]
        line = f"{shlex.join(command)}; echo ended with $?; exec cat"
        told = dict(environment) | {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
        subprocess.run(
            [*self._tmux, "-u", "new-session", "-d", "-x", str(width), "-y", "24", line], check=True, env=told
        )

    def text(self) -> str:
        """What is on the screen, lines that the terminal wrapped joined."""
        shot = [*self._tmux, "capture-pane", "-p", "-J"]
        return subprocess.run(shot, capture_output=True, text=True, check=True).stdout

    def press(self, *keys: str) -> None:
        """As tmux names keys: q, C-c, Enter."""
        subprocess.run([*self._tmux, "send-keys", *keys], check=True)

    def wait_for(self, told: str) -> None:
        """Until that is on the screen."""
        deadline = time.monotonic() + SECONDS
        while told not in (text := self.text()):
            assert time.monotonic() < deadline, f"no {told!r} within {SECONDS} s in:\n{text}"

    def close(self) -> None:
        """End the shell, and tmux with it."""
        subprocess.run([*self._tmux, "kill-server"], check=True)
