"""`python -m tests.docs.pictures`: docs/images, taken of real servers.

A terminal is tmux, drawn as SVG by rich; the status page is a headless Chromium's own picture. folding.svg beside them
is drawn by hand.
"""

from __future__ import annotations

import io
import random
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.docs.pages import ROOT
from tests.support import images
from tests.support.browser import Browser
from tests.support.nbd_client import PIECE
from tests.support.programs import require_program
from tests.support.server import Nbdzram

IMAGES = ROOT / "docs" / "images"
MIB = 1 << 20
PATIENCE_SECONDS = 120
CHANGED_BYTES = 16 * MIB
HISTORY_SECONDS = 75  # of traffic, so that charts have something to show
_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


class Screen:
    """One tmux server with one window."""

    def __init__(self, directory: Path, server: Nbdzram, *, columns: int, lines: int) -> None:
        self._columns = columns
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
                str(columns),
                "-y",
                str(lines),
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
        console = Console(record=True, width=self._columns, file=io.StringIO(), force_terminal=True)
        console.print(Text.from_ansi(self.look("-e").rstrip("\n").removesuffix("\n$")))
        drawn = console.export_svg(title=title)
        (IMAGES / name).write_text(_FONT_FACE.sub("", drawn), encoding="utf-8")

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=True)


def make_image(directory: Path) -> bytes:
    """An ext4 file system that holds this Python's library."""
    tree = images.python_tree(directory / "tree")
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    return images.ext4_image(directory / "disk.img", tree, (size * 5 // 4 // MIB + 16) * MIB).read_bytes()


def fill(server: Nbdzram, names: list[str], image: bytes) -> None:
    for name in names:
        with server.client(name) as client:
            client.write_all(image[offset : offset + PIECE] for offset in range(0, len(image), PIECE))


def take_commands(directory: Path, image: bytes) -> None:
    """What a person types after the same image went to three disks."""
    exports = dict.fromkeys(["vm1", "vm2", "vm3"], len(image))
    with Nbdzram(directory, exports, arguments=("--mem-limit", "256M")) as server:
        fill(server, list(exports), image)
        screen = Screen(directory, server, columns=112, lines=40)
        try:
            for command in ("stat", "fold", "compact", "stat --memory"):
                screen.run(f"nbdzram {command}")
            screen.save("terminal.svg", "fold, compact, and where the memory is")
        finally:
            screen.close()


@contextmanager
def traffic(server: Nbdzram, loads: dict[str, int], image: bytes) -> Iterator[None]:
    """Clients that read and write on some exports, each with so many milliseconds between two requests, on average."""
    ended = threading.Event()

    def use(name: str, pause_ms: int) -> None:
        chance = random.Random(name)
        with server.client(name) as client:
            while not ended.wait(chance.expovariate(1000 / pause_ms)):
                length = chance.choice((4096, 4096, 4096, 16384, 65536))
                offset = chance.randrange(0, len(image) - length, 4096)
                if chance.random() < 0.3:  # machines of one image change a part of it
                    client.write(offset % CHANGED_BYTES, image[offset : offset + length])
                else:
                    client.read(offset, length)

    threads = [threading.Thread(target=use, args=load) for load in loads.items()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def take_views(directory: Path, image: bytes) -> None:
    """`nbdzram top` and the status page of one server that is being used."""
    exports = {"web-1": "20G", "web-2": "20G", "build": "40G", "scratch": "8G"}
    server = Nbdzram(directory, exports, arguments=("--mem-limit", "256M"), metrics=True)
    with server, Browser(directory / "browser") as browser:
        fill(server, ["web-1", "web-2", "build"], image)
        server.command_line("snapshot", "web-1", "web-golden")
        server.command_line("recompress", "--idle", "0", "--huge-only")
        server.fold()
        server.compact()
        fill(server, ["scratch"], image[: len(image) // 2])
        screen = Screen(directory, server, columns=80, lines=24)
        try:
            with traffic(server, {"web-1": 1, "web-2": 2, "build": 2, "scratch": 20}, image):
                screen.enter("nbdzram top")
                browser.open(server.metrics_url.removesuffix("metrics"), width=1240)
                time.sleep(HISTORY_SECONDS)
                screen.save("top.svg", "nbdzram top")
                browser.screenshot(IMAGES / "status-page.png")
            screen.enter("q")
        finally:
            screen.close()


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nbdzram-pictures-") as name:
        image = make_image(Path(name))
        for take in (take_commands, take_views):
            place = Path(name) / take.__name__
            (place / "browser").mkdir(parents=True)
            take(place, image)
    for picture in sorted(IMAGES.iterdir()):
        print(f"{picture.relative_to(ROOT)}  {picture.stat().st_size} bytes")


if __name__ == "__main__":
    main()
