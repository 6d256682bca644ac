"""The figures of a search as coordinates, in the units of an SVG view box; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.report import title
from app.search.axes import Axis
from app.search.records import BROKEN, CURVES, UNTRIED
from app.search.results import Search, Trial

WORST, BEST = (0xC4, 0xD8, 0xE2), (0x12, 0x4A, 0x66)
"""Colours of the lowest and the highest objective."""
WINNER, BROKE, NO_END = "#d9661f", "#a8443a", "#9aa5ae"
WIDTH, TOP, HEIGHT, MARGIN, ABSENT = 1000.0, 34.0, 330.0, 70.0, 34.0
"""Of parallel coordinates: width of the figure, room above for one row of names, height of an axis, margin at both sides, and how far
below an axis the place for `has no value` is."""
NAME_WIDTH, NAME_ROW = 7.6, 18.0
"""Of the names above the axes: one letter, and one row."""
PLOT = (46.0, 14.0, 440.0, 220.0)
"""Left, top, right and bottom of the area of curves and of the scatter plot, in a view box of 450 x 262."""
MOST_POINTS = 200
"""Of one curve; longer ones are thinned out."""


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One trial in a figure. paths: runs of points without a gap, as SVG has them; dots: points that stand alone."""

    trial: Trial
    paths: tuple[str, ...]
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Column:
    """One axis of the parallel coordinates, at `x`; its name stands at `name_y`."""

    name: str
    x: float
    name_y: float
    ticks: tuple[Tick, ...]
    absent: str


@dataclass(frozen=True)
class Parallel:
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    top: float
    bottom: float
    absent_y: float | None


@dataclass(frozen=True)
class Plot:
    """A figure with an axis at the left, which `title` names, and one at the bottom, which `x_name` names.

    steps: corners of the Pareto front, as SVG has them; limit_x: where the KL budget ends, None where that is not in the figure."""

    title: str
    x_name: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    steps: str = ""
    limit_x: float | None = None


def colours(search: Search) -> Mapping[str, str]:
    """Trial -> colour: the best and those that broke have one of their own, the others one by the rank of their objective."""
    ranked = [trial.name for trial in reversed(search.trials) if trial.objective is not None]
    shades = {}
    for trial in search.trials:
        share = ranked.index(trial.name) / max(1, len(ranked) - 1) if trial.name in ranked else 0.0
        ramp = "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(WORST, BEST, strict=True))
        shades[trial.name] = (
            WINNER if trial.name == search.best else BROKE if trial.status in BROKEN else NO_END if trial.status in UNTRIED else ramp
        )
    return shades


def parallel(search: Search) -> Parallel:
    """Parallel coordinates: an axis per searched key, the objective last; the best trial is drawn last, on top."""
    columns: dict[str, Sequence[Any]] = {key: search.column(key) for key in search.keys}
    columns["objective"] = [trial.objective for trial in search.trials]
    spacing = (WIDTH - 2 * MARGIN) / max(1, len(columns) - 1)
    rows = math.ceil(max(map(len, columns)) * NAME_WIDTH / spacing)
    top = TOP + (rows - 1) * NAME_ROW
    absent_y = top + HEIGHT + ABSENT if any(value is None for values in columns.values() for value in values) else None
    drawn, heights = [], []
    for number, (name, values) in enumerate(columns.items()):
        axis = Axis.of(values, log=search.logarithmic.get(name))
        x = MARGIN + number * spacing
        ticks = tuple(Tick(top + (1 - place) * HEIGHT, text) for place, text in axis.ticks)
        absent = ("none" if name == "objective" else "not set") if None in values else ""
        drawn.append(Column(name, x, NAME_ROW * (1 + number % rows) - 4, ticks, absent))
        places = [axis.place(value) for value in values]
        heights.append([absent_y or 0.0 if place is None else top + (1 - place) * HEIGHT for place in places])
    lines = [
        Line(trial, (" ".join(f"{column.x:.1f},{ys[row]:.1f}" for column, ys in zip(drawn, heights, strict=True)),))
        for row, trial in enumerate(search.trials)
    ]
    return Parallel(tuple(drawn), tuple(reversed(lines)), top, top + HEIGHT, absent_y)


def curves(search: Search) -> list[Plot]:
    """A plot per metric of the history with the curves of all trials; metrics without a finite value are left out."""
    plots = []
    for name in CURVES:
        found = {trial.name: trial.curves.get(name, ()) for trial in search.trials}
        points = [point for of_trial in found.values() for point in of_trial]
        if any(math.isfinite(value) for _, value in points):
            x, y = Axis.of((step for step, _ in points), log=False), Axis.of((value for _, value in points), log=False)
            heading = "Objective" if name == "objective" else "KL to the reference, nats" if name == "kl" else title(name)
            lines = [_curve(trial, found[trial.name], x, y) for trial in reversed(search.trials) if found[trial.name]]
            plots.append(Plot(heading, "PPO step", *_ticks(x, y), tuple(lines)))
    return plots


def pareto(search: Search) -> Plot | None:
    """Score against KL of every trial that has both, and the front of those that hold; None where no trial has both."""
    points = [trial for trial in search.trials if trial.score is not None and trial.kl is not None]
    if not points:
        return None
    x = Axis.of(trial.kl for trial in points)
    y = Axis.of((trial.score for trial in points), log=False)
    lines = tuple(Line(trial, (), (_point(x, y, trial.kl, trial.score),)) for trial in reversed(points))
    corners: list[tuple[float, float]] = []
    for trial in search.front():
        at = _point(x, y, trial.kl, trial.score)
        corners += [(at[0], corners[-1][1]), at] if corners else [at]
    budget = search.kl_budget
    limit_x = _point(x, y, budget, y.low)[0] if budget is not None and x.low < budget < x.high else None
    return Plot("Score", "KL, nats", *_ticks(x, y), lines, " ".join(f"{a:.1f},{b:.1f}" for a, b in corners), limit_x)


def _curve(trial: Trial, points: Sequence[tuple[int, float]], x: Axis, y: Axis) -> Line:
    kept = points[:: max(1, math.ceil(len(points) / MOST_POINTS))]
    if kept[-1] != points[-1]:
        kept = [*kept, points[-1]]
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in kept:
        if math.isfinite(value):
            runs[-1].append(_point(x, y, step, value))
        elif runs[-1]:
            runs.append([])
    paths = tuple(" ".join(f"{a:.1f},{b:.1f}" for a, b in run) for run in runs if len(run) > 1)
    return Line(trial, paths, tuple(run[0] for run in runs if len(run) == 1))


def _point(x: Axis, y: Axis, at: Any, value: Any) -> tuple[float, float]:
    left, top, right, bottom = PLOT
    return left + (x.place(at) or 0.0) * (right - left), bottom - (y.place(value) or 0.0) * (bottom - top)


def _ticks(x: Axis, y: Axis) -> tuple[tuple[Tick, ...], tuple[Tick, ...]]:
    left, top, right, bottom = PLOT
    across = tuple(Tick(left + place * (right - left), text) for place, text in x.ticks)
    return across, tuple(Tick(bottom - place * (bottom - top), text) for place, text in y.ticks)
