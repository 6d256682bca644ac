"""`corral evaluate score`: what a reward model thinks of a sampling report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.command import Tool, console, output_path, quiet_loading, tool_recipe

KEYS = ("data.template", "data.max_length", "model.precision", "model.trust_remote_code", "scoring.max_batch_tokens")
"""What tools that score replies read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The report, the model, and where the means go."""
    parser.add_argument("report", metavar="REPORT", help="JSON file of `corral evaluate samples`")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="reward model, such as runs/demo/rm/model")
    parser.add_argument("--output", metavar="FILE", help="where the means are written (default: REPORT with the ending .scores.json)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Score every output, write and print the means."""
    recipe = tool_recipe("evaluate score", KEYS, overrides)
    from app.durable import write_json
    from app.evaluation.reply_scores import score_summary
    from app.evaluation.sampling_report import read_report

    report = read_report(arguments.report)
    file = output_path(arguments.output or str(Path(arguments.report).with_suffix(".scores.json")))
    from app.evaluation.local_scorer import LocalScorer

    quiet_loading()
    summary = score_summary(report, LocalScorer(arguments.model, recipe), reward_model=arguments.model)
    write_json(file, summary)
    show(summary["results"])
    sys.stdout.write(f"{file}\n")
    return 0


def show(means: dict[str, float]) -> None:
    """The means as a table."""
    from rich.table import Table

    table = Table("sampling configuration", "mean score", show_edge=False)
    for name, mean in means.items():
        table.add_row(name, f"{mean:.4f}")
    console().print(table)


TOOL = Tool(
    purpose="score a sampling report with a reward model",
    details=(
        "Scores every output of REPORT (logit - reward_offset) and prints and writes the mean per sampling configuration and over all\n"
        "outputs (mean_reward). Runs in this process, on the GPU where there is one.\n\n"
        "example:\n  corral evaluate score report.json --model runs/demo/rm/model"
    ),
    add_arguments=add_arguments,
    run=run,
    keys=KEYS,
)
