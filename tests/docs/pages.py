"""Markdown as the tests of the documentation read it: fenced blocks, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<content>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_NOT_IN_ANCHORS = re.compile(r"[^\w\- ]")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, and its lines."""

    language: str
    content: str


def pages() -> list[Path]:
    """Every page that a reader may open."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")]
    return sorted(found)


def blocks(text: str) -> Iterator[Block]:
    for match in _FENCE.finditer(text):
        yield Block(match["language"], match["content"])


def without_examples(text: str) -> str:
    """What is no fenced block."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of links and pictures, those in code left out."""
    prose = re.sub(r"`[^`\n]*`", "", without_examples(text))
    return [match["target"] for match in _LINK.finditer(prose)]


def anchors(text: str) -> set[str]:
    """What `#...` may name: headings in lower case, blanks as hyphens, without punctuation."""
    return {
        _NOT_IN_ANCHORS.sub("", heading.replace("`", "").lower()).replace(" ", "-")
        for heading in _HEADING.findall(without_examples(text))
    }
