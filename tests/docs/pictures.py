"""`python -m tests.docs.pictures`: docs/images, taken of a real server in a terminal (tmux), drawn as SVG by rich."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.docs.pages import ROOT
from tests.support import images
from tests.support.nbd_client import PIECE
from tests.support.programs import require_program
from tests.support.server import Nbdzram

IMAGES = ROOT / "docs" / "images"
MIB = 1 << 20
COLUMNS = 112
LINES = 40
PATIENCE_SECONDS = 120
_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


class Screen:
    """One tmux server with one window."""

    def __init__(self, directory: Path, server: Nbdzram) -> None:
        self._tmux = [require_program("tmux", package="tmux"), "-S", str(directory / "tmux"), "-f", "/dev/null"]
        environment = server.environment() | {
            "LC_ALL": "C.UTF-8",
            "TERM": "xterm-256color",
            "NBDZRAM_CONTROL": str(server.control),
        }
        subprocess.run(
            [
                *self._tmux,
                "-u",
                "new-session",
                "-d",
                "-x",
                str(COLUMNS),
                "-y",
                str(LINES),
                "bash --norc --noprofile",
            ],
            check=True,
            env=environment,
        )
        self.enter(f"PS1='$ '; nbdzram() {{ {shlex.quote(sys.executable)} -m nbdzram \"$@\"; }}; clear")
        self.wait_until(lambda text: text.strip() == "$")

    def enter(self, line: str) -> None:
        subprocess.run([*self._tmux, "send-keys", "-l", line], check=True)
        subprocess.run([*self._tmux, "send-keys", "Enter"], check=True)

    def look(self, *options: str) -> str:
        shot = [*self._tmux, "capture-pane", "-p", *options]
        return subprocess.run(shot, capture_output=True, text=True, check=True).stdout

    def run(self, line: str) -> None:
        """Type a command, and wait for the next prompt."""
        prompts = self.look().count("$")
        self.enter(line)
        self.wait_until(lambda text: text.count("$") > prompts)

    def wait_until(self, done: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not done(text := self.look()):
            assert time.monotonic() < deadline, f"still:\n{text}"

    def save(self, name: str, title: str) -> None:
        """Draw what stands on the screen, without fonts from elsewhere."""
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        console.print(Text.from_ansi(self.look("-e").rstrip("\n").removesuffix("\n$")))
        drawn = console.export_svg(title=title)
        (IMAGES / name).write_text(_FONT_FACE.sub("", drawn), encoding="utf-8")

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=True)


def fill(server: Nbdzram, names: list[str], image: bytes) -> None:
    for name in names:
        with server.client(name) as client:
            client.write_all(image[offset : offset + PIECE] for offset in range(0, len(image), PIECE))


def take(directory: Path) -> None:
    tree = images.python_tree(directory / "tree")
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    image = images.ext4_image(directory / "disk.img", tree, (size * 5 // 4 // MIB + 16) * MIB).read_bytes()
    exports = dict.fromkeys(["vm1", "vm2", "vm3"], len(image))
    with Nbdzram(directory, exports, arguments=("--mem-limit", "256M")) as server:
        fill(server, list(exports), image)
        screen = Screen(directory, server)
        try:
            for command in ("stat", "fold", "compact", "stat --memory"):
                screen.run(f"nbdzram {command}")
            screen.save("fold.svg", "fold, compact, and where the memory is")
        finally:
            screen.close()


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nbdzram-pictures-") as name:
        take(Path(name))
    for picture in sorted(IMAGES.iterdir()):
        print(f"{picture.relative_to(ROOT)}  {picture.stat().st_size} bytes")
