"""The dashboard keeps the rules that make one usable in somebody else's Grafana."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from nbdzram.metrics.families import FAMILIES
from tests.deploy.grafana import DASHBOARD, DEPLOY, Json, dashboard, panels, placed, targets

GRID_COLUMNS = 24
# Of Prometheus itself, or written by its client library: the live test holds them.
FOREIGN_METRICS = re.compile(r"up|process_\w+|nbdzram_build_info")
# https://grafana.com/docs/grafana/latest/panels-visualizations/configure-standard-options/: ids of units used here.
UNITS = {"short", "percentunit", "bytes", "Bps", "s", "ops", "reqps", "cps"}
QUERIES = dict(targets())


def test_committed_json_is_what_the_generator_writes() -> None:
    """Whoever changes the content runs `make dashboards`, too."""
    pytest.importorskip("grafana_foundation_sdk", reason="pip install '.[dashboards]'")
    from deploy.grafana.generate import render

    assert DASHBOARD.read_text() == render(), "run `make dashboards`"


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_panel_says_what_it_shows(panel: Json) -> None:
    """A title, a description of a sentence, a known unit, the chosen data source, and at least one query."""
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    names = [target["refId"] for target in panel["targets"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", QUERIES)
def test_query_obeys_the_variables(name: str) -> None:
    """Each metric of a query is narrowed by job and instance, its data source is chosen, its range fits the zoom."""
    target = QUERIES[name]
    assert target["datasource"]["uid"] == "${datasource}"
    for selector in re.findall(r"\w+\{([^}]*)\}", target["expr"]):
        assert 'job=~"$job"' in selector
        assert 'instance=~"$instance"' in selector
    assert set(re.findall(r"\[([^]]*)\]", target["expr"])) <= {"$__rate_interval"}
    assert target.get("legendFormat") or target["format"] == "table"


@pytest.mark.parametrize("name", QUERIES)
def test_query_asks_for_metrics_that_are_published(name: str) -> None:
    """A renamed metric fails here and not on somebody's wall; counters are never shown as they are."""
    published = {family.name: family.kind for family in FAMILIES}
    for metric, bracket in re.findall(r"(\w+)\{[^}]*\}(\[)?", QUERIES[name]["expr"]):
        if FOREIGN_METRICS.fullmatch(metric):
            continue
        family = re.sub(r"_(bucket|sum|count)$", "", metric)
        kind = published.get(metric) or published[family]
        assert (kind in {"counter", "histogram"}) <= (bracket == "["), f"{metric} is a {kind} and wants a rate"


def test_every_metric_is_on_the_dashboard() -> None:
    """What is measured is shown, or stands here with its reason."""
    hidden = {
        "nbdzram_zspages",  # fragmentation says the same in bytes
        "nbdzram_huge_pages_since_total",  # in mm_stat for completeness
        "nbdzram_maintenance_seconds_total",  # processor time is what clients feel
        "nbdzram_draining",  # lasts seconds
    }
    shown = " ".join(str(target["expr"]) for target in QUERIES.values())
    ours = {family.name for family in FAMILIES if family.name.startswith("nbdzram_")}
    assert {name for name in ours if not re.search(rf"{name}(_bucket)?\{{", shown)} == hidden


def test_panels_fill_the_grid_without_overlap() -> None:
    """No two share a cell, none stands outside, and every line of panels is full."""
    cells: set[tuple[int, int]] = set()
    for panel in placed():
        place = panel["gridPos"]
        mine = {(place["x"] + column, place["y"] + line) for column in range(place["w"]) for line in range(place["h"])}
        assert not mine & cells, panel["title"]
        assert place["x"] + place["w"] <= GRID_COLUMNS, panel["title"]
        cells |= mine
    lines = {line for _, line in cells}
    assert len(cells) == GRID_COLUMNS * len(lines)


def test_variables_narrow_each_other() -> None:
    """Data source, job, instance, pool, export, in this order; each asks within what is chosen before it."""
    variables = dashboard()["templating"]["list"]
    assert [variable["name"] for variable in variables] == ["datasource", "job", "instance", "pool", "export"]
    for before, variable in pairwise(variables[1:]):
        assert f"${before['name']}" in variable["query"]["query"]
        assert variable["includeAll"]
        assert variable["multi"]


