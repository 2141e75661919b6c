"""Write the dashboard's JSON: `python -m deploy.grafana.generate [FILE]`.

The SDK is pinned in pyproject.toml (extra `dashboards`) to the newest Grafana whose schema it carries; newer ones read
that schema too. What it cannot say is added where the class Mark says so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana import panels
from deploy.grafana.content import ANNOTATIONS, ROWS
from deploy.grafana.model import Annotation

DASHBOARD = Path(__file__).parent / "dashboards" / "nbdzram.json"
UID = "nbdzram"
ALERTS = "/alerting/list?search=nbdzram"  # of the Grafana that shows this; those of Prometheus' rules are among them
ANY = ".+"  # what All stands for in a long list, which else would make a long query
REFRESH = "30s"  # scrapes are 15 s apart by default: more often shows nothing new


def main() -> None:
    """Write it where it belongs, or to the file named."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DASHBOARD
    target.write_text(render(), encoding="utf-8")


def render() -> str:
    """The dashboard as JSON, the same bytes every time."""
    return json.dumps(_dashboard().build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _dashboard() -> dashboards.Dashboard:
    board = (
        dashboards.Dashboard("nbdzram")
        .uid(UID)
        .description("Disks that live compressed and folded in memory: what they hold, cost and do.")
        .tags(["nbdzram", "storage"])
        .time("now-1h", "now")
        .refresh(REFRESH)
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .editable()
        .link(dashboards.DashboardLink("Alerts").type(models.DashboardLinkType.LINK).url(ALERTS))
    )
    for variable in _variables():
        board.with_variable(variable)
    for annotation in ANNOTATIONS:
        board.annotation(MarkBuilder(annotation))
    identifier = 0
    for row in ROWS:
        identifier += 1
        title = dashboards.Row(row.title).id(identifier)
        within = []
        for panel in row.panels:
            identifier += 1
            built = panels.build(panel)
            built.id(identifier)  # type: ignore[attr-defined]  # every panel has it; the SDK's base class does not
            within.append(built)
        if row.folded:
            for built in within:
                title.with_panel(built)
        board.with_row(title)
        if not row.folded:
            for built in within:
                board.with_panel(built)
    return board


def _variables() -> list[Builder[models.VariableModel]]:
    """Each narrows the next: the pools of the chosen instances of the chosen jobs."""
    source = dashboards.DatasourceVariable("datasource").label("Data source").type("prometheus")
    return [
        source,
        _choice("job", "Job", "nbdzram_build_info"),  # All are those with an nbdzram: `up` is there of everybody
        _choice("instance", "Instance", 'nbdzram_build_info{job=~"$job"}').all_value(ANY),
        _choice("pool", "Pool", 'nbdzram_mem_used_total_bytes{job=~"$job",instance=~"$instance"}').all_value(ANY),
        _choice(
            "export", "Export", 'nbdzram_export_size_bytes{job=~"$job",instance=~"$instance",pool=~"$pool"}'
        ).all_value(ANY),
    ]


def _choice(label: str, title: str, series: str) -> dashboards.QueryVariable:
    """The values of one label."""
    query: dict[str, object] = {
        "qryType": 1,  # label values
        "query": f"label_values({series},{label})",
        "refId": "PrometheusVariableQueryEditor-VariableQuery",
    }
    return (
        dashboards.QueryVariable(label)
        .label(title)
        .datasource(panels.DATASOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


class Mark(models.AnnotationQuery):
    """An annotation of the Prometheus data source, which the SDK knows only in general."""

    def __init__(self, annotation: Annotation) -> None:
        super().__init__(
            name=annotation.name,
            datasource=panels.DATASOURCE,
            icon_color=annotation.colour,
            expr=annotation.expr,
        )
        self._annotation = annotation

    def to_json(self) -> dict[str, object]:
        """What the SDK says, and the fields of the data source."""
        return super().to_json() | {
            "titleFormat": self._annotation.title,
            "textFormat": self._annotation.text,
            "useValueForTime": "on" if self._annotation.value_is_time else False,
        }


class MarkBuilder(Builder[models.AnnotationQuery]):
    """Hands a Mark to the SDK's dashboard."""

    def __init__(self, annotation: Annotation) -> None:
        self._annotation = annotation

    def build(self) -> models.AnnotationQuery:
        """The annotation."""
        return Mark(self._annotation)


if __name__ == "__main__":
    main()
