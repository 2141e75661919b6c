"""`nbdzram` and `python -m nbdzram`."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports is no traceback
    gc.disable()  # imports make much and no garbage: looking for it takes a tenth of a short command's time
    _open_standard_streams()
    from nbdzram.cli.main import run  # noqa: PLC0415

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run(sys.argv[1:])
    gc.freeze()  # nor does the end look for it: another tenth
    sys.exit(code)


def _open_standard_streams() -> None:
    """Give the numbers 0 to 2 to /dev/null where they are closed: a disk's socket must not become standard output.

    What is printed to a closed one is an error, as it is for other tools; a log that nobody wants is none. What a
    terminal's encoding lacks, in an export's name or a path, is written as its number: it is no error either.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_RDWR)):  # a closed standard output takes nothing
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free: this one
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # Python leaves out what was closed when it started
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's may be of another kind
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
