"""Search for bytes that break a target: python -m tests.fuzz TARGET CORPUS... [-runs=N] [libFuzzer's flags].

Coverage-guided by atheris. An input that breaks something is left in the directory as crash-*, and is played again by
naming it instead of a corpus.
"""

from __future__ import annotations

import logging
import sys

import atheris

SEEN = ["nbdzram.nbd", "nbdzram.server.status", "tests.fuzz.arenas", "tests.fuzz.targets", "tests.model"]

with atheris.instrument_imports(include=SEEN):
    from tests.fuzz import arenas, targets

TARGETS = {"haggle": targets.haggle, "transmit": targets.transmit, "forge": arenas.forge}


def main() -> None:
    name, *rest = sys.argv[1:]
    logging.disable(logging.CRITICAL)  # nobody reads what thousands of broken clients a second do wrong
    atheris.Setup([sys.argv[0], *rest], TARGETS[name])
    atheris.Fuzz()


main()
