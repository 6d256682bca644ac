"""`corral score`: every reply of a data source scored, offline."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.errors import ConfigError
from jobs.command import Tool, console, output_path, quiet_loading, tool_recipe

KEYS = ("data", "model.precision", "model.trust_remote_code", "scoring.max_batch_tokens")
_NAMED = re.compile(r"([\w.-]+)=(.+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The source, the models, and where the scores go."""
    parser.add_argument("source", metavar="FILE", help="conversations: what data.path takes, in any format")
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]FOLDER",
        help="reward model (gives score) or language model (gives the log-probs of replies); several need names",
    )
    parser.add_argument("--output", metavar="FILE", help="parquet file to write (default: FILE with the ending .scores.parquet)")
    parser.add_argument("--texts", action="store_true", help="keep conversations and replies beside their scores")
    parser.add_argument("--every-turn", action="store_true", help="score each answer of a conversation, not only its last")
    parser.add_argument("--part-rows", type=int, default=2048, metavar="N", help="replies after which progress is kept (default 2048)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object and nothing else")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Score what is not scored yet, and print the summary."""
    recipe = tool_recipe("score", KEYS, overrides, {"data.path": arguments.source})
    models = named(arguments.model)
    if arguments.part_rows < 1:
        raise ConfigError(f"--part-rows={arguments.part_rows}: must be at least 1")
    output = output_path(arguments.output or default_output(arguments.source))
    from app.evaluation.offline_scoring import Job, score_replies

    quiet_loading()
    summary = score_replies(Job(recipe, models, output, arguments.texts, arguments.every_turn, arguments.part_rows))
    if arguments.json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        show(summary)
    return 0


def named(models: Sequence[str]) -> dict[str, str]:
    """Folder by name; the only one needs none.

    >>> named(["rm=runs/a/rm/model", "ref=runs/a/sft/model"])
    {'rm': 'runs/a/rm/model', 'ref': 'runs/a/sft/model'}
    >>> named(["runs/a/rm/model"])
    {'': 'runs/a/rm/model'}
    """
    pairs = [match.groups() if (match := _NAMED.fullmatch(word)) else ("", word) for word in models]
    names = [name for name, _ in pairs]
    if len(pairs) > 1 and "" in names:
        raise ConfigError(f"--model {pairs[names.index('')][1]}: several models need names, as in --model rm=FOLDER --model ref=FOLDER")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--model: two models are called {twice}; give each a name of its own")
    return {name: str(Path(folder).expanduser()) for name, folder in pairs}


def default_output(source: str) -> str:
    """Beside a local file. Raises ConfigError where the source is no single file."""
    if not Path(source).expanduser().is_file():
        raise ConfigError(f"{source}: is no single file; say with --output where its scores go")
    name = Path(source).expanduser()
    return str(name.with_name(f"{name.name.split('.')[0]}.scores.parquet"))


def show(summary: Mapping[str, Any]) -> None:
    """The summary as a table."""
    from rich.table import Table

    table = Table("model", "number", "mean", "std", "replies", "truncated", show_edge=False)
    for name, model in summary["models"].items():
        for number in ("score", "logprob_sum", "logprob_mean"):
            if number in model:
                mean, std = (f"{model[number][key]:.4f}" for key in ("mean", "std"))
                table.add_row(name, number, mean, std, str(summary["replies"]), str(model["truncated"]))
    console().print(table)
    for count in ("quarantined", "without_reply"):
        if summary[count]:
            console().print(f"{summary[count]} rows {count.replace('_', ' ')}")
    sys.stdout.write(f"{summary['output']}\n")


TOOL = Tool(
    purpose="score every reply of a data source into a parquet file",
    details=(
        "Reads FILE as training does (any format, every data.* key may follow) and scores each reply behind its conversation: the\n"
        "last answer of chats, prompts and responses, all answers of trees, both of a preference pair, all of a ranked list. Columns:\n"
        "row, file, line, id, reply; per model score (logit - reward_offset) or logprob_sum and logprob_mean, tokens, truncated.\n"
        "Models' hashes stand in the file's metadata. Runs in this process, on the GPU where there is one; an interrupted command goes\n"
        "on from OUTPUT.parts when it is given again, and a finished one only shows its summary.\n\n"
        "example:\n  corral score answers.jsonl --model runs/demo/rm/model --output scores.parquet"
    ),
    add_arguments=add_arguments,
    run=run,
    keys=KEYS,
)
