"""`corral data inspect`: what a data source holds."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import Tool, output_path, tool_recipe

if TYPE_CHECKING:
    from app.data.inspection import Inspection

KEYS = ("data", "run.seed")
SHOWN_CHARACTERS = 70


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["inspect"], help="count, measure and check a source; nothing is trained")
    parser.add_argument("source", metavar="SOURCE", help="what data.path takes: file, folder, glob, URL, hub name or `embedded`")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="measure lengths in this model's tokens, and try the round trip through them")
    parser.add_argument("--plot", metavar="FILE", help="write the length histogram there (.png, .svg), or all findings as a page (.html)")
    parser.add_argument("--quarantine", metavar="FILE", help="keep the rows that cannot be used, with line and reason, as JSON lines")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Read the source as training would, and describe it."""
    recipe = tool_recipe("data", KEYS, overrides, {"data.path": arguments.source})
    plot, kept = (output_path(path) if path else None for path in (arguments.plot, arguments.quarantine))
    from app.data.corpus import QUARANTINE, load_corpus
    from app.data.inspection import inspect_corpus
    from app.data.templates import build_template
    from app.inspection_page import check_plot_file, write_plot
    from app.models.load import check_model_folder, load_tokenizer

    if plot is not None:
        check_plot_file(plot)
    template = None
    if arguments.tokenizer is not None:
        check_model_folder(arguments.tokenizer, chat_template=False)
        template = build_template(recipe.data.template, load_tokenizer(arguments.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        quarantine = Path(folder) / QUARANTINE
        try:
            corpus = load_corpus(recipe.data, seed=recipe.run.seed, folder=Path(folder))
            inspection = inspect_corpus(corpus, Path(folder), template, recipe.data.max_length)
        finally:  # most of all where no row can be used
            if kept is not None and quarantine.is_file():
                shutil.copyfile(quarantine, kept)
    if plot is not None:
        write_plot(inspection, plot, arguments.source)
    if arguments.json:
        sys.stdout.write(json.dumps(inspection.as_dict() | {"peak_memory": peak_memory()}) + "\n")
    else:
        show(inspection)
    return 0


def peak_memory() -> int:
    """The most that this process has held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(inspection: Inspection) -> None:
    """The findings for people, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from app.data.inspection import histogram

    console = Console(highlight=False, soft_wrap=True)
    facts = inspection.as_dict()
    table = Table("count", inspection.format, show_edge=False)
    for name in ("rows", "trees", "messages", "sft_threads", "rm_groups", "rm_pairs", "rl_prompts", "quarantined", "duplicates", "leakage"):
        table.add_row(name, f"{facts[name]:,}")
    for name in ("truncated", "round_trip_failures"):
        if facts[name] is not None:
            table.add_row(name, f"{facts[name]:,}")
    console.print(table)
    console.print(f"peak memory {peak_memory() / 2**30:.2f} GiB")
    if inspection.languages:
        console.print("languages of the trees: " + ", ".join(f"{lang} {count}" for lang, count in inspection.languages.items()))
    for line in inspection.left_out:
        console.print(line, markup=False)
    for reason, count in inspection.reasons.items():
        console.print(f"set aside {count}: {reason}", markup=False)
    if not inspection.lengths:
        return
    bins = histogram(inspection.lengths)
    percentiles = ", ".join(f"{name} {length:,}" for name, length in facts["length_percentiles"].items())
    console.print(f"\nlength of SFT threads in {inspection.unit}: {percentiles}", markup=False)
    highest = max((count for _, _, count in bins), default=1)
    for low, high, count in bins:
        console.print(f"{low:>7}-{high - 1:<7} {count:>7}  {'█' * round(40 * count / highest)}")
    for length, text in inspection.longest:
        console.print(f"longest: {length} {inspection.unit}: {' '.join(text.split())[:SHOWN_CHARACTERS]}", markup=False)


TOOL = Tool(
    purpose="look at a data source before training on it",
    details=(
        "Counts what each stage would get, languages, lengths, duplicates, conversations on both sides of the split, and rows that\n"
        "cannot be used. Reads SOURCE as training does: every data.* key may follow, as in --data.format=hh or --data.lang='[]'.\n\n"
        "example:\n  corral data inspect trees.jsonl --json"
    ),
    add_arguments=add_arguments,
    run=run,
    keys=KEYS,
)
