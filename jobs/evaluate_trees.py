"""`corral evaluate trees`: sampling reports as conversation trees for people to rank."""

from __future__ import annotations

import argparse
import json
import sys

from app.errors import ConfigError, DataError
from jobs.command import Tool, output_path, tool_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The reports, and what the trees are like."""
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="JSON files of `corral evaluate samples`; answers to one prompt meet")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines file for the trees")
    parser.add_argument("--replies", type=int, default=5, metavar="N", help="most replies of a tree, at least 2 (default 5)")
    parser.add_argument("--lang", default="en", help="language that the messages are marked with (default en)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice where there are more replies (default 0)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write the trees, and tell which prompts gave none."""
    tool_recipe("evaluate trees", (), overrides)
    if arguments.replies < 2:
        raise ConfigError(f"--replies={arguments.replies}: one reply cannot be ranked; give 2 or more")
    from app.evaluation.sampling_report import read_report
    from app.evaluation.synthetic_trees import synthetic_trees

    reports = [read_report(file) for file in arguments.reports]
    file = output_path(arguments.output)
    made = synthetic_trees(reports, max_replies=arguments.replies, lang=arguments.lang, seed=arguments.seed)
    if not made.trees:
        reasons = ", ".join(made.left_out)
        raise DataError(f"{', '.join(arguments.reports)}: no prompt can be ranked ({reasons}); sample with a higher --num-samples")
    file.write_text("".join(json.dumps(tree, ensure_ascii=False) + "\n" for tree in made.trees), encoding="utf-8")
    sys.stdout.writelines(f"left out {count}: {reason}\n" for reason, count in made.left_out.items())
    sys.stdout.write(f"{len(made.trees)} trees: {file}\n")
    return 0


TOOL = Tool(
    purpose="make sampling reports into conversation trees to rank",
    details=(
        "One tree per prompt with at least two distinct answers, in the OASST export format: state `ranking`, answers marked synthetic\n"
        "and named after their model and sampling. The trees train nothing before people have ranked them.\n\n"
        "example:\n  corral evaluate trees sft.json ppo.json --output to-rank.jsonl"
    ),
    add_arguments=add_arguments,
    run=run,
)
