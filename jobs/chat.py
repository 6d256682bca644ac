"""`corral chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from app.errors import ConfigError, ModelError
from jobs.command import Tool

if TYPE_CHECKING:
    from app.models.chat import Chat

LEAST_TEMPERATURE = 1e-4
"""Below, logits divided by it are no longer finite, or as good as those at 0."""
HELP = "Ctrl-D ends, /new starts over, Ctrl-C cuts an answer short"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how it is sampled."""
    parser.add_argument("model", metavar="MODEL", help="model folder, such as runs/demo/ppo/model, or hub name")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token every time (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens (default 256)")
    parser.add_argument("--system", help="system message in front of the conversation")
    parser.add_argument("--seed", type=int, help="seed of the sampling, for the same answers again")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Answer line after line until the input ends; 1 where a line that was piped in could not be answered."""
    if overrides:
        raise ConfigError(f"corral chat has no option {overrides[0]}: `corral chat --help` lists them")
    temperature = arguments.temperature
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf) or arguments.max_new_tokens < 1:
        raise ConfigError(
            f"corral chat: --temperature must be 0, or at least {LEAST_TEMPERATURE:g} and finite, and --max-new-tokens at least 1"
        )
    if arguments.seed is not None and not 0 <= arguments.seed < 2**32:
        raise ConfigError(f"corral chat: --seed={arguments.seed}: give a number from 0 to {2**32 - 1}")
    from transformers import set_seed
    from transformers.utils import logging

    from app.models.chat import Chat

    logging.disable_progress_bar()
    chat = Chat(arguments.model, temperature=arguments.temperature, max_new_tokens=arguments.max_new_tokens, system=arguments.system)
    if arguments.seed is not None:
        set_seed(arguments.seed)
    answered = True
    for text in _lines():
        if text == "/new":
            chat.forget()
        elif text:
            answered &= _answer(chat, text)
    return 0 if answered or sys.stdin.isatty() else 1


def _answer(chat: Chat, text: str) -> bool:
    """Show the answer, or on stderr why there is none; returns whether there is one."""
    answered = True
    try:
        chat.reply(text, _show)
    except ModelError as error:
        answered = False
        sys.stderr.write(f"corral: {error}\n")
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    _show("\n")
    return answered


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """What is typed, or what is piped in, without surrounding blanks."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):  # by locale, bytes that are no UTF-8 raise, or become what no tokenizer takes
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401 - gives input() its line editing

    _show(f"{HELP}\n")
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            _show("\n")
            return


TOOL = Tool(
    purpose="talk to a model in the terminal",
    details=(
        "Several turns, with the model's own template and sampling as PPO trains it; answers appear while they are sampled.\n"
        f"{HELP}.\n"
        "What cannot be answered is told on stderr, and where lines are piped in by the exit code 1.\n\n"
        "example:\n  corral chat runs/demo/ppo/model"
    ),
    add_arguments=add_arguments,
    run=run,
)
