"""`tune.html`: what a search tried and found, in one file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.headline import number
from app.report import page_template
from app.search.figures import PLOT, WIDTH, colours, curves, parallel, pareto
from app.search.importance import importances
from app.search.records import BROKEN, UNTRIED
from app.search.results import Search, Trial, as_options

PAGE = "tune.html"
TEMPLATE = "search/page.html.jinja"


def write_page(search: Search) -> Path:
    """Write `tune.html` into the run folder and return its path."""
    classes = {trial.name: line_classes(search, index) for index, trial in enumerate(search.trials)}
    page = page_template(TEMPLATE).render(
        name=search.path.resolve().name,
        folder=search.path,
        search=search,
        winner=search.winner,
        classes=classes,
        labels={trial.name: label(trial) for trial in search.trials},
        shades=colours(search),
        parallel=parallel(search),
        importances=importances(search),
        plots=curves(search),
        pareto=pareto(search),
        front=search.front(),
        counts={kind: sum(name.endswith(kind) for name in classes.values()) for kind in ("broken", "failed")},
        explained=any(trial.why or trial.error for trial in search.trials),
        area=PLOT,
        width=WIDTH,
        number=number,
        value_text=value_text,
        options=as_options(search.winner.config) if search.winner else [],
    )
    path = search.path / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def line_classes(search: Search, index: int) -> str:
    """CSS classes of everything that stands for a trial: `tN` ties its places on the page together."""
    trial = search.trials[index]
    kind = "best" if trial.name == search.best else "broken" if trial.status in BROKEN else "failed" if trial.status in UNTRIED else ""
    return f"trial t{index} {kind}".strip()


def label(trial: Trial) -> str:
    """What a figure says where the pointer rests on a trial."""
    numbers = [
        f"{name} {number(value)}"
        for name, value in (("objective", trial.objective), ("score", trial.score), ("KL", trial.kl))
        if value is not None
    ]
    settings = [f"{key} = {value_text(value)}" for key, value in trial.config.items()]
    return "\n".join([f"{trial.name}: {trial.status} after {trial.steps} steps", *([", ".join(numbers)] if numbers else []), *settings])


def value_text(value: Any) -> str:
    """A searched value for people; a dash where the trial has none."""
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
