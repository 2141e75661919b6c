"""Trouble begins at one place: for `top` and doctor, for the status page, and for the alerts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from nbdzram import thresholds
from nbdzram.metrics import page
from tests.deploy.grafana import panels

NUMBERS = {name: value for name, value in vars(thresholds).items() if name.isupper()}
PAGE = (Path(page.__file__).parent / "page.html").read_text(encoding="utf-8")
RULES = Path(__file__).parents[3] / "deploy" / "prometheus" / "rules" / "alerts.yml"
ALERTS = {rule["alert"]: rule["expr"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_page_has_the_same_number_and_no_other(name: str) -> None:
    (told,) = re.findall(rf"\b{name} = ([^,;]+)", PAGE)
    assert eval(told, {}) == NUMBERS[name]
    assert len(re.findall(rf"\b{name}\b", PAGE)) > 1, "declared and not used"


@pytest.mark.parametrize(
    ("alert", "ends"),
    [
        ("NbdzramPoolNearLimit", f"> {thresholds.NEAR_LIMIT}"),
        ("NbdzramExportNearQuota", f"> {thresholds.NEAR_LIMIT}"),
        ("NbdzramConnectionsNearLimit", f"> {thresholds.CROWDED}"),
        ("NbdzramStateDirNearlyFull", f"< {thresholds.ROOM_LEAST}"),
        ("NbdzramCertificateEnds", f"< {thresholds.CERTIFICATE_DAYS} * 86400"),
        (
            "NbdzramCheckpointOld",
            f"> {thresholds.LATE_INTERVALS} * nbdzram_checkpoint_interval_seconds + {thresholds.LATE_SECONDS}",
        ),
    ],
)
def test_the_alert_begins_there_too(alert: str, ends: str) -> None:
    assert ALERTS[alert].strip().endswith(ends)


def test_the_dashboard_calls_a_checkpoint_late_where_the_alert_does() -> None:
    (panel,) = (panel for panel in panels() if panel["title"] == "Checkpoints late")
    expr = re.sub(r"{[^}]*}", "", panel["targets"][0]["expr"])
    assert expr == f"count({' '.join(ALERTS['NbdzramCheckpointOld'].split())}) or vector(0)"
