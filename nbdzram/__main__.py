"""`nbdzram` and `python -m nbdzram`.

SIGINT, Ctrl-C, ends the process as the system does while modules are loaded, and at the end: nothing is to be cleared
away, and unwound imports are a traceback. While a command runs it is a KeyboardInterrupt (cli/main). Who starts the
process with the signal ignored keeps it so.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` imports takes a tenth of a short command's time

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import gc
import io
import os
import sys

from nbdzram.precedence import WORDS, go_first


def main() -> None:
    """Run the command line and exit with its code."""
    first = None if WORDS.isdisjoint(sys.argv) else go_first()  # before anything else needs memory
    gc.disable()  # imports make much and no garbage: looking for it takes a tenth of a short command's time
    sys.unraisablehook = _see_unraisable
    _open_standard_streams()
    from nbdzram.cli.main import INTERRUPTED, run  # noqa: PLC0415

    try:
        code = run(sys.argv[1:], first)
        if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
            _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    except KeyboardInterrupt:  # the second one, or between the two
        code = INTERRUPTED
    gc.freeze()  # nor does the end look for it: another tenth
    sys.exit(code)


def _see_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Python prints what is raised where nothing can be, and goes on: in callbacks of imports that a command makes, and
    wherever an object ends. No Ctrl-C is lost there."""
    if unraisable.exc_type is KeyboardInterrupt:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
        os.kill(os.getpid(), _signal.SIGINT)
    sys.__unraisablehook__(unraisable)


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
