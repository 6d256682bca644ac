"""The command line: `corral COMMAND RECIPE --dotted.key=value`."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from app.errors import ConfigError, CorralError
from jobs import (
    chat,
    data,
    doctor,
    evaluate_best_of_n,
    evaluate_rm,
    evaluate_samples,
    evaluate_score,
    evaluate_trees,
    evaluation,
    export,
    interrupts,
    pipeline,
    planning,
    ppo,
    promotion,
    replay,
    reward_model,
    run_control,
    runs,
    score,
    serving,
    serving_file,
    sft,
    submission,
    tuning,
)
from jobs.command import DRY_RUN, Command, Tool, refused_path
from jobs.resuming import require_unfinished

if TYPE_CHECKING:
    from app.config.keys import RecipeKey

RECIPE_COMMANDS: dict[str, Command] = {
    "pipeline": pipeline.COMMAND,
    "sft": sft.COMMAND,
    "rm": reward_model.COMMAND,
    "ppo": ppo.COMMAND,
    "tune": tuning.COMMAND,
    "evaluate": evaluation.COMMAND,
}
TOOLS: dict[str, Tool] = {
    "serve": serving.TOOL,
    "serve build": serving_file.TOOL,
    "submit": submission.TOOL,
    "runs": runs.TOOL,
    "logs": run_control.LOGS,
    "stop": run_control.STOP,
    "data": data.TOOL,
    "chat": chat.TOOL,
    "export": export.TOOL,
    "replay": replay.TOOL,
    "doctor": doctor.TOOL,
    "plan": planning.TOOL,
    "score": score.TOOL,
    "evaluate rm": evaluate_rm.TOOL,
    "evaluate samples": evaluate_samples.TOOL,
    "evaluate score": evaluate_score.TOOL,
    "evaluate best-of-n": evaluate_best_of_n.TOOL,
    "evaluate trees": evaluate_trees.TOOL,
    "tune --promote": promotion.TOOL,
}
"""A name of two words is a tool beside a recipe command of the first word: `corral evaluate rm`, `corral evaluate RECIPE`."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like every other error of ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: `{self.prog} --help` shows how it is called")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for input to mend, 1 for a failed run, 130 when interrupted."""
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else list(argv))
    rest = join_tool_name(rest)
    with interrupts.installed():
        try:
            arguments, unknown = build_parser(rest).parse_known_args(rest)
            _refuse_unknown_options(arguments.command, unknown)
            _refuse_unknown_homes(rest)
            return _dispatch(arguments, [*overrides, *unknown])
        except CorralError as error:
            sys.stderr.write(f"corral: error: {' '.join(str(error).split())}\n")
            return error.exit_code
        except OSError as error:
            reason = refused_path(error)
            if reason is None:
                raise
            sys.stderr.write(f"corral: error: {reason}\n")
            return ConfigError.exit_code
        except KeyboardInterrupt:
            sys.stderr.write("corral: error: interrupted before a run had begun; nothing was changed\n")
            return 130


def command() -> int:
    """`corral` as a process of its own: `main`, then an exit without a last garbage collection, which takes 2 s once torch is loaded."""
    # Ray reads it when it is imported: a thread of Serve's that outlives `ray.shutdown` would start another Ray by itself
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    code = main()
    gc.freeze()
    return code


def _refuse_unknown_options(command: str, words: Sequence[str]) -> None:
    """Before anything else is: the word behind such an option has been taken for a recipe or a file."""
    for name in (word.partition("=")[0] for word in words if word.startswith("--")):
        raise ConfigError(
            f"{name}: no such option, and no recipe key, which has a section before a dot (--run.dir): `corral {command} --help` lists both"
        )


def _refuse_unknown_homes(words: Sequence[str]) -> None:
    """A path such as ~nobody/x in an argument; those in recipes are checked there."""
    from app.schema import known_home

    for word in words:
        path = word.partition("=")[2] if word.startswith("--") else word
        if len(path.partition("/")[0].split()) > 1:
            continue  # text
        try:
            known_home(path)
        except ValueError as error:
            raise ConfigError(f"{word}: {error}") from error


def _dispatch(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.command in TOOLS:
        return TOOLS[arguments.command].run(arguments, overrides)
    from app.config.loading import load_recipe, to_toml

    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.resume:
        require_unfinished(recipe, arguments.command)
    if arguments.dry_run:
        from jobs.dry_run import obstacles, sizes
        from jobs.inputs import check_inputs

        found = obstacles(recipe, arguments.command, lambda: check_inputs(recipe, arguments.command))
        sys.stdout.write(to_toml(recipe) + sizes(recipe, arguments.command) + found)
    else:
        RECIPE_COMMANDS[arguments.command].run(recipe)
    return 0


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments, overrides): an option with a dot in its name is a recipe key, and takes the next word unless it has `=`."""
    arguments, overrides, rest = [], [], iter(argv)
    for word in rest:
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            arguments.append(word)
            continue
        overrides.append(word)
        if "=" not in word:
            overrides += [value for value in [next(rest, None)] if value is not None]
    return arguments, overrides


def join_tool_name(words: list[str]) -> list[str]:
    """The words with a tool's name of two words as one.

    >>> join_tool_name(["evaluate", "rm", "pairs.jsonl"])
    ['evaluate rm', 'pairs.jsonl']
    >>> join_tool_name(["evaluate", "recipe.toml"])
    ['evaluate', 'recipe.toml']
    """
    name = " ".join(words[:2])
    return [name, *words[2:]] if name in TOOLS else words


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; the recipe keys of a command are listed only where `argv` asks for that command's help."""
    parser = _Parser(
        prog="corral",
        description="Train a chat assistant from human feedback on Ray: SFT, reward model, PPO.",
        epilog="Start with: corral pipeline jobs/recipes/tiny/pipeline.toml",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asks_help = bool({"-h", "--help"} & set(argv))

    def keys_of(name: str, sections: tuple[str, ...]) -> str:
        return _key_list(sections) if asks_help and argv[0] == name and sections else ""

    for name, command in RECIPE_COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.purpose,
            description=f"{command.purpose}\n\n{command.details}\n\nexample:\n  {command.example}",
            epilog=keys_of(name, command.sections),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("recipe", metavar="RECIPE", help="TOML file; any of its keys may follow as --dotted.key=value")
        sub.add_argument(
            "--resume", action="store_true", help="only go on with the unfinished run in run.dir, which any command does where there is one"
        )
        sub.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    for name, tool in TOOLS.items():
        sub = commands.add_parser(
            name,
            help=tool.purpose,
            description=f"{tool.purpose}\n\n{tool.details}",
            epilog=keys_of(name, tool.keys),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        tool.add_arguments(sub)
    return parser


def _key_list(sections: tuple[str, ...]) -> str:
    """The recipe keys of some sections with defaults, the words that they are chosen from, and descriptions."""
    from app.config.keys import section_keys

    lines = ["recipe keys (default; what is not set is written null): words to choose from, and what they are"]
    for key in (leaf for outer in section_keys(sections) for leaf in (outer, *outer.inside())):
        lines.append(f"  --{key.name} ({_default(key)}){f': {key.choices}' if key.choices else ''}")
        lines += [f"      {key.description}"] if key.description else []
    return "\n".join(lines) + "\n"


def _default(key: RecipeKey) -> str:
    import json

    if key.required:
        return "required"
    return "not set" if key.default is None else json.dumps(key.default, default=str)


if __name__ == "__main__":  # `python -m jobs.main`, which is tried where `python -m jobs` is meant
    sys.exit(command())
