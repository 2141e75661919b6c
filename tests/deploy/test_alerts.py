"""Rules and alerts, held by Prometheus' own promtool."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from nbdzram.cli.main import GROUPS, front
from nbdzram.metrics.families import FAMILIES
from tests.deploy.grafana import DEPLOY
from tests.docs.test_examples import parse
from tests.support.programs import require_program, run

RULES = DEPLOY / "prometheus" / "rules"
UNIT_TESTS = Path(__file__).with_name("alerts.yml")
ALERTS = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"][0]["rules"]
NAMES = [alert["alert"] for alert in ALERTS]
END = ".,;:?)"
NOT_A_PROGRAM = {"-u", "-n", "called", "reload", "set-property", "status"}


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
    texts = dict(alert["annotations"])
    page = (DEPLOY.parent / "docs" / "reference" / "alerts.md").read_text()
    assert texts.pop("runbook_url").endswith(f"reference/alerts.md#{alert['alert'].lower()}")  # type: ignore[attr-defined]
    assert f"\n## {alert['alert']}\n" in page
    assert set(texts) == {"summary", "description", "runbook"}
    assert alert["labels"]["severity"] in {"critical", "warning"}
    for text in texts.values():
        assert text.rstrip().endswith((".", "?", ")?")), text


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `nbdzram ...` that is a program there, and no unit, namespace or job."""
    words = text.split()
    for index, word in enumerate(words):
        if word.lstrip("(") != "nbdzram" or words[index - 1] in NOT_A_PROGRAM:
            continue
        told: list[str] = []
        for one in words[index + 1 :]:
            if told and not (told[-1] in GROUPS or one.startswith("--") or one.rstrip(END).isupper()):
                break
            told.append(one.rstrip(END))
            if one != told[-1]:
                break
        yield told if told[-1] not in GROUPS else [*told, "list"]


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_every_command_of_a_runbook_can_be_pasted(alert: dict[str, dict[str, str]]) -> None:
    """Whoever is woken has no time to look for what it is called by now."""
    for command in commands(alert["annotations"]["runbook"]):
        parse(front, ["1G" if word == "SIZE" else word for word in command])


def test_a_command_of_a_runbook_that_there_is_not_is_found() -> None:
    text = "Is it there (systemctl status nbdzram)? Raise it: nbdzram exports grow NAME --by SIZE. Then (nbdzram runs)."
    assert list(commands(text)) == [["exports", "grow", "NAME", "--by", "SIZE"], ["runs", "list"]]
    with pytest.raises(click.UsageError):
        parse(front, ["scrub"])


def test_rules_ask_for_metrics_that_are_published() -> None:
    """Names in expressions are families, recorded series, or Prometheus' own."""
    groups = [yaml.safe_load(path.read_text())["groups"][0]["rules"] for path in sorted(RULES.glob("*.yml"))]
    rules = [rule for group in groups for rule in group]
    known = {family.name for family in FAMILIES} | {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        for name in re.findall(r"[a-z_]*:?nbdzram_\w+(?::\w+)?", rule["expr"]):
            assert re.sub(r"_bucket$", "", name) in known, name


def test_a_pool_far_above_its_limit_is_told_in_words_that_fit(tmp_path: Path) -> None:
    """A limit can be set below what is in use: 1457 % of a limit is no way of being full."""
    rules = [str(RULES / name) for name in ("recording.yml", "alerts.yml")]
    series = [
        {"series": 'nbdzram_memory_used_bytes{instance="a",pool="default"}', "values": "1457x10"},
        {"series": 'nbdzram_mem_limit_bytes{instance="a",pool="default"}', "values": "100x10"},
    ]
    (alert,) = (alert for alert in ALERTS if alert["alert"] == "NbdzramPoolNearLimit")
    annotations = dict(alert["annotations"])
    annotations["summary"] = "Pool default at a is at 1457% of its limit."
    annotations["runbook_url"] = "https://wiki/reference/alerts.md#nbdzrampoolnearlimit"
    expected = {
        "exp_labels": {"severity": "warning", "instance": "a", "pool": "default"},
        "exp_annotations": annotations,
    }
    case = {"interval": "1m", "input_series": series, "external_labels": {"nbdzram_docs": "https://wiki/"}}
    case["alert_rule_test"] = [{"eval_time": "7m", "alertname": "NbdzramPoolNearLimit", "exp_alerts": [expected]}]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": rules, "evaluation_interval": "1m", "tests": [case]}))
    run([require_program("promtool", package="prometheus"), "test", "rules", file])
