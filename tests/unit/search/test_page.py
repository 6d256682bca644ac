"""The page of a search, and where values lie in its figures."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from app.search.axes import Axis
from app.search.figures import PLOT, colours, curves, parallel, pareto
from app.search.page import write_page
from app.search.results import Search
from tests.unit.search.searches import point, row, write_search

LR = "ppo.policy.lr"
CONFIGS: list[dict[str, Any]] = [
    {LR: 1e-4, "ppo.algorithm": "ppo", "ppo.lambda": 0.9},
    {LR: 1e-3, "ppo.algorithm": "grpo"},
    {LR: 1e-5, "ppo.algorithm": "<b>grpo</b>"},
]


class Tags(HTMLParser):
    """Which elements a page opens, and whether each is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def three(folder: Path) -> Search:
    rows = [
        row("a", CONFIGS[0], 0.5, kl=2.0),
        row("b", CONFIGS[1], None, "diverged", why="score fell", kl=30.0, score=0.1),
        row("c", CONFIGS[2], None, "failed", score=None, kl=None, error="<script>lost</script>"),
    ]
    history = [*(point("a", step, 0.1 * step) for step in range(1, 5)), point("b", 1, 1.0), point("b", 2, math.nan), point("b", 3, 1.0)]
    return Search.read(write_search(folder, rows, "a", history))


def test_the_page_needs_nothing_else_and_shows_every_trial_everywhere(tmp_path: Path) -> None:
    page = write_page(three(tmp_path)).read_text()
    assert not re.search(r"https?://|<link|src=|@import|url\(", page)
    tags = Tags(page)
    assert not tags.open
    of_a = [tag for tag, attributes in tags.seen if "t0" in (attributes.get("class") or "").split()]
    assert of_a.count("g") == 1 + 1 + 5  # parallel coordinates, scatter plot, five curves
    assert of_a.count("tr") == 2  # the front and the table
    assert "--ppo.policy.lr=0.0001" in page
    assert "score fell" in page
    assert "<script>lost" not in page and "<b>grpo" not in page


@pytest.mark.parametrize("status", ["finished", "failed", "diverged"])
def test_one_trial_makes_a_page(tmp_path: Path, status: str) -> None:
    objective = 1.0 if status == "finished" else None
    search = Search.read(write_search(tmp_path, [row("a", CONFIGS[0], objective, status, score=objective)], "a" if objective else None))
    page = write_page(search).read_text()
    assert not Tags(page).open
    assert ("No trial came to an end" in page) == (status != "finished")


def test_values_lie_where_they_belong() -> None:
    log = Axis.of([1e-5, 1e-4, 1e-3])
    assert log.log and log.place(1e-4) == pytest.approx(0.5)
    assert not Axis.of([1e-5, 1e-3], log=False).log
    assert not Axis.of([0.0, 1e-3], log=True).log
    assert Axis.of([3.0, 5.0, None, math.nan]).place(4.0) == pytest.approx(0.5)
    assert Axis.of([2.0, 2.0]).place(2.0) == pytest.approx(0.5)
    names = Axis.of(["ppo", "grpo", "rloo", None])
    assert [names.place(name) for name in ("grpo", "ppo", "rloo", None)] == [0, 0.5, 1, None]
    assert Axis.of(["ppo"]).place("ppo") == 0.5
    assert Axis.of([True, False]).place(True) == 1
    assert Axis.of([]).place(math.nan) is None


def test_marks_stand_at_round_values_or_at_the_few_that_there_are() -> None:
    assert [text for _, text in Axis.of([1, 2, 4]).ticks] == ["1", "2", "4"]
    assert [text for _, text in Axis.of([0.1, 9.8]).ticks] == ["0.1", "0.2", "0.5", "1", "2", "5"]
    assert [text for _, text in Axis.of([1e-9, 1.0]).ticks] == ["1e-09", "1e-07", "1e-05", "0.001", "0.1"]
    assert [text for _, text in Axis.of([7.0]).ticks] == ["7"]
    assert len(Axis.of(list(range(100))).ticks) <= 6


def test_a_trial_without_a_value_runs_through_the_place_below(tmp_path: Path) -> None:
    figure = parallel(three(tmp_path))
    assert [column.name for column in figure.columns] == [LR, "ppo.algorithm", "ppo.lambda", "objective"]
    assert [column.absent for column in figure.columns] == ["", "", "not set", "none"]
    assert figure.absent_y is not None
    heights = {line.trial.name: [float(pair.split(",")[1]) for pair in line.paths[0].split()] for line in figure.lines}
    assert heights["b"] == pytest.approx([figure.top, heights["b"][1], figure.absent_y, figure.absent_y])
    assert heights["a"][0] == pytest.approx((figure.top + figure.bottom) / 2, abs=0.1)
    assert [line.trial.name for line in figure.lines][-1] == "a"


def test_a_curve_has_a_gap_where_a_value_is_not_finite(tmp_path: Path) -> None:
    plot = curves(three(tmp_path))[0]
    lines = {line.trial.name: line for line in plot.lines}
    assert len(lines["a"].paths) == 1 and not lines["a"].dots
    assert not lines["b"].paths and len(lines["b"].dots) == 2
    assert "c" not in lines


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    history = [point("a", step, float(step)) for step in range(1, 5001)]
    search = Search.read(write_search(tmp_path, [row("a", {}, 1.0)], "a", history))
    points = curves(search)[0].lines[0].paths[0].split()
    assert len(points) <= 202
    assert points[-1] == f"{PLOT[2]:.1f},{PLOT[1]:.1f}"


def test_the_budget_is_drawn_where_the_figure_reaches_it(tmp_path: Path) -> None:
    search = three(tmp_path)
    within, beyond = (Search(search.path, search.trials, search.best, {}, budget) for budget in (10.0, 100.0))
    inside, outside = pareto(within), pareto(beyond)
    assert inside is not None and inside.limit_x is not None and PLOT[0] < inside.limit_x < PLOT[2]
    assert outside is not None and outside.limit_x is None


def test_the_best_stands_out(tmp_path: Path) -> None:
    shades = colours(three(tmp_path))
    assert len({*shades.values()}) == 3
