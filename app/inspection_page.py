"""What an inspection of data looks like: the length histogram as a picture, and the findings as a page."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from app.data.inspection import Inspection, percentiles
from app.errors import ConfigError
from app.report import page_template

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "inspection.html.jinja"
PICTURES = (".png", ".svg")
PAGES = (".html",)
LABELS = {
    "rows": "rows",
    "trees": "conversation trees",
    "messages": "messages",
    "sft_threads": "SFT: threads",
    "rm_groups": "reward model: ranked groups",
    "rm_pairs": "reward model: ordered pairs",
    "rl_prompts": "PPO: prompts",
    "quarantined": "rows set aside",
    "duplicates": "threads that occur again",
    "leakage": "first turns on both sides of the split",
    "truncated": "threads longer than data.max_length",
    "round_trip_failures": "threads whose text does not come back from their tokens",
}


def check_plot_file(file: Path) -> None:
    """Raises ConfigError for a file type that `write_plot` does not write."""
    if file.suffix not in (*PICTURES, *PAGES):
        raise ConfigError(f"--plot {file}: give a file that ends in {', '.join((*PICTURES, *PAGES))}")


def write_plot(inspection: Inspection, file: Path, name: str) -> None:
    """The length histogram as a picture or, in an .html file that needs nothing else, with all that was found."""
    if file.suffix in PICTURES:
        draw_lengths(inspection).savefig(file)
        return
    facts = inspection.as_dict()
    page = page_template(TEMPLATE).render(
        name=name,
        inspection=inspection,
        counts=[(label, facts[key]) for key, label in LABELS.items() if facts[key] is not None],
        percentiles=percentiles(inspection.lengths),
        histogram=Markup(_svg(inspection)) if inspection.lengths else "",  # safe: drawn from numbers only
    )
    file.write_text(page, encoding="utf-8")


def draw_lengths(inspection: Inspection) -> Figure:
    """How many threads have how many words or tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="tight")
    axes = figure.subplots()
    axes.hist(inspection.lengths, bins=40)
    axes.set(xlabel=f"{inspection.unit} per SFT thread", ylabel="threads", title=f"{inspection.format}: {len(inspection.lengths)} threads")
    return figure


def _svg(inspection: Inspection) -> str:
    out = StringIO()
    draw_lengths(inspection).savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return out.getvalue()[out.getvalue().index("<svg") :]
