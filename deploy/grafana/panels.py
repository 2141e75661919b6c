"""One builder of Grafana's own SDK for each kind of panel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import common as commons
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import gauge, heatmap, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.model import Kind, Panel

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
DRILL_DOWN = (
    "/d/nbdzram?${__url_time_range}&${datasource:queryparam}&${job:queryparam}"
    "&var-instance=${__data.fields.Instance}&var-pool=${__data.fields.Pool}&var-export=${__value.raw}"
)
STATUS_PAGE = "http://${__field.labels.instance}/"  # what Prometheus scrapes also serves people
FAINT, MIDDLE, FULL = 10, 40, 80  # opacity of areas, in percent

PanelBuilder = TypeVar("PanelBuilder", bound=Any)  # every panel has the same setters, and no type in common


def build(panel: Panel) -> Builder[models.Panel]:
    """The panel as the SDK writes it."""
    return _BUILDERS[panel.kind](panel)


def _common(builder: PanelBuilder, panel: Panel) -> PanelBuilder:
    """What every panel has: title, description, data source, queries, unit, colours."""
    builder.title(panel.title).description(panel.says).datasource(DATASOURCE).unit(panel.unit)
    builder.span(panel.width).height(panel.height)
    if panel.empty:
        builder.no_value(panel.empty)
    if panel.decimals is not None:
        builder.decimals(panel.decimals)
    for index in range(len(panel.queries)):
        builder.with_target(_query(panel, index))
    if panel.thresholds:
        steps = [models.Threshold(value=value or None, color=colour) for value, colour in panel.thresholds]
        builder.thresholds(dashboards.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    if any("{{instance}}" in query.legend for query in panel.queries):
        page = dashboards.DashboardLink("Status page of ${__field.labels.instance}").url(STATUS_PAGE).target_blank(True)
        builder.data_links([page])
    for legend, colour in panel.colours:
        fixed = models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour})
        builder.override_by_name(legend, [fixed])
    return builder


def _query(panel: Panel, index: int) -> prometheus.Dataquery:
    query = panel.queries[index]
    target = prometheus.Dataquery().expr(query.expr).ref_id(_ref(index)).datasource(DATASOURCE)
    if panel.kind is Kind.TABLE:
        return target.instant().format(PromQueryFormat.TABLE)
    target.range().legend_format(query.legend)
    return target.format(PromQueryFormat.HEATMAP if panel.kind is Kind.HEATMAP else PromQueryFormat.TIME_SERIES)


def _ref(index: int) -> str:
    return chr(ord("A") + index)


def _stat(panel: Panel) -> Builder[models.Panel]:
    builder = _common(stat.Panel(), panel).reduce_options(_last()).graph_mode(common.BigValueGraphMode.AREA)
    return builder if panel.thresholds else builder.color_mode(common.BigValueColorMode.NONE)


def _names(panel: Panel) -> Builder[models.Panel]:
    return _common(stat.Panel(), panel).reduce_options(_last()).text_mode(common.BigValueTextMode.NAME)


def _gauge(panel: Panel) -> Builder[models.Panel]:
    builder = _common(gauge.Panel(), panel).reduce_options(_last()).min(0)
    return builder if panel.maximum is None else builder.max(panel.maximum)


def _last() -> commons.ReduceDataOptions:
    return commons.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields("")


def _graph(panel: Panel) -> timeseries.Panel:
    return (
        _common(timeseries.Panel(), panel)
        .show_points(common.VisibilityMode.NEVER)
        .fill_opacity(FAINT)
        .tooltip(commons.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
        .legend(
            commons.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )


def _lines(panel: Panel) -> Builder[models.Panel]:
    builder = _graph(panel).axis_soft_min(0)
    for index, query in enumerate(panel.queries):
        if query.unit is not None:  # Grafana draws it by an axis of its own
            builder.override_by_query(_ref(index), [models.DynamicConfigValue(id_val="unit", value=query.unit)])
    for legend in panel.mirrored:
        down = models.DynamicConfigValue(id_val="custom.transform", value="negative-Y")
        builder.override_by_name(legend, [down])
    return builder


def _stack(panel: Panel) -> Builder[models.Panel]:
    builder = _graph(panel).fill_opacity(MIDDLE).min(0)
    builder.stacking(commons.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    for legend in panel.lines:
        over = {
            "custom.stacking": {"mode": "none", "group": "A"},
            "custom.fillOpacity": 0,
            "custom.lineWidth": 2,
            "custom.lineStyle": {"fill": "dash", "dash": [10, 10]},
        }
        builder.override_by_name(legend, [models.DynamicConfigValue(id_val=i, value=v) for i, v in over.items()])
    return builder


def _bars(panel: Panel) -> Builder[models.Panel]:
    return _graph(panel).draw_style(common.GraphDrawStyle.BARS).fill_opacity(FULL).min(0)


def _heatmap(panel: Panel) -> Builder[models.Panel]:
    # Prometheus counts from below each bound up to it, so Grafana need not compute buckets of its own.
    colour = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Turbo").steps(64)
    return (
        _common(heatmap.Panel(), panel)
        .calculate(False)
        .color(colour)
        .cell_gap(1)
        .y_axis(heatmap.YAxisConfig().unit(panel.unit).axis_placement(common.AxisPlacement.LEFT))
        .mode(common.TooltipDisplayMode.SINGLE)
    )


def _states(panel: Panel) -> Builder[models.Panel]:
    texts = {"0": ("idle", "transparent"), "1": ("running", "blue")}
    mapping = models.ValueMap(
        options={
            value: models.ValueMappingResult(text=text, color=colour, index=index)
            for index, (value, (text, colour)) in enumerate(texts.items())
        }
    )
    return _common(statetimeline.Panel(), panel).mappings([mapping]).show_value(common.VisibilityMode.NEVER)


def _table(panel: Panel) -> Builder[models.Panel]:
    """One line for each set of labels: the queries' tables are merged, and each value is named for its column."""
    titles = {"instance": "Instance", "pool": "Pool", "export": "Export"}
    order = {name: index for index, name in enumerate(("export", "pool", "instance"))}
    names = titles | {f"Value #{_ref(i)}": query.legend for i, query in enumerate(panel.queries)}
    organize = {"excludeByName": {"Time": True}, "renameByName": names, "indexByName": order}
    builder = (
        _common(table.Panel(), panel)
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(models.DataTransformerConfig(id_val="organize", options=organize))
    )
    for query in panel.queries:
        if query.unit is not None:
            unit = models.DynamicConfigValue(id_val="unit", value=query.unit)
            builder.override_by_name(query.legend, [unit])
    link = {"title": "Show only ${__value.raw}", "url": DRILL_DOWN, "targetBlank": False}
    return builder.override_by_name("Export", [models.DynamicConfigValue(id_val="links", value=[link])])


_BUILDERS: dict[Kind, Callable[[Panel], Builder[models.Panel]]] = {
    Kind.STAT: _stat,
    Kind.NAMES: _names,
    Kind.GAUGE: _gauge,
    Kind.LINES: _lines,
    Kind.STACK: _stack,
    Kind.BARS: _bars,
    Kind.HEATMAP: _heatmap,
    Kind.STATES: _states,
    Kind.TABLE: _table,
}
