"""The status page as it is sent, before any script of it has run."""

from __future__ import annotations

from html.parser import HTMLParser

from nbdzram.metrics.page import load_page

VOID = {"input", "link", "meta"}


class Shown(HTMLParser):
    """The text that a browser without scripts shows, and where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.links: list[str | None] = []
        self._within: list[bool] = []  # whether what is within each element that is open is shown

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        hidden = tag in {"script", "style", "title"} or "hidden" in given
        if tag not in VOID:
            self._within.append(not hidden and all(self._within))
        if tag == "a":
            self.links.append(given.get("href"))

    def handle_endtag(self, _: str) -> None:
        self._within.pop()

    def handle_data(self, content: str) -> None:
        if all(self._within):
            self.text.append(content)


def test_a_browser_without_scripts_is_told_where_the_figures_are_and_shows_nothing_that_stays_empty() -> None:
    page = Shown()
    page.feed(load_page()[0].decode())
    shown = " ".join(" ".join(page.text).split())
    assert "asks the server by JavaScript, which this browser does not run" in shown
    assert {"metrics", "status.json"} <= set(page.links)
    for never_filled in ("connecting", "Traffic", "Memory", "Exports", "Maintenance"):
        assert never_filled not in shown
