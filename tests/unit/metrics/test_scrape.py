"""What is scraped of a server in which no figure is another one's, figure by figure: scrape.txt has it.

python -m tests.unit.metrics.test_scrape        writes it anew, after a change that is meant
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

from nbdzram.metrics.answers import Answers
from tests.unit.metrics.stage import Show
from tests.unit.records import TWO_OF_EACH

SCRAPE = Path(__file__).with_name("scrape.txt")


async def scraped() -> list[str]:
    """Without the comments, which the reference has, and what is of this process."""
    answers = Answers(Show(lambda: TWO_OF_EACH))
    metrics, status = [(await answers.answer(path)).body.decode() for path in ("/metrics", "/status.json")]
    lines = [line for line in metrics.splitlines() if line.startswith("nbdzram_") and "nbdzram_build" not in line]
    told = json.loads(status)
    del told["resident_bytes"]
    return [*lines, *paths(told, "")]


def paths(value: object, path: str) -> Iterator[str]:
    """Each figure of a JSON text, a line each."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from paths(one, f"{path}.{name}")
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from paths(one, f"{path}[{index}]")
    else:
        yield f"{path} {json.dumps(value)}"


def test_each_figure_stands_where_it_is_looked_for() -> None:
    assert asyncio.run(scraped()) == SCRAPE.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    SCRAPE.write_text("\n".join(asyncio.run(scraped())) + "\n", encoding="utf-8")
