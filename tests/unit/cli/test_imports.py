"""What a call of the command line imports and makes before it does anything: most of what it takes."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_the_serving_process_carries_neither_rich_nor_a_client_command() -> None:
    code = """
import sys
from nbdzram.cli.main import run
assert run(["serve", "-e", "disk=1M", "--check-config"]) == 0
import nbdzram.control.server, nbdzram.metrics.http, nbdzram.server.service
unwanted = {"rich", "nbdzram.cli.common"}
print(sorted(name for name in sys.modules if name in unwanted or name.startswith("nbdzram.cli.")))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    ours = ["announce", "going_on", "hints", "loading", "main", "numbers", "onlookers", "perils", "processes", "serve"]
    ours += ["shown", "stops", "supervisor", "terminals", "usage"]
    assert out.splitlines()[-1] == str([f"nbdzram.cli.{name}" for name in ours])


UNNEEDED = {
    *("asyncio", "concurrent.futures", "decimal", "fractions", "h11", "multiprocessing", "prometheus_client", "rich"),
    *("_ssl", "selectors", "signal", "socket", "ssl", "subprocess", "unicodedata", "uvloop"),
    *(f"nbdzram.{name}" for name in ("config", "engine.pool", "machine", "nbd", "server", "sessions", "settings")),
    *(f"nbdzram.{name}" for name in ("cli.objects", "rates", "status.server", "stream", "values")),
}
"""Of a command that asks a server and prints a table: reading sizes and configurations, JSON, a loop are for others.
What Python makes around a socket and signals takes longer than all records of a table."""


@pytest.mark.parametrize(
    "words",
    [
        *("ls", "stat", "exports list", "exports change disk --read-only", "pools list", "pools dedup default inline"),
        *("pools verify default off", "clients list", "runs list", "fold", "compact", "recompress", "reload"),
        *("snapshot disk monday", "clone disk copy", "rm --yes disk", "receive"),
    ],
)
def test_a_command_that_asks_a_server_imports_little(words: str) -> None:
    """A call takes as long as its imports."""
    code = f"""
import sys
from nbdzram.cli.main import run
assert run([*{words.split()!r}, "--control", "/nowhere/nbdzram.sock"]) == 3
print(sorted(sys.modules.keys() & {UNNEEDED!r}))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ("ls", "exports"),
        ("exports change disk --read-only", "exports"),
        ("pools list", "pools"),
        ("stat", "exports holdings pools"),
        ("stat --watch 1 -o NAME,THROTTLED", "exports holdings pools"),
        ("stat --raw --output NAME,DATA --json", "exports holdings pools"),
        ("clients list", "clients"),
        ("runs", "runs"),
        ("streams", "streams"),
        ("health", "brief"),
        ("fold", "maintenance pools runs"),
    ],
)
def test_a_command_makes_the_classes_of_what_it_prints(words: str, files: str) -> None:
    """There are some thirty, of half a millisecond each."""
    code = f"""
import sys
from nbdzram.cli.main import run
assert run([*{words.split()!r}, "--control", "/nowhere/nbdzram.sock"]) == 3
print(*sorted(name.removeprefix("nbdzram.status.") for name in sys.modules if name.startswith("nbdzram.status.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(["encoding", *files.split()])


def test_imports_make_no_garbage_and_commands_may() -> None:
    """Nothing is looked for while modules are imported, nor at the end; a server that runs for months looks for it."""
    code = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count() > 0))
sys.argv = ["nbdzram", "version"]
from nbdzram import __main__
import nbdzram.cli.main
nbdzram.cli.main.run = lambda words, first: print(gc.isenabled()) or real(words)
real = lambda words: nbdzram.cli.main.front.get_command(None, "version") and print(gc.isenabled())
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True", "True"]
