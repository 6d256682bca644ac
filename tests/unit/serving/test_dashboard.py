"""The Grafana dashboard asks for metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ray

ROOT = Path(__file__).resolve().parents[3]
SUFFIXES = re.compile(r"_(total|bucket|sum|count)$")


def test_every_metric_of_the_dashboard_exists() -> None:
    board = json.loads((ROOT / "deploy" / "grafana" / "scoring.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    expressions += [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]
    asked = set(re.findall(r"\bray_\w+", " ".join(expressions)))
    ours = set(re.findall(r'"(corral_scoring_\w+)"', (ROOT / "serve" / "replica_metrics.py").read_text()))
    package = Path(ray.__file__).parent  # where Serve defines its metrics, and the dashboards that Ray ships
    sources = [*package.glob("serve/_private/*.py"), *package.glob("dashboard/modules/metrics/dashboards/serve*_panels.py")]
    serves = set(re.findall(r"\b(?:ray_)?(serve_\w+)", "".join(source.read_text() for source in sources)))
    for name in asked:
        assert {name.removeprefix("ray_"), SUFFIXES.sub("", name).removeprefix("ray_")} & (ours | serves), name
    shown = {SUFFIXES.sub("", name).removeprefix("ray_") for name in asked}
    assert ours <= shown, "a metric of ours that nobody sees"
