"""`corral evaluate best-of-n`: rejection sampling over a sampling report."""

from __future__ import annotations

import argparse
import sys

from app.errors import ConfigError
from jobs.command import Tool, output_path, quiet_loading, tool_recipe
from jobs.evaluate_score import KEYS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The report, the model, how many answers are kept and where they go."""
    parser.add_argument("report", metavar="REPORT", help="JSON file of `corral evaluate samples`")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="reward model, such as runs/demo/rm/model")
    parser.add_argument("--keep", type=int, default=3, metavar="N", help="answers selected per prompt (default 3)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for what is selected, what is rejected and their comparison")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Score every output, divide and write them."""
    recipe = tool_recipe("evaluate best-of-n", KEYS, overrides)
    if arguments.keep < 1:
        raise ConfigError(f"--keep={arguments.keep}: at least one answer per prompt is selected; give 1 or more")
    from app.evaluation.best_of_n import best_of_n, comparison, write_choices
    from app.evaluation.sampling_report import read_report

    report = read_report(arguments.report)
    folder = output_path(arguments.output, folder=True)
    from app.evaluation.local_scorer import LocalScorer

    quiet_loading()
    choices = best_of_n(report, LocalScorer(arguments.model, recipe), arguments.keep)
    files = write_choices(choices, folder)
    for name, part in comparison(choices).items():
        numbers = f": mean {part['mean']:.4f}, min {part['min']:.4f}, max {part['max']:.4f}" if part["count"] else ""
        sys.stdout.write(f"{name} {part['count']}{numbers}\n")
    sys.stdout.writelines(f"{file}\n" for file in files)
    return 0


TOOL = Tool(
    purpose="keep the answers of a sampling report that a reward model scores highest",
    details=(
        "Pools all outputs of each prompt, scores all of them, selects the best --keep and rejects the rest.\n"
        "Leaves selected_samples.json, rejected_samples.json, comparison.json (mean, min, max), and for\n"
        "`corral sft` selected.jsonl. Runs in this process, on the GPU where there is one.\n\n"
        "example:\n  corral evaluate best-of-n report.json --model runs/demo/rm/model --keep 1 --output best\n"
        "  corral sft RECIPE --data.path=best/selected.jsonl"
    ),
    add_arguments=add_arguments,
    run=run,
    keys=KEYS,
)
