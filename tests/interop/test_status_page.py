"""The status page in a real Chromium: what a person sees of a server that is being used."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.interop.test_runs import LONG, begin, states, wait_until
from tests.support.browser import Browser
from tests.support.nbd_client import Client, RequestFailed
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


@pytest.mark.parametrize(("width", "shown"), [(1280, False), (390, True)])
def test_a_run_names_its_pool_on_a_phone_too(
    serve: Callable[..., Nbdzram], browser: Browser, width: int, shown: bool
) -> None:
    """Where the column of pools has no room it stands behind the run's name."""
    server = serve({"disk": "1M"}, metrics=True)
    server.fold()
    browser.open(page_of(server), width=width)
    browser.wait_for("document.querySelectorAll('#runs tbody tr').length === 1")
    told = browser.evaluate("document.querySelector('#runs tbody tr').innerText.split(/\\s+/).slice(0, 2)")
    assert told == ["fold", "default"]
    cells = browser.evaluate("document.querySelector('#runs td.name').innerText")
    assert (cells == "fold default") is shown


def test_on_a_phone_nothing_of_an_exports_own_view_is_cut_off(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "64M", "other": "64M"}, metrics=True)
    with server.client("other") as other, server.client("disk") as client:
        for number in range(4000):  # "1.00k objects are shared" is the longest line of its tile
            block = number.to_bytes(8, "little") + BLOCK[8:]
            for each in (client, other) if number < 1000 else (client,):
                each.write(number * 4096, block)
        with pytest.raises(RequestFailed):
            client.read(64 << 20, 4096)
        server.fold()
        browser.open(page_of(server) + "#export=disk", width=390)
        browser.wait_for("document.getElementById('one').innerText.includes('unix client')")
        browser.wait_for("document.getElementById('tiles').innerText.includes('objects are shared')")
        cut = "[...document.querySelectorAll('.scroll, .sub')].filter(node => node.scrollWidth > node.clientWidth)"
        assert browser.evaluate(f"{cut}.map(node => node.innerText)") == []


def test_the_page_says_when_the_server_is_gone(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "1M"}, metrics=True)
    browser.open(page_of(server))
    browser.wait_for("document.getElementById('state').innerText === 'serving'")
    server.stop()
    browser.wait_for("document.getElementById('state').innerText === 'no answer'")
    assert re.fullmatch(r"what stands here is \d+ s old", browser.evaluate("document.getElementById('age').innerText"))


def test_a_full_pool_is_seen_at_once(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "64M"}, arguments=("--mem-limit", "4M"), metrics=True)
    browser.open(page_of(server))
    browser.wait_for("document.getElementById('pools').innerText.includes('0 % of the limit')")
    assert browser.evaluate("document.querySelectorAll('#pools .bad').length") == 0
    with server.client("disk") as client:
        fill(client)
    browser.wait_for("document.querySelectorAll('#pools .bad').length === 2")
    shown = browser.evaluate("[...document.querySelectorAll('#pools .bad')].map(one => one.innerText)")
    # A sixteenth is kept for making room, and figures for strangers are rounded down.
    assert re.fullmatch(r"9[4-9] % of the limit of 4 MiB", shown[0])
    assert shown[1:] == ["refused at the limit1 write"]


def test_a_run_is_told_with_what_is_left_of_it_and_what_waits(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "64M"}, metrics=True)
    rng = random.Random(7)
    with server.client("disk") as client:
        for number in range(0, 2000, 16):
            client.write(number * 4096, b"".join(rng.randbytes(2048) + bytes(2048) for _ in range(16)))
    browser.open(page_of(server))
    asked = []
    try:
        for number, words in enumerate((LONG, ("fold",), ("compact",)), 1):
            asked.append(begin(server, *words))
            wait_until(partial(is_known, server, number))
        browser.wait_for("/then fold, compact$/.test(document.querySelector('#runs .run').innerText)")
        told = browser.evaluate("document.querySelector('#runs .run').innerText")
        assert re.fullmatch(r"recompress of pool default: \d+ %(, [\w ]+ left)?; then fold, compact", told)
        server.command_line("runs", "pause", "1")
        browser.wait_for("document.querySelector('#runs .run').innerText.includes('%, paused; then')")
    finally:
        server.command_line("runs", "cancel", "1", check=False)
        for process in asked:
            process.communicate(timeout=60)
    browser.wait_for("document.querySelectorAll('#runs tbody tr').length === 3")
    runs = browser.evaluate("[...document.querySelectorAll('#runs tbody tr')].map(row => row.innerText)")
    (cancelled,) = (row for row in runs if row.startswith("recompress"))
    assert "cancelled; " in cancelled


