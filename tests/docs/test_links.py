"""Whatever a page refers to inside this repository is there, and no page says anything twice."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, anchors, links, pages, without_examples

OUTSIDE = ("https://", "http://", "mailto:")
LONG_LINE = 70  # characters
PAGE_NAMED = re.compile(r"docs/[\w/-]+\.md")


def dead_links(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [target for target in links(text) if not target.startswith(OUTSIDE) and not _leads_somewhere(page, target)]


def _leads_somewhere(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    if not file.exists():
        return False
    return not anchor or anchor in anchors(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """A page names only files, pictures and headings that exist."""
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    """A missing file and a missing heading are told apart from good ones."""
    page = tmp_path / "page.md"
    page.write_text("# A heading, here\n[a](gone.md) [b](#a-heading-here) [c](#gone) [d](page.md) `[e](code)`\n")
    assert dead_links(page) == ["gone.md", "#gone"]


def test_every_page_is_in_the_index() -> None:
    """docs/README.md leads to each page below docs/."""
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / target).resolve() for target in links(index.read_text(encoding="utf-8"))}
    below = {page for page in pages() if page.is_relative_to(index.parent) and page != index}
    assert sorted(str(page.relative_to(ROOT)) for page in below - listed) == []


def test_every_page_that_the_code_names_is_there() -> None:
    """A decision that was renamed leaves no comment behind that leads nowhere."""
    sources = [path for kind in ("*.py", "*.pyx", "*.pxd") for path in ROOT.glob(f"nbdzram/**/{kind}")]
    named = {(path.name, page) for path in sources for page in PAGE_NAMED.findall(path.read_text(encoding="utf-8"))}
    assert named, "some do name one"
    assert [(source, page) for source, page in sorted(named) if not (ROOT / page).exists()] == []


def said_twice(text: str) -> list[str]:
    """Long lines that a page has twice outside its examples, as where two versions of a part were joined to both."""
    lines = Counter(line for line in without_examples(text).splitlines() if len(line) > LONG_LINE)
    return [line for line, count in lines.items() if count > 1]


@pytest.mark.parametrize(
    "page", [page for page in pages() if page.parent.name != "reference"], ids=lambda page: page.name
)
def test_no_page_says_the_same_twice(page: Path) -> None:
    assert said_twice(page.read_text(encoding="utf-8")) == []


def test_what_is_said_twice_is_found() -> None:
    line = "One line that is long enough to be found where it is twice, as no sentence is by chance."
    assert said_twice(f"{line}\n\n```console\n{line}\n```\n") == []
    assert said_twice(f"{line}\nand\n{line}\n") == [line]
