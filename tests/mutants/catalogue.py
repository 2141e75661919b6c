"""The catalogue: a TOML file an area, an entry a mistake.

[[mutant]]
name = "a-partial-write-takes-no-stripe"     unique; what is wrong with the code once it is applied
file = "nbdzram/engine/disk.pyx"
old = '''...'''                              occurs exactly once in the file
new = '''...'''                              what the hurried engineer wrote instead
tests = ["tests/model/test_threads.py"]      pytest arguments: one of these must fail; quick ones
survives = "..."                             only where no test can find it: the reason
"""

from __future__ import annotations

import datetime
import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CATALOGUE = Path(__file__).parent
KEYS = {"name", "file", "old", "new", "tests"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake, and the tests that are to find it."""

    name: str
    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""

    def applied_to(self, text: str) -> str:
        """The file's text with the mistake in it. Raises ValueError when its place is not exactly one."""
        places = text.count(self.old)
        if places != 1:
            raise ValueError(f"mutant {self.name}: its text occurs {places} times in {self.file}; it must be once")
        return text.replace(self.old, self.new)


def read(directory: Path = CATALOGUE) -> list[Mutant]:
    """All entries, in the order of files and lines. Raises ValueError for one that cannot be used."""
    found: list[Mutant] = []
    for path in sorted(directory.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            missing, unknown = KEYS - entry.keys(), entry.keys() - KEYS - {"survives"}
            if missing or unknown:
                raise ValueError(f"{path.name}: {entry.get('name')}: missing {missing}, unknown {unknown}")
            found.append(Mutant(area=path.stem, **{**entry, "tests": tuple(entry["tests"])}))
    return found


def draw(mutants: list[Mutant], part: int, day: datetime.date) -> list[Mutant]:
    """One in `part` of them, other ones every day, and the same ones all day long."""
    return random.Random(day.isoformat()).sample(mutants, -(-len(mutants) // part))