def is_known(server: Nbdzram, number: int) -> bool:
    return number in states(server)


def fill(client: Client) -> None:
    """Write blocks that do not compress until one is refused."""
    number = 0
    with pytest.raises(RequestFailed):
        while True:
            client.write(number * 4096, random.Random(number).randbytes(4096))
            number += 1


STATE = "document.getElementById('state').innerText"


def test_a_full_pool_turns_the_header_red_and_says_what_to_do(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "64M"}, arguments=("--mem-limit", "1M"), metrics=True)
    browser.open(page_of(server))
    browser.wait_for(f"{STATE} === 'serving'")
    header = "getComputedStyle(document.querySelector('.top')).backgroundColor"
    plain = browser.evaluate(header)
    with server.client("disk") as client:
        fill(client)
    browser.wait_for(f"{STATE} === 'trouble'")
    assert browser.evaluate(header) != plain
    told = browser.evaluate("document.getElementById('troubles').innerText")
    assert told.startswith("Pool default is full.")
    assert "nbdzram fold" in told
    server.command_line("pools", "limit", "default", "64K")
    browser.wait_for(
        "/^Pool default holds 1[3-5].. times its limit/.test(document.getElementById('troubles').innerText)"
    )
    server.command_line("pools", "limit", "default", "0")
    server.command_line("exports", "add", "other", "1M")
    browser.wait_for("document.getElementById('pools').innerText.includes('no limit')")
    told = browser.evaluate("document.getElementById('troubles').innerText")
    assert told.startswith("Pool default refused writes lately, 1 so far.")
    assert "It is below its limit now." in told


def did(requests: int, size: int, *latency: int) -> dict[str, Any]:
    return {"requests": requests, "bytes": size, "latency_counts": latency}


WHAT_A_DISK_DID: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = [
    ({}, {}, {"read": 0, "write": 0, "ops": 0, "latency": []}),
    (
        {"read": did(4, 40, 3, 1), "trim": did(1, 1 << 30, 1, 0)},
        {"read": did(8, 60, 4, 4), "trim": did(3, 9 << 30, 1, 2), "write": did(2, 10, 0, 2)},
        {"read": 10, "write": 5, "ops": 4, "latency": [1, 5]},
    ),
    ({"read": did(4, 40, 4)}, {"read": did(3, 90, 3)}, None),  # another one of its name: nothing can be told
    ({"read": did(4, 40, 4)}, {"read": did(3, 90, 4)}, None),
    ({"read": did(4, 40, 4), "write": did(4, 40, 4)}, {"read": did(9, 90, 9), "write": did(3, 90, 3)}, None),
    ({"read": did(4, 40, 4), "write": did(4, 40, 4)}, {"read": did(9, 90, 9)}, None),
    ({"read": did(4, 40, 4)}, {"read": did(9, 30, 9)}, None),
    ({"read": did(4, 40, 3, 1)}, {"read": did(9, 90, 9, 0)}, None),
]
"""Before, after, and what is told of the two seconds between; `trim` names ranges, and carries none of it."""


def test_the_page_shows_the_newest_answer_when_a_used_export_is_gone(
    serve: Callable[..., Nbdzram], browser: Browser
) -> None:
    """Totals over all exports fall then, and rates of the others are still known."""
    server = serve({"disk": "1M"}, metrics=True)
    server.command_line("exports", "add", "passing", "64M")
    with server.client("passing") as client:
        for number in range(500):
            client.write(number * 4096, number.to_bytes(8, "little") + BLOCK[8:])
    browser.open(page_of(server))
    browser.wait_for("document.querySelectorAll('#exports tbody tr').length === 2")
    server.command_line("exports", "remove", "passing", "--force")
    server.command_line("exports", "add", "another", "2M")
    with server.client("disk") as client:
        client.write(0, BLOCK)
        browser.wait_for("document.getElementById('exports').innerText.includes('another')")
        assert "passing" not in browser.evaluate("document.getElementById('exports').innerText")
        client.write(0, BLOCK)
        browser.wait_for("rows.find(row => row.name === 'disk').now?.ops > 0")
    browser.wait_for("rows.find(row => row.name === 'another').now?.ops === 0")
    for before, after, told in WHAT_A_DISK_DID:
        figures = [json.dumps({"operations": operations}) for operations in (before, after)]
        found = browser.evaluate(f"JSON.stringify(rate({', '.join(figures)}, 2))")
        assert json.loads(found) == told
    assert browser.complaints == []


