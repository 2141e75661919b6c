"""Rules and alerts, held by Prometheus' own promtool."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from nbdzram.metrics.families import FAMILIES
from tests.deploy.grafana import DEPLOY
from tests.support.programs import require_program, run

RULES = DEPLOY / "prometheus" / "rules"
UNIT_TESTS = Path(__file__).with_name("alerts.yml")
ALERTS = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"][0]["rules"]
NAMES = [alert["alert"] for alert in ALERTS]


def test_promtool_accepts_rules_and_configuration(tmp_path: Path) -> None:
    """The scrape example loads from where it is copied to, with its rules beside it."""
    promtool = require_program("promtool", package="prometheus")
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "prometheus")
    run([promtool, "check", "config", tmp_path / "prometheus" / "prometheus.yml"])


def test_every_alert_fires_and_keeps_silent_as_its_unit_tests_say() -> None:
    """tests/deploy/alerts.yml under `promtool test rules`."""
    run([require_program("promtool", package="prometheus"), "test", "rules", UNIT_TESTS])


@pytest.mark.parametrize("name", NAMES)
def test_alert_has_a_unit_test_of_firing_and_one_of_silence(name: str) -> None:
    """An alert that was never seen to fire is a hope."""
    outcomes = set()
    for case in yaml.safe_load(UNIT_TESTS.read_text())["tests"]:
        if case["name"].split()[0] == name:
            outcomes |= {bool(question.get("exp_samples")) for question in case["promql_expr_test"]}
    assert outcomes == {True, False}


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_alert_tells_what_to_do(alert: dict[str, dict[str, str]]) -> None:
    """Whoever is woken reads one sentence, what it means, and the first steps."""
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert alert["labels"]["severity"] in {"critical", "warning"}
    for text in alert["annotations"].values():
        assert text.rstrip().endswith((".", "?", ")?")), text


def test_rules_ask_for_metrics_that_are_published() -> None:
    """Names in expressions are families, recorded series, or Prometheus' own."""
    groups = [yaml.safe_load(path.read_text())["groups"][0]["rules"] for path in sorted(RULES.glob("*.yml"))]
    rules = [rule for group in groups for rule in group]
    known = {family.name for family in FAMILIES} | {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        for name in re.findall(r"[a-z_]*:?nbdzram_\w+(?::\w+)?", rule["expr"]):
            assert re.sub(r"_bucket$", "", name) in known, name
