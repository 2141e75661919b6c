"""What the dashboard's first row looks like from across the room: quiet servers, and one of fifty that is down.

Real Prometheus, and promtool where fifty servers are wanted. Colours are Grafana's rule: the last threshold that the
value reaches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import lz4
import pytest
import yaml

from nbdzram import __version__
from tests.deploy.grafana import Json, dashboard, panels, substituted
from tests.deploy.prometheus import SCRAPE_SECONDS, Prometheus
from tests.support.programs import require_program, run
from tests.support.server import Nbdzram, free_port

QUIET = {"green", "none"}
SERVERS = 50


def overview() -> list[Json]:
    """The panels of the first row."""
    placed = dashboard()["panels"]
    rows = [index for index, panel in enumerate(placed) if panel["type"] == "row"]
    assert placed[rows[0]]["title"] == "Overview"
    found: list[Json] = placed[rows[0] + 1 : rows[1]]
    return found


def by_title(title: str) -> Json:
    (found,) = (panel for panel in overview() if panel["title"] == title)
    return found


def colour(panel: Json, value: float) -> str:
    """Of a stat or a gauge at that value; "none" where it has no thresholds."""
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", ())
    reached: list[str] = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return reached[-1] if reached else "none"


def expr(panel: Json) -> str:
    (target,) = panel["targets"]
    return substituted(target["expr"])


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Of a server that has just started: nothing is stored, nobody came, no limit, no TLS, no state directory.

    The Prometheus has other programs to look after too, and one of those is down.
    """
    directory = tmp_path_factory.mktemp("server")
    with (
        Nbdzram(directory, {"disk": "64M"}, metrics=True) as server,
        Prometheus(
            tmp_path_factory.mktemp("prometheus"), server.metrics_url, strangers=[f"127.0.0.1:{free_port()}"]
        ) as running,
    ):
        running.wait_for_scrapes(3)
        running.wait_until(lambda: bool(running.instant('up{job="stranger"} == 0')), SCRAPE_SECONDS)
        yield running


@pytest.mark.parametrize("panel", overview(), ids=lambda panel: panel["title"])
def test_a_quiet_server_has_a_figure_everywhere_and_nothing_is_coloured(quiet: Prometheus, panel: Json) -> None:
    """Zero and not empty, and not "NaN"; what is not there yet is no trouble."""
    (found,) = quiet.instant(expr(panel))
    value = float(found["value"][1])
    assert math.isfinite(value)
    assert colour(panel, value) in QUIET


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_no_panel_of_a_quiet_server_is_empty_without_a_word(quiet: Prometheus, panel: Json) -> None:
    """Grafana's own is "No data", which is what it says of a server that is gone, too."""
    found = [series for target in panel["targets"] for series in quiet.instant(substituted(target["expr"]))]
    assert found or panel["fieldConfig"]["defaults"].get("noValue")


def test_the_version_of_lz4_is_the_librarys_own(quiet: Prometheus) -> None:
    """As doctor has it; it was that of the Python package that carries it, which counts otherwise."""
    (panel,) = (panel for panel in panels() if panel["title"] == "Versions")
    (found,) = quiet.instant(expr(panel))
    told = re.sub(r"{{(\w+)}}", lambda label: str(found["metric"][label[1]]), panel["targets"][0]["legendFormat"])
    assert told == f"nbdzram {__version__}, liblz4 {lz4.library_version_string()}"


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[[str, Mapping[str, float]], Callable[[float], None]]:
    """promtool holds that an expression has one value, without labels, over constant series."""

    def evaluate(expr: str, series: Mapping[str, float]) -> Callable[[float], None]:
        def holds(value: float) -> None:
            case = {
                "interval": "1s",
                "input_series": [{"series": name, "values": f"{value}x30"} for name, value in series.items()],
                "promql_expr_test": [
                    {"expr": expr, "eval_time": "30s", "exp_samples": [{"labels": "{}", "value": value}]}
                ],
            }
            file = tmp_path / "case.yml"
            file.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "1s", "tests": [case]}))
            run([require_program("promtool", package="prometheus"), "test", "rules", file])

        return holds

    return evaluate