def instead_of(path: str, answer: str) -> str:
    """A script that answers one of the page's questions itself."""
    return f"const real = fetch; window.fetch = (path, how) => path === '{path}' ? {answer} : real(path, how);"


def open_with_history(browser: Browser, server: Nbdzram, hours: str) -> None:
    """A page whose server keeps these samples, an expression of the page's language."""
    browser.before_each_page(instead_of("history.json", f"Promise.resolve(new Response(JSON.stringify({hours})))"))
    browser.open(page_of(server))


def test_a_walk_that_takes_long_does_not_hold_the_page_up(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    """What exports cost is asked for by itself: here it never comes."""
    server = serve({"disk": "1M"}, metrics=True)
    browser.before_each_page(instead_of("usage.json", "new Promise(() => {})"))
    browser.open(page_of(server))
    browser.wait_for("Number(document.body.dataset.polls) >= 3")
    assert browser.evaluate(STATE) == "serving"
    assert "what they cost is being counted" in browser.evaluate("document.getElementById('exports-note').innerText")


def test_a_page_that_is_opened_now_shows_what_was(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "1M"}, metrics=True)
    sample = "read_bytes: 1e6, write_bytes: 0, requests: 7, median_seconds: 0, p99_seconds: 0"
    hours = f"Array.from({{length: 700}}, (_, n) => ({{at: Date.now() / 1000 - 7000 + n * 10, {sample}}}))"
    open_with_history(browser, server, hours)
    browser.wait_for("hours.length === 700 && last")
    browser.evaluate("document.querySelector('[data-range=\"2 h\"]').click()")
    browser.wait_for("document.querySelector('#charts .axis').innerText.includes('2 h ago')")
    assert "peak 977 KiB/s" in browser.evaluate("document.querySelector('#charts .axis').innerText")
    # Half a minute in which nobody looked is a gap in the line, and nothing is drawn across it.
    pieces = "unbroken([0, 10, 20, 90, 100].map(at => ({at}))).map(piece => piece.length)"
    assert browser.evaluate(pieces) == [3, 2]
    # A process that took over has it too, and is asked at once and not half a minute later.
    browser.evaluate("take({...last, started_at: last.started_at + 1})")
    browser.wait_for("hours.length === 700", seconds=10)
    # A server whose clock was set back knew of moments that are yet to come.
    browser.evaluate("recent.unshift({...recent[0], at: Date.now() / 1000 + 86400})")
    browser.wait_for("recent[0].at < Date.now() / 1000", seconds=10)


def test_an_export_that_is_chosen_now_shows_what_it_did(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "1M", "a/b": "1M"}, metrics=True)
    sample = "read_bytes: 1e6, write_bytes: 0, requests: 7, median_seconds: 0, p99_seconds: 0"
    hours = f"Array.from({{length: 700}}, (_, n) => ({{at: Date.now() / 1000 - 7000 + n * 10, {sample}}}))"
    answer = f"Promise.resolve(new Response(JSON.stringify({hours})))"
    browser.before_each_page(instead_of("history/a%2Fb", answer))
    browser.open(page_of(server))
    browser.wait_for("last && rows.length === 2")
    browser.evaluate("location.hash = 'export=' + encodeURIComponent('a/b')")
    browser.wait_for("hoursOfChosen.length === 700")
    browser.wait_for("ofChosen.length > 25 && ofChosen[0].at > Date.now() / 1000 - 400")  # the last five minutes
    browser.evaluate("document.querySelector('[data-range=\"2 h\"]').click()")
    axis = "document.querySelector('#charts .axis').innerText"
    browser.wait_for(f"{axis}.includes('2 h ago') && {axis}.includes('peak 977 KiB/s')")
    assert browser.evaluate("document.getElementById('charts-note').innerText") == "of a/b"
    browser.evaluate("location.hash = 'export=disk'")  # another has its own, and nothing of the one before
    browser.wait_for("document.getElementById('charts-note').innerText === 'of disk'")
    assert "peak 977 KiB/s" not in browser.evaluate(axis)


