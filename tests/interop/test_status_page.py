"""The status page in a real Chromium: what a person sees of a server that is being used."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser
from tests.support.nbd_client import RequestFailed
from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop

BLOCK = bytes(range(256)) * 16
HOSTILE_NAME = "<img src=x onerror=document.title='owned'>"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    directory = tmp_path / "browser"
    directory.mkdir()
    with Browser(directory) as one:
        yield one


def page_of(server: Nbdzram) -> str:
    return server.metrics_url.removesuffix("metrics")


def test_the_page_shows_pools_exports_and_runs_live(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "64M", "swap": "32M"}, arguments=("--mem-limit", "16M"), metrics=True)
    with server.client("disk") as client:
        for number in range(16):
            client.write(number * 4096, number.to_bytes(8, "little") + BLOCK[8:])
            client.write((32 + number) * 4096, number.to_bytes(8, "little") + BLOCK[8:])
        browser.open(page_of(server))
        browser.wait_for("document.querySelectorAll('#exports tbody tr').length === 2")
        text = browser.evaluate("document.body.innerText")
        for told in (
            "serving",
            "128 KiB",
            "of 96 MiB offered",
            "limit of 16 MiB",
            "compressed objects",
            "2 disks offered",
        ):
            assert told in text, told
        server.fold()
        browser.wait_for("document.getElementById('runs').innerText.includes('objects merged 16')")
        browser.wait_for("document.getElementById('pools').innerText.includes('kept out by folding')")
        # A write that happens while the page is open is told as traffic, without reloading.
        client.write(0, BLOCK * 16)
        browser.wait_for("document.querySelectorAll('#charts svg path[d^=M]').length > 0")
        browser.wait_for("document.querySelector('#charts .axis').innerText.includes('peak')")
    assert browser.complaints == []


def test_a_name_that_is_markup_is_shown_as_text(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "1M"}, metrics=True)
    server.command_line("exports", "add", HOSTILE_NAME, "1M")
    browser.open(page_of(server))
    browser.wait_for("document.querySelectorAll('#exports tbody tr').length === 2")
    assert HOSTILE_NAME in browser.evaluate("document.getElementById('exports').innerText")
    assert browser.evaluate("document.title") == "nbdzram"


def test_markup_that_slipped_in_would_not_run(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "1M"}, metrics=True)
    browser.open(page_of(server))
    browser.wait_for("document.querySelectorAll('#exports tbody tr').length === 1")
    refused = browser.evaluate(
        """new Promise(done => {
            document.addEventListener("securitypolicyviolation", event => done(event.effectiveDirective));
            document.body.append(Object.assign(document.createElement("script"), {text: "document.title = 'owned'"}));
            if (document.title !== "nbdzram") done("nothing");
        })"""
    )
    assert refused == "script-src-elem"
    assert browser.evaluate("document.title") == "nbdzram"


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_thirty_exports_fit_the_window(
    serve: Callable[..., Nbdzram], browser: Browser, width: int, dark: bool, tmp_path: Path
) -> None:
    server = serve({f"machine-{number:02}": "64M" for number in range(30)}, metrics=True)
    browser.open(page_of(server), width=width, dark=dark)
    browser.wait_for("document.querySelectorAll('#exports tbody tr').length === 30")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 18, 22)" if dark else "rgb(245, 246, 248)")
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[1:4] == b"PNG"


def test_the_page_says_when_the_server_is_gone(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "1M"}, metrics=True)
    browser.open(page_of(server))
    browser.wait_for("document.getElementById('state').innerText === 'serving'")
    server.stop()
    browser.wait_for("document.getElementById('state').innerText === 'no answer'")
    assert re.fullmatch(r"what stands here is \d+ s old", browser.evaluate("document.getElementById('age').innerText"))


def test_a_full_pool_is_seen_at_once(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "64M"}, arguments=("--mem-limit", "1M"), metrics=True)
    browser.open(page_of(server))
    browser.wait_for("document.getElementById('pools').innerText.includes('0 % of the limit')")
    assert browser.evaluate("document.querySelectorAll('#pools .bad').length") == 0
    with server.client("disk") as client:
        for number in range(256):
            client.write(number * 4096, random.Random(number).randbytes(4096))
        with pytest.raises(RequestFailed):
            client.write(1 << 20, random.Random(256).randbytes(4096))
    browser.wait_for("document.querySelectorAll('#pools .bad').length === 2")
    shown = browser.evaluate("[...document.querySelectorAll('#pools .bad')].map(one => one.innerText)")
    assert shown == ["100 % of the limit of 1 MiB", "refused at the limit1 write"]
