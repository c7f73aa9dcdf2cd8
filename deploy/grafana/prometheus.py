# SPDX-License-Identifier: Apache-2.0
"""The dashboard's queries, and a client of Prometheus to run them. Shared by render.py and the tests."""

import json
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "dashboard.json"

Labels = dict[str, str]


@dataclass(frozen=True)
class Query:
    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """unit: as Grafana names it."""

    title: str
    unit: str
    queries: tuple[Query, ...]


def panels(rate_interval: str) -> Iterator[Panel]:
    """The dashboard's panels as Grafana queries them, with every model and replica chosen."""

    def filled(expression: str) -> str:
        expression = expression.replace("$__rate_interval", rate_interval)
        return re.sub(r"\$(model_name|instance)\b", ".*", expression)

    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] != "row":
            queries = tuple(Query(filled(target["expr"]), target["legendFormat"]) for target in panel["targets"])
            yield Panel(panel["title"], panel["fieldConfig"]["defaults"]["unit"], queries)


def series_name(legend: str, labels: Labels) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def query(self, expression: str, at: float) -> list[tuple[Labels, float]]:
        """The value of each series at a time (Unix, in seconds)."""
        result = self._ask("query", query=expression, time=at)
        return [(series["metric"], float(series["value"][1])) for series in result]

    def query_range(self, expression: str, begin: float, end: float, points: int = 120) -> list[tuple[Labels, Any]]:
        """Each series as pairs of time (Unix, in seconds) and value."""
        result = self._ask("query_range", query=expression, start=begin, end=end, step=max(1.0, (end - begin) / points))
        return [(series["metric"], [(at, float(value)) for at, value in series["values"]]) for series in result]

    def _ask(self, what: str, **parameters: Any) -> list[Any]:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]["result"]
