"""What a dashboard is made of here, and how its queries are written. Knows nothing of Grafana's JSON.

A query names a metric through server(), pool() or export(), so that the dashboard's variables always apply:

    total(rate(export("requests_total")), "operation")
    sum by (operation) (rate(nbdzram_requests_total{job=~"$job",...,export=~"$export"}[$__rate_interval]))
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

PREFIX = "nbdzram_"
SERVER_LABELS = 'job=~"$job",instance=~"$instance"'
POOL_LABELS = f'{SERVER_LABELS},pool=~"$pool"'
EXPORT_LABELS = f'{POOL_LABELS},export=~"$export"'
PAGE_BYTES = 4096


class Kind(Enum):
    """How a panel shows what it found."""

    STAT = auto()
    NAMES = auto()  # a stat that shows what its series are called
    GAUGE = auto()
    LINES = auto()
    STACK = auto()
    BARS = auto()
    HEATMAP = auto()
    STATES = auto()
    TABLE = auto()


@dataclass(frozen=True, slots=True)
class Query:
    """One expression; `legend` names its series, or a table's column. Either may have a unit of its own."""

    expr: str
    legend: str
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. Width and height in Grafana's grid: 24 columns, rows of 30 pixels."""

    title: str
    says: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    width: int = 8
    height: int = 8
    decimals: int | None = None
    maximum: float | None = None
    thresholds: tuple[tuple[float, str], ...] = ()  # from this value on, this colour
    colours: tuple[tuple[str, str], ...] = ()  # of series, by legend
    lines: tuple[str, ...] = ()  # legends that are drawn as a dashed line over a stack
    mirrored: tuple[str, ...] = ()  # legends that are drawn downwards from zero
    empty: str = ""  # what it says where no query finds a series, instead of "No data", which reads like trouble


@dataclass(frozen=True, slots=True)
class Row:
    """A titled group of panels."""

    title: str
    panels: tuple[Panel, ...]
    folded: bool = True  # what tells trouble stands open; Grafana asks for the rest only when somebody unfolds it


@dataclass(frozen=True, slots=True)
class Annotation:
    """A mark on every graph: while `expr` is above 0, or, with `value_is_time`, at the moment its value names (ms)."""

    name: str
    expr: str
    title: str
    text: str
    colour: str
    value_is_time: bool = False


def server(metric: str, **labels: str) -> str:
    """A metric of the whole server. `up` and process_* have no prefix of ours."""
    name = metric if metric == "up" or metric.startswith("process_") else PREFIX + metric
    return _select(name, SERVER_LABELS, labels)


def pool(metric: str, **labels: str) -> str:
    """A metric of the chosen pools."""
    return _select(PREFIX + metric, POOL_LABELS, labels)


def export(metric: str, **labels: str) -> str:
    """A metric of the chosen exports."""
    return _select(PREFIX + metric, EXPORT_LABELS, labels)


def rate(selector: str) -> str:
    """Per second, over an interval that always holds enough scrapes."""
    return f"rate({selector}[$__rate_interval])"


def increase(selector: str) -> str:
    """How many within one point of the graph."""
    return f"increase({selector}[$__rate_interval])"


def total(expr: str, *by: str) -> str:
    """The sum, by labels if any are named."""
    return f"sum by ({', '.join(by)}) ({expr})" if by else f"sum({expr})"


def quantile(share: float, selector: str, *by: str) -> str:
    """A quantile of a histogram's rate. `selector` names its buckets."""
    return f"histogram_quantile({share:g}, {total(rate(selector), 'le', *by)})"


def _select(name: str, common: str, labels: dict[str, str]) -> str:
    own = "".join(f',{label}="{value}"' for label, value in labels.items())
    return f"{name}{{{common}{own}}}"
