"""`report.html`: what a run did, in one file that needs nothing else. Written from what lies in the run folder, at any time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from app.curves import Curve, draw, read_curves
from app.display import duration
from app.durable import read_json
from app.headline import cards, comparison, facts, number, stage_seconds, stage_title
from app.run_folder import leaves
from app.run_layout import EVENTS_FILE, EXAMPLES_FILE, MANIFEST, METRICS_FILE, REPORT_FILE, SUMMARY_FILE

TEMPLATE = "report.html.jinja"
METRICS = {
    "loss": "Training loss",
    "eval_loss": "Held-out loss",
    "eval_pair_accuracy": "Held-out pair accuracy",
    "eval_best_vs_worst": "Held-out best against worst",
    "eval_score_mean": "Held-out score, before the offset",
    "eval_score_std": "Spread of held-out scores",
    "score_mean": "Reward-model score",
    "score_std": "Spread of the scores",
    "holdout_score": "Held-out reward",
    "reward_disagreement": "Disagreement of the reward models",
    "response_length": "Answer length, tokens",
    "repetition_share": "Share of repeated 4-grams",
    "finished_share": "Share of finished answers",
    "tokens_per_second": "Tokens per second",
    "entropy": "Entropy, nats per token",
    "approx_kl": "KL of one update, nats per token",
    "clip_fraction": "Share of clipped ratios",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
}


@dataclass(frozen=True)
class Plot:
    """A drawn curve: its title in words, the metric's name, its last value, how many values were not finite."""

    title: str
    name: str
    last: str
    missing: int
    svg: Markup


def write_report(run_path: Path) -> Path:
    """Write `report.html` into a run folder and return its path. What is not there yet (summary, answers, curves) is left out."""
    summary = _optional(run_path / SUMMARY_FILE)
    manifest = _optional(run_path / MANIFEST)
    curves = read_curves(run_path / METRICS_FILE)
    page = page_template(TEMPLATE).render(
        name=run_path.resolve().name,
        started=_date(manifest.get("created")),
        sessions=manifest.get("sessions", []),
        complete=bool(summary),
        cards=cards(summary),
        rows=comparison(summary),
        facts=facts(summary),
        seconds=stage_seconds(summary),
        events=[(stage_title(event["stage"]), event["step"], event["text"]) for event in read_lines(run_path / EVENTS_FILE)],
        examples=read_lines(run_path / EXAMPLES_FILE),
        stages=[(stage_title(stage), *plots(metrics)) for stage, metrics in curves.items()],
        chain=chain(manifest),
        config_text="\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in leaves(manifest.get("config", {}))),
        number=number,
    )
    path = run_path / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def page_template(name: str) -> Template:
    """One of the HTML templates beside this module; what is put into it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _date(timestamp: float | None) -> str:
    return "" if timestamp is None else datetime.fromtimestamp(timestamp, UTC).strftime("%-d %B %Y, %H:%M UTC")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file. examples.jsonl: prompt, before, after, and their reward and gold scores (null where unknown)."""
    if not path.exists():
        return []
    *complete, _ = path.read_text(encoding="utf-8").split("\n")  # the last one may still be written; `splitlines` ends them at U+2028 too
    return [json.loads(line) for line in complete]


def plots(metrics: Mapping[str, Curve]) -> tuple[list[Plot], list[Plot], list[tuple[str, str]]]:
    """Main curves, those with a `/` in their name (timings and internals), and metrics that have only one point."""
    single = [(title(name), number(curve.last)) for name, curve in metrics.items() if len(curve.points) == 1]
    order = list(METRICS)
    names = [name for name, curve in metrics.items() if len(curve.points) > 1]
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    main = [_plot(metrics[name]) for name in names if "/" not in name]
    inner = [_plot(metrics[name]) for name in names if "/" in name]
    return main, inner, single


def _plot(curve: Curve) -> Plot:
    return Plot(title(curve.name), curve.name, number(curve.last), curve.missing, Markup(draw(curve)))  # safe: drawn from numbers only


def title(name: str) -> str:
    """A metric's name in words."""
    return METRICS.get(name) or name.replace("/", ": ").replace("_", " ").capitalize()


def chain(manifest: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """Data and finished stages with their content hashes and those of their parents, in the order they were made."""
    links: list[dict[str, Any]] = []
    if data := manifest.get("data"):
        links.append({"name": "Data", "sha256": data["sha256"], "parents": [], "detail": ""})
    for stage, record in sorted(manifest.get("stages", {}).items(), key=lambda item: item[1]["finished"]):
        parents = [f"{parent} {digest[:8]}" for parent, digest in record["parents"].items()]
        detail = f"{duration(record['seconds'])}, code {record['code_version']}"
        links.append({"name": stage_title(stage), "sha256": record["sha256"], "parents": parents, "detail": detail})
    return links
