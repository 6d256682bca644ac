"""The curves of a run: read from metrics.jsonl, drawn as SVG that stands inside an HTML page."""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import CheckpointError, first_line

INK, MUTED, RULE, LINE = "#1f2933", "#7b8794", "#e4e7eb", "#2f6f8f"
SMOOTH_FROM = 40
"""Points from which a curve is drawn faintly, with its running mean on top."""
SIZE_INCHES = (4.0, 2.1)
AXES_BOX = (0.115, 0.11, 0.87, 0.79)
"""Left, bottom, width, height, as shares of the figure: fixed, because laying each figure out takes longer than drawing it."""


@dataclass
class Curve:
    """One metric of one stage. `points`: step -> value, None where the value was not finite."""

    name: str
    points: dict[int, float | None] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """How many values were NaN or infinite."""
        return sum(value is None for value in self.points.values())

    @property
    def last(self) -> float | None:
        return next((value for _, value in sorted(self.points.items(), reverse=True) if value is not None), None)


def read_curves(path: Path) -> dict[str, dict[str, Curve]]:
    """Stage -> metric -> curve, in the order of first appearance. A step logged again after a resume has the later value.

    Raises CheckpointError for a line that is none of ours."""
    stages: dict[str, dict[str, Curve]] = defaultdict(dict)
    if not path.exists():
        return {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # the run is still writing it
            try:
                event: Mapping[str, Any] = json.loads(line)
                stage, step, metrics = event["stage"], event["step"], event["metrics"].items()
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{path}:{number}: no line of a run's metrics ({type(error).__name__}: {first_line(error)}): mend or remove that line"
                ) from error
            for name, value in metrics:
                stages[stage].setdefault(name, Curve(name)).points[step] = value
    return dict(stages)


def running_mean(values: list[float], window: int) -> list[float]:
    """Centred mean over up to `window` neighbours, NaN skipped; same length as `values`."""
    half = window // 2
    means = []
    for i in range(len(values)):
        near = [value for value in values[max(0, i - half) : i + half + 1] if not math.isnan(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def draw(curve: Curve) -> str:
    """The curve as an SVG element: no fixed size, no fonts and no references to anything outside itself."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = sorted(curve.points)
    values = [math.nan if (value := curve.points[step]) is None else value for step in steps]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": curve.name, "font.size": 8, "axes.formatter.limits": (-3, 5)}):
        figure = Figure(figsize=SIZE_INCHES)
        axes = figure.add_axes(AXES_BOX)
        noisy = len(steps) >= SMOOTH_FROM
        marker = "o" if len(steps) < SMOOTH_FROM // 2 else ""
        axes.plot(steps, values, color=LINE, linewidth=1.4, marker=marker, markersize=3, alpha=0.28 if noisy else 1.0)
        if noisy:
            axes.plot(steps, running_mean(values, max(5, len(steps) // 15)), color=LINE, linewidth=1.8)
        for step in (step for step in steps if curve.points[step] is None):
            axes.axvline(step, color="#c0392b", linewidth=0.8, alpha=0.6)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.tick_params(colors=MUTED, length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.02, y=0.08)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]