def servers(metric: str, values: Sequence[float]) -> dict[str, float]:
    return {f'{metric}{{job="nbdzram",instance="s{number}:9809"}}': value for number, value in enumerate(values)}


Evaluate = Callable[[str, Mapping[str, float]], Callable[[float], None]]


@pytest.mark.parametrize(("up", "told", "shown"), [(SERVERS, 0, "green"), (SERVERS - 1, 1, "red"), (0, SERVERS, "red")])
def test_one_server_of_fifty_that_is_down_is_red(evaluate: Evaluate, up: int, told: int, shown: str) -> None:
    panel = by_title("Servers down")
    evaluate(expr(panel), servers("up", [1] * up + [0] * (SERVERS - up)))(told)
    assert colour(panel, told) == shown


def test_no_server_at_all_is_red_too_whatever_else_answers(evaluate: Evaluate) -> None:
    panel = by_title("Servers down")
    evaluate(expr(panel), {'up{job="node",instance="a"}': 1})(1)
    assert colour(panel, 1) == "red"


@pytest.mark.parametrize(
    ("title", "metric", "limit"),
    [
        ("Connections near their limit", "nbdzram_connections", "nbdzram_connections_limit"),
        ("Descriptors near their limit", "process_open_fds", "process_max_fds"),
    ],
)
def test_the_one_server_that_is_near_its_limit_is_the_one_that_shows(
    evaluate: Evaluate, title: str, metric: str, limit: str
) -> None:
    panel = by_title(title)
    used = servers(metric, [1.0] * (SERVERS - 1) + [95.0])
    evaluate(expr(panel), used | servers(limit, [100.0] * SERVERS))(0.95)
    assert colour(panel, 0.95) == "red"


def test_the_state_directory_with_the_least_room_shows(evaluate: Evaluate) -> None:
    panel = by_title("State directory")
    free = servers("nbdzram_state_dir_free_bytes", [90.0, 4.0, 80.0])
    evaluate(expr(panel), free | servers("nbdzram_state_dir_size_bytes", [100.0] * 3))(0.96)
    assert colour(panel, 0.96) == "red"


@pytest.mark.parametrize(("days", "shown"), [(20, "green"), (10, "orange"), (2, "red"), (-1, "red")])
def test_the_certificate_that_ends_first_shows(evaluate: Evaluate, days: int, shown: str) -> None:
    """promtool counts time from 0, and asks at 30 s."""
    panel = by_title("Certificate ends in")
    ends = servers("nbdzram_tls_certificate_expiry_timestamp_seconds", [1e9, days * 86400.0 + 30, 2e9])
    evaluate(expr(panel), ends)(days * 86400)
    assert colour(panel, days * 86400) == shown


@pytest.mark.parametrize(
    ("moments", "exports", "late", "shown"),
    [
        ([1e9, 1e9], 2, 0, "green"),  # ahead of promtool's clock, which stands at 30 s: just taken
        ([1e9, -331.0], 2, 1, "red"),
        ([1e9], 2, 1, "red"),  # and of the second server not even the first is whole
        ([1e9], 1, 0, "green"),  # which has nothing to keep
    ],
)
def test_a_server_whose_checkpoint_is_late_is_red(
    evaluate: Evaluate, moments: Sequence[float], exports: int, late: int, shown: str
) -> None:
    """As the alert has it: five intervals, here of 60 s, and a minute."""
    panel = by_title("Checkpoints late")
    found = servers("nbdzram_checkpoint_timestamp_seconds", moments)
    found |= servers("nbdzram_checkpoint_interval_seconds", [60.0, 60.0])
    found |= servers("process_start_time_seconds", [-1e6, -1e6]) | servers("nbdzram_export_size_bytes", [1.0] * exports)
    evaluate(expr(panel), found)(late)
    assert colour(panel, late) == shown


@pytest.mark.parametrize(("short", "shown"), [(0, "green"), (1, "red")])
def test_one_server_that_is_short_of_memory_is_red(evaluate: Evaluate, short: int, shown: str) -> None:
    panel = by_title("Memory short")
    evaluate(expr(panel), servers("nbdzram_memory_short", [0.0] * (SERVERS - 1) + [float(short)]))(short)
    assert colour(panel, short) == shown
