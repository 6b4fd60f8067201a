"""docs/grafana/morphserve.json asks for nothing that the server does not export."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_engine import make_snapshot
from prometheus_client.parser import text_string_to_metric_families

from morphserve.runtime.exposition import Server
from morphserve.runtime.metrics import Metrics, RequestTimer

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "docs" / "grafana" / "morphserve.json").read_text("utf-8")
)
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Names of samples, with the labels each has."""
    metrics = Metrics(make_snapshot)
    timer = RequestTimer(metrics, received=0.0)
    timer.tokens(1, at_s=0.5)
    timer.finish("stop", "cmpl-1-0", 3)
    text = metrics.exposition(Server("demo", {"load": 1.0}, {"queue_full": 1})).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def test_every_metric_of_the_dashboard_is_exported(exported: dict[str, set[str]]) -> None:
    names = {name for query in QUERIES for name in re.findall(r"morph:\w+", query)}
    assert len(names) > 20
    assert names - exported.keys() == set()


def test_every_label_of_the_dashboard_is_exported(exported: dict[str, set[str]]) -> None:
    grouped = [re.search(r"sum by \((\w+)\) \(\D*?(morph:\w+)", query) for query in QUERIES]
    found = [(match[2], match[1]) for match in grouped if match]
    assert len(found) > 5
    assert [pair for pair in found if pair[1] not in exported[pair[0]]] == []


def test_no_panel_lies_over_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
