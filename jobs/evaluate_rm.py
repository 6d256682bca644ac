"""`corral evaluate rm`: a reward model on a ranked set."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.command import Tool, console, output_path, quiet_loading, tool_recipe

KEYS = ("data", "model.precision", "model.trust_remote_code", "rm.score_l2", "rm.loss", "rm.margin", "scoring.max_batch_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, the model, and where the results go."""
    parser.add_argument("source", metavar="SOURCE", help="ranked replies: what data.path takes, in any format with ranks or preferences")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="reward model, such as runs/demo/rm/model")
    parser.add_argument("--json", metavar="FILE", help="write the results there, as one JSON object")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Score every group of the set, and print the metrics."""
    recipe = tool_recipe("evaluate rm", KEYS, overrides, {"data.path": arguments.source})
    file = output_path(arguments.json) if arguments.json else None
    from app.data.corpus import load_corpus
    from app.durable import without_non_finite, write_json
    from app.evaluation.local_scorer import check_scorer
    from app.evaluation.ranked_set import evaluate_ranked_set

    check_scorer(arguments.model, recipe)
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus(recipe.data, seed=recipe.run.seed, folder=Path(folder), split=False)
    quiet_loading()
    results = evaluate_ranked_set(arguments.model, corpus, recipe) | {"dataset": arguments.source}
    if file is not None:
        write_json(file, without_non_finite(results))
    show(results)
    return 0


def show(results: Mapping[str, Any]) -> None:
    """The results as a table."""
    from rich.table import Table

    table = Table("metric", "value", show_edge=False)
    for name, value in results.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console().print(table)


TOOL = Tool(
    purpose="measure a reward model on any ranked set",
    details=(
        "Scores every reply of every ranked group in SOURCE, no side of a split left out, and prints the metrics of the reward-model\n"
        "stage beside what reply length alone would get (the longer reply wins). Runs in this process, on the GPU where there is one.\n\n"
        "example:\n  corral evaluate rm trees.jsonl --model runs/demo/rm/model --json rm.json"
    ),
    add_arguments=add_arguments,
    run=run,
    keys=KEYS,
)