def changed(change: str) -> str:
    """A script that changes the status `x` as the page receives it."""
    then = f"reply.json().then(x => {{ {change}; return new Response(JSON.stringify(x)); }})"
    return instead_of("status.json", f"real(path, how).then(reply => {then})")


EVERY_TROUBLE = """
    x.pools[0].scrub = {...x.pools[0].scrub, rotten_blocks: 3, finished_at: 1};
    const why = "cannot write /var/lib/nbdzram/checkpoints/7.log: no space left on device";
    x.journal = {usable: false, trouble: why, held_back: []};
    x.checkpoint = {moment: x.started_at - 7200, interval_seconds: 60, held_back: []};
    x.certificate_expires_at = 1; x.tls_files_usable = false;
    x.state_dir_size_bytes = 1e9; x.state_dir_free_bytes = 3e6; x.connections = 1023; x.connections_limit = 1024;
    const whose = "the cgroup /sys/fs/cgroup/system.slice/nbdzram_with_a_long_name.service";
    x.headroom = {short: true, free_bytes: 1e7, limit_bytes: 1e9, reserve_bytes: 1, shortages: 1, whose};
    const run = {reason: "interval", finished_at: x.started_at, bytes_freed: 123456789, seconds: 4321, result: {}};
    x.pools[0].maintenance.recent = [{...run, kind: "recompress", state: "failed"}];
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_every_trouble_fits_the_window_and_is_told_exactly(
    serve: Callable[..., Nbdzram], browser: Browser, width: int
) -> None:
    server = serve({"disk": "1M"}, metrics=True)
    browser.before_each_page(changed(EVERY_TROUBLE))
    browser.open(page_of(server), width=width)
    browser.wait_for(f"{STATE} === 'trouble' && document.querySelectorAll('#runs tbody tr').length === 1")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    told = browser.evaluate("[...document.querySelectorAll('#troubles b')].map(node => node.innerText)")
    assert told[:2] == [
        "Blocks of pool default are not what was written: 3.",
        "FLUSH fails: the journal cannot be used.",
    ]
    assert told[2].startswith("The newest checkpoint is 2 h")
    assert told[3].startswith("Memory is short: 9.54 MiB of 954 MiB")
    assert told[4:7] == [
        "The TLS certificate has expired.",
        "The TLS files on disk cannot be used.",
        "1023 connections of 1024 that are allowed.",
    ]
    cut = "[...document.querySelectorAll('.scroll, #runs td')].filter(node => node.scrollWidth > node.clientWidth)"
    assert browser.evaluate(f"{cut}.map(node => node.innerText)") == []
    run = browser.evaluate("document.querySelector('#runs tbody').innerText")
    assert "failed" in run
    assert "1 h 12 min" in run


LACKING = "x.checkpoint = {moment: null, interval_seconds: 9, held_back: ['a']};"
FAILING = "x.journal = {usable: true, trouble: '', held_back: ['a', 'b', 'c', 'd']};"
OLD = "x.started_at -= 119; x.uptime_seconds += 119"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("x.journal = {usable: false, trouble: '', held_back: []}", "FLUSH waits for the first checkpoint."),
        (LACKING, "Checkpoints lack what a holds now."),
        (FAILING, "FLUSH of a, b, c and 1 more fails."),
        (LACKING + FAILING, "FLUSH of a, b, c and 1 more fails."),
        (LACKING.replace("'a'", "") + OLD, "No check"),
        (LACKING.replace("['a']", "[], damaged_files: 1"), "1 file that a start could not use lies beside"),
        ("x.pools[0].stats.blocks_rotten = 4", "Blocks of pool default are not what was written."),
        (
            "x.exports[0].bounds.quota_bytes = x.exports[0].stored_bytes = 4096",
            "Export disk stores as much as the quota",
        ),
        ("x.certificate_expires_at = x.started_at + x.uptime_seconds + 32400", "The TLS certificate ends in "),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    serve: Callable[..., Nbdzram], browser: Browser, change: str, told: str
) -> None:
    server = serve({"disk": "1M"}, metrics=True)
    browser.before_each_page(changed(change))
    browser.open(page_of(server))
    browser.wait_for("document.querySelectorAll('#troubles b').length === 1")
    assert browser.evaluate("document.querySelector('#troubles b').innerText").startswith(told)


def test_a_server_without_a_disk_lacks_no_checkpoint(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    """It was in trouble five intervals and a minute after its start: of nothing no checkpoint is taken."""
    server = serve({"disk": "1M"}, metrics=True)
    browser.before_each_page(changed(LACKING.replace("'a'", "") + OLD + "; x.exports = []"))
    browser.open(page_of(server))
    browser.wait_for(f"{STATE} === 'serving'")
    assert browser.evaluate("document.getElementById('troubles').innerText") == ""


@pytest.mark.parametrize(("state", "told"), [("starting", "lets clients in then"), ("draining", "lets nobody in")])
def test_a_server_that_starts_or_ends_says_what_it_does(
    serve: Callable[..., Nbdzram], browser: Browser, state: str, told: str
) -> None:
    server = serve({"disk": "1M"}, metrics=True)
    browser.before_each_page(changed(f"x.{state} = true; x.exports = []; x.pools[0].stats.mem_limit = 0"))
    browser.open(page_of(server))
    browser.wait_for(f"{STATE} === '{state}'")
    assert told in browser.evaluate("document.getElementById('troubles').innerText")
    nothing = browser.evaluate("document.getElementById('exports').innerText")
    assert ("exports add" in nothing) is (state != "starting")


def test_where_nobody_asked_there_is_no_latency(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    """A line at zero would say that it was good. A sample between two such moments is a dot."""
    server = serve({"disk": "1M"}, metrics=True)
    sample = "read_bytes: 1e6, write_bytes: 0, requests: 1140"
    latency = "median_seconds: n % 4 ? 0.01 : 0, p99_seconds: n === 2 || n % 4 ? 0.02 : 0"
    hours = f"Array.from({{length: 8}}, (_, n) => ({{at: Date.now() / 1000 - 90 + n * 10, {sample}, {latency}}}))"
    open_with_history(browser, server, hours)
    browser.wait_for("recent.length > 8 && document.querySelectorAll('#charts svg').length === 3")
    lines = (
        "[...document.querySelectorAll('#charts svg')].map(svg => svg.querySelectorAll('path[fill=none]').length - 1)"
    )
    throughput, latency, requests = browser.evaluate(lines)
    assert (throughput, latency, requests) == (2, 4, 1)  # of latency two pieces each
    assert browser.evaluate("document.querySelectorAll('#charts .axis')[2].innerText").split("\n")[1] == "peak 1.14k"
    assert browser.evaluate("unbroken([0, 1, 2].map(at => ({at})), point => point.at === 1).length") == 1


def test_requests_that_come_seldom_are_not_told_as_none(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    """Two in ten seconds were a line at the top of a chart with "peak 0"."""
    server = serve({"disk": "1M"}, metrics=True)
    sample = "read_bytes: 1e6, write_bytes: 0, requests: 0.2, median_seconds: 0.01, p99_seconds: 0.02"
    hours = f"[20, 10].map(ago => ({{at: Date.now() / 1000 - 90 - ago, {sample}}}))"
    open_with_history(browser, server, hours)
    browser.wait_for("document.querySelectorAll('#charts .axis')[2].innerText.includes('peak 0.2')")
    told = browser.evaluate("[0, .04, .2, 1, 9.94, 9.96, 1140].map(often)")
    assert told == ["0", "< 0.1", "0.2", "1", "9.9", "10", "1.14k"]


def test_an_exports_own_view_can_be_linked_and_left(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "1M", "a b/ü": "2M"}, metrics=True)
    with server.client("disk") as client:
        client.write(0, BLOCK)
        with pytest.raises(RequestFailed):
            client.read(1 << 20, 4096)
    one = "document.getElementById('one')"
    browser.open(page_of(server) + "#export=disk")
    browser.wait_for(f"{one}.innerText.includes('Removing it frees')")
    copies = "or of a copy that a checkpoint or stream keeps"  # all of a disk, where nothing was written since
    assert copies in browser.evaluate(f"{one}.innerText")
    assert copies in browser.evaluate("document.querySelector('[data-column=shared]').parentNode.title")
    assert "einval" in browser.evaluate(f"{one}.innerText.toLowerCase()") or "range" in browser.evaluate(
        f"{one}.innerText"
    )
    browser.evaluate("document.querySelector('.back').click()")
    browser.wait_for(f"{one}.hidden")
    browser.evaluate("[...document.querySelectorAll('[data-export]')].find(node => node.innerText === 'a b/ü').click()")
    browser.wait_for(f"{one}.innerText.includes('Nobody has used it')")
    browser.evaluate("location.hash = 'export=gone'")
    browser.wait_for(f"{one}.innerText.includes('no export of this name any more')")
    assert browser.complaints == []


def test_who_is_attached_is_shown_with_the_export(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "1M", "other": "1M"}, metrics=True)
    with server.client("disk") as client, server.client("other"):
        client.write(0, BLOCK)
        browser.open(page_of(server) + "#export=disk")
        one = "document.getElementById('one').innerText"
        browser.wait_for(f"{one}.includes('unix client')")
        assert browser.evaluate(one).count("unix client") == 1
    browser.wait_for(f"!{one}.includes('unix client')")
    assert browser.complaints == []


def test_exports_can_be_filtered_and_sorted(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"red": "1M", "green": "3M", "blue": "2M"}, metrics=True)
    browser.open(page_of(server))
    names = "[...document.querySelectorAll('#exports tbody td.name')].map(cell => cell.innerText)"
    browser.wait_for(f"{names}.length === 3")
    browser.evaluate("document.querySelector('[data-column=size]').click()")
    assert browser.evaluate(names) == ["green", "blue", "red"]
    browser.evaluate("document.querySelector('[data-column=size]').click()")
    assert browser.evaluate(names) == ["red", "blue", "green"]
    browser.evaluate("{ const field = $('filter'); field.value = 'RE'; field.dispatchEvent(new Event('input')); }")
    assert browser.evaluate(names) == ["red", "green"]
    assert browser.evaluate("$('exports-note').innerText").startswith("2 of 3 disks")
    browser.evaluate("{ const field = $('filter'); field.value = 'rot'; field.dispatchEvent(new Event('input')); }")
    assert browser.evaluate("$('exports').innerText") == "None has \u201crot\u201d in its name or its pool's."


def test_a_selection_stays_when_the_page_asks_again(serve: Callable[..., Nbdzram], browser: Browser) -> None:
    server = serve({"disk": "1M"}, metrics=True)
    browser.open(page_of(server))
    browser.wait_for("document.querySelectorAll('#exports tbody tr').length === 1")
    browser.evaluate("getSelection().selectAllChildren($('age'))")  # the uptime, which changes
    before = int(browser.evaluate("polls"))
    browser.wait_for(f"polls >= {before + 2}")
    assert browser.evaluate("getSelection().toString()").startswith("version ")
    browser.evaluate("getSelection().selectAllChildren($('where'))")
    browser.wait_for(f"polls >= {before + 4}")
    assert server.uri("")[:10] in browser.evaluate("getSelection().toString()")


CONTRAST = """(() => {
    const channel = value => (value /= 255) <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const below = node => { for (; node; node = node.parentElement) {
        const colour = numbers(getComputedStyle(node).backgroundColor);
        if (colour.length < 4 || colour[3] === 1) return colour; } return [255, 255, 255]; };
    const poor = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const node = walk.currentNode.parentElement;
        if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest("script")) continue;
        const [a, b] = [light(numbers(getComputedStyle(node).color)), light(below(node))].sort((x, y) => y - x);
        if ((a + .05) / (b + .05) < 4.5) poor.push(walk.currentNode.data + " " + ((a + .05) / (b + .05)).toFixed(2));
    }
    return poor;
})()"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_every_text_can_be_read(serve: Callable[..., Nbdzram], browser: Browser, full: bool, dark: bool) -> None:
    """WCAG 2.2, success criterion 1.4.3: 4.5 to 1 for text of ordinary size."""
    server = serve({"disk": "64M", "idle": "1M"}, arguments=("--mem-limit", "1M") if full else (), metrics=True)
    with server.client("disk") as client:
        if full:
            fill(client)
        else:
            client.write(0, BLOCK * 256)
    server.fold()
    browser.open(page_of(server) + "#export=disk", dark=dark)
    browser.wait_for(f"{STATE} === '{'trouble' if full else 'serving'}'")
    browser.wait_for("document.getElementById('one').innerText.includes('Removing it frees')")
    assert browser.evaluate(CONTRAST) == []
