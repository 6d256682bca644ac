"""`corral tune --promote`: the winner of a search as a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from app.errors import ConfigError
from jobs.command import Tool, output_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which search, and where to."""
    parser.add_argument("folder", metavar="DIR", help="run folder of a finished `corral tune`")
    parser.add_argument("--to", metavar="FILE", help="the recipe to write (default: DIR/tune/best.toml)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write, and tell what was written."""
    if overrides:
        raise ConfigError(f"corral tune --promote has no option {overrides[0]}: set it where the recipe is used, or edit the recipe")
    from app.search.promotion import promote

    done = promote(Path(arguments.folder).expanduser(), output_path(arguments.to) if arguments.to else None)
    sys.stdout.write(f"{done.recipe}: {done.winner.name}; `corral ppo {done.recipe}` trains it\n")
    if done.manifest is None:
        sys.stdout.write(f"the search kept no model of {done.winner.name}: only the recipe was written\n")
    else:
        sys.stdout.write(f"{done.manifest}: its model in {done.model}\n")
    return 0


TOOL = Tool(
    purpose="write the best configuration of a search as a recipe",
    details=(
        "Takes the run folder of a finished `corral tune`. Writes the recipe of the search with the best trial's values in place, which\n"
        "`corral ppo` and `corral pipeline` take like any other, and beside it NAME.manifest.json: where the best trial's model lies, its\n"
        "content hash, and the hashes of what it was trained from.\n\n"
        "example:\n  corral tune --promote runs/tiny-tune --to best.toml"
    ),
    add_arguments=add_arguments,
    run=run,
)