def test_identifiers_are_unique_and_nothing_names_a_server() -> None:
    """The dashboard can be imported anywhere: no fixed data source, no address, no id of a database."""
    identifiers = [panel["id"] for panel in placed()]
    assert len(set(identifiers)) == len(identifiers)
    assert dashboard().get("id") is None
    assert not re.search(r"localhost|127\.0\.0\.1|:9809", DASHBOARD.read_text())


def test_provisioning_finds_the_dashboard() -> None:
    """Both files parse, and the data source answers under the name that compose passes."""
    yaml = pytest.importorskip("yaml", reason="pip install '.[deploy]'")
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "${PROMETHEUS_URL}"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "nbdzram.yaml").read_text())["providers"]
    assert provider["type"] == "file"


def by_title(title: str) -> Json:
    (found,) = (panel for panel in panels() if panel["title"] == title)
    return found


def test_what_tells_trouble_stands_open_and_the_rest_is_folded() -> None:
    rows = {panel["title"]: panel["collapsed"] for panel in placed() if panel["type"] == "row"}
    assert [title for title, folded in rows.items() if not folded] == ["Overview", "Memory", "I/O"]
    assert len(rows) == 9


def test_graphs_begin_at_zero_and_writes_are_drawn_downwards() -> None:
    for panel in panels():
        if panel["type"] == "timeseries":
            defaults = panel["fieldConfig"]["defaults"]
            assert defaults.get("min") == 0 or defaults["custom"]["axisSoftMin"] == 0, panel["title"]
    for title in ("Throughput", "Requests"):
        (graph,) = (one for one in panels() if one["title"] == title and one["type"] == "timeseries")
        overrides = {one["matcher"]["options"]: one["properties"] for one in graph["fieldConfig"]["overrides"]}
        assert overrides["write"] == [{"id": "custom.transform", "value": "negative-Y"}]


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_line_of_one_pool_or_export_says_of_which_server(panel: Json) -> None:
    """Two servers both have a pool called default."""
    for target in panel["targets"]:
        legend = target.get("legendFormat") or ""
        assert ("{{pool}}" in legend or "{{export}}" in legend) <= ("{{instance}}" in legend), legend
    assert any("{{instance}}" in (target.get("legendFormat") or "") for target in panel["targets"]) == any(
        link["url"].startswith("http://${__field.labels.instance}")
        for link in panel["fieldConfig"]["defaults"].get("links", ())
    )


RATES = {"bytes": {"Bps"}, "seconds": {"percentunit", "short"}, "count": {"ops", "reqps", "cps"}}
LEVELS = {"bytes": {"bytes"}, "seconds": {"s"}, "count": {"short"}}


def unit_of(panel: Json, target: Json) -> str:
    """That of the panel, or the query's own."""
    found: str = panel["fieldConfig"]["defaults"]["unit"]
    for override in panel["fieldConfig"].get("overrides", ()):
        if override["matcher"] == {"id": "byFrameRefID", "options": target["refId"]}:
            found = next((one["value"] for one in override["properties"] if one["id"] == "unit"), found)
    return found


@pytest.mark.parametrize(
    "panel", [one for one in panels() if one["type"] == "timeseries"], ids=lambda one: one["title"]
)
def test_a_line_has_the_unit_of_what_its_query_counts(panel: Json) -> None:
    """Two exports that are held back were "2 s", a journal that can be used "1 s", and bytes a second bytes."""
    for target in panel["targets"]:
        expr = re.sub(r"\{[^}]*\}", "", target["expr"])
        if "/" in expr:  # a ratio, or a mean
            continue
        measure = re.search(r"_(bytes|seconds)(_total|_bucket)?\b", expr)
        kind = measure[1] if measure else "bytes" if "* 4096" in expr or "_size_" in expr else "count"
        is_rate = re.search(r"\b(rate|deriv)\(", expr) and "quantile" not in expr
        assert unit_of(panel, target) in (RATES if is_rate else LEVELS)[kind], expr
