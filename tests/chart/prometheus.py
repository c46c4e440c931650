"""A real Prometheus, for the questions that only it can answer: is this a query, and does the operator have an answer.

It scrapes every second and evaluates rules as often, so that no test waits for what takes minutes in a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.processes import Server, unused_port
from tests.tools.build import binary

HOST = "127.0.0.1"
SCRAPE_SECONDS = 1


@dataclass(frozen=True)
class Selector:
    """What a query reads: the series of one metric whose labels match."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]
    """Label, operator and value of each, without the metric's name."""

    def without(self, *labels: str) -> Selector:
        """The same series, whatever those labels are."""
        return Selector(self.metric, tuple(matcher for matcher in self.matchers if matcher[0] not in labels))

    def __str__(self) -> str:
        """As PromQL."""
        inside = ", ".join(f"{label}{operator}{json.dumps(value)}" for label, operator, value in self.matchers)
        return f"{self.metric}{{{inside}}}"


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/api/v1/", trust_env=False)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression comes to now: `metric` holds the labels, `value` time and value."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def selectors(self, expression: str) -> list[Selector]:
        """Everything that an expression reads, as Prometheus' own parser understands it."""
        return list(_selectors(self._get("parse_query", query=expression)))

    def rules(self) -> list[dict[str, Any]]:
        """The alerting rules with their health and state."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def close(self) -> None:
        """Let go of the connection."""
        self._http.close()

    def _get(self, path: str, **parameters: str) -> Any:
        answer = self._http.get(path, params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]


@contextmanager
def run_prometheus(
    folder: Path, target: str, *, labels: Mapping[str, str], rules: Mapping[str, Any]
) -> Iterator[Prometheus]:
    """Run a Prometheus in `folder` that scrapes `target`, host and port, and evaluates `rules`, a rule file's content.

    Args:
        folder: takes its data and its log.
        target: host and port that serve /metrics.
        labels: what a monitor of the Prometheus operator adds to every series, such as the namespace.
        rules: what stands in a rule file.

    Raises:
        StartError: it did not come up; the text holds the end of its log.
    """
    configuration = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "operator", "static_configs": [{"targets": [target], "labels": dict(labels)}]}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.yaml").write_text(yaml.safe_dump(dict(rules)))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    url = f"http://{HOST}:{unused_port()}"
    server = Server(
        "prometheus",
        [
            binary("prometheus"),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={url.removeprefix('http://')}",
            "--log.level=warn",
        ],
        folder / "prometheus.log",
        ready=lambda: _is_ready(url),
    )
    prometheus = Prometheus(url)
    try:
        server.start()
        yield prometheus
    finally:
        prometheus.close()
        server.stop()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _selectors(node: Any) -> Iterator[Selector]:
    """Of a parsed query, at any depth."""
    if isinstance(node, list):
        for part in node:
            yield from _selectors(part)
    elif isinstance(node, dict):
        if node.get("type") in ("vectorSelector", "matrixSelector"):
            matchers = ((each["name"], each["type"], each["value"]) for each in node["matchers"])
            yield Selector(node["name"], tuple(matcher for matcher in matchers if matcher[0] != "__name__"))
        yield from _selectors([value for key, value in node.items() if key != "matchers"])
