"""The committed dashboard as plain JSON, read without the code that wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "nbdzram.json"

Json = dict[str, Any]


@cache
def dashboard() -> Json:
    board: Json = json.loads(DASHBOARD.read_text())
    return board


def panels() -> list[Json]:
    """All but the rows."""
    return [panel for panel in placed() if panel["type"] != "row"]


def placed() -> list[Json]:
    """Rows and panels in the order of the page; those of a folded row stand inside it."""
    return [inner for panel in dashboard()["panels"] for inner in (panel, *panel.get("panels", ()))]


def targets() -> Iterator[tuple[str, Json]]:
    """Every query, with the name by which a failing test calls it."""
    for panel in panels():
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']} ({panel['id']})", target


def substituted(expr: str) -> str:
    """A query as Grafana sends it with All chosen in every variable. 15 s hold enough scrapes, a second apart.

    All is what the variable says, and otherwise every value that it offers.
    """
    offered = {"job": "(nbdzram)"}
    for variable in dashboard()["templating"]["list"][1:]:
        name = variable["name"]
        expr = expr.replace(f"${name}", variable.get("allValue") or offered[name])
    return expr.replace("$__rate_interval", "15s").replace("$__interval", "1s")
