"""The floor (floor.c): a server that copies plain memory and does nothing else, as a yardstick."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.programs import require_program
from tests.support.server import ServerProcess


class Floor(ServerProcess):
    """floor.c, compiled here and now; on a machine without a compiler as tools/bundle compiled it."""

    def __init__(self, directory: Path, size: int) -> None:
        program = directory / "floor"
        source = Path(__file__).with_name("floor.c")
        compiled = Path(__file__).parents[2] / "bin" / "floor"
        if compiled.exists():
            program = compiled
        else:
            compiler = require_program("gcc", package="gcc")
            subprocess.run([compiler, "-O3", "-pthread", "-o", program, source], check=True)
        socket = directory / "nbd.sock"
        threads = len(os.sched_getaffinity(0))
        super().__init__([program, socket, str(size), str(threads)], directory=directory, unix_path=socket, port=None)
