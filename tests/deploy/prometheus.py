"""A real Prometheus on loopback, with its own data directory, that scrapes and evaluates every second."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.grafana import DEPLOY
from tests.support.programs import require_program
from tests.support.server import ServerProcess, free_port

ANSWER_SECONDS = 10
SCRAPE_SECONDS = 30  # for one more scrape to arrive: a second, or many on a busy machine


class Prometheus(ServerProcess):
    """`prometheus` with the rules of deploy/ and one target, beside others that are not ours and do not answer.

    Leaving the context ends it.
    """

    def __init__(self, directory: Path, metrics_url: str, *, strangers: Sequence[str] = ()) -> None:
        program = require_program("prometheus", package="prometheus")
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(DEPLOY / "prometheus" / "rules" / "*.yml")],
            "scrape_configs": [
                {
                    "job_name": "nbdzram",
                    "static_configs": [{"targets": [urllib.parse.urlsplit(metrics_url).netloc]}],
                },
                {"job_name": "stranger", "static_configs": [{"targets": list(strangers)}]},
            ],
        }
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(configuration))
        port = free_port()
        self.started_at = time.time()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            program,
            f"--config.file={file}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        super().__init__(command, directory=directory, unix_path=directory / "none", port=port)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=ANSWER_SECONDS) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    def ask(self, path: str, **parameters: str | float) -> Any:
        """The `data` of one API call; a query that Prometheus refuses fails with its reason."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=ANSWER_SECONDS) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def values(self, expr: str) -> list[float]:
        """Every finite sample of every series from the start to now."""
        found = self.ask("query_range", query=expr, start=self.started_at, end=time.time(), step=1)
        samples = [float(value) for series in found["result"] for _, value in series["values"]]
        return [sample for sample in samples if math.isfinite(sample)]

    def instant(self, expr: str) -> list[dict[str, Any]]:
        """The series that `expr` finds now."""
        series: list[dict[str, Any]] = self.ask("query", query=expr)["result"]
        return series

    def wait_for_scrapes(self, count: int) -> None:
        """Until so many more scrapes are stored."""
        goal = self._scrapes() + count
        self.wait_until(lambda: self._scrapes() >= goal, count * SCRAPE_SECONDS)

    def _scrapes(self) -> int:
        found = self.instant("count_over_time(nbdzram_connections[1h])")  # unlike up, only of scrapes that succeeded
        return int(found[0]["value"][1]) if found else 0
