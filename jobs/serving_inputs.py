"""What `corral serve` is given: its options as recipe keys, and the checks before Ray starts."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from app.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from app.config.recipe import Recipe
    from app.config.serving import ServedModelConfig, ServingConfig

SECTIONS = ("run", "model", "reward", "rollout.temperature", "scoring", "serving")
OPTIONS = {"host": "serving.host", "http_port": "serving.http_port", "grpc_port": "serving.grpc_port", "token_file": "serving.token_file"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, or the models themselves; the other options are the short names of recipe keys."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="TOML file; any of its keys may follow as --dotted.key=value")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="serve a reward model or a reference policy")
    parser.add_argument("--chat", action="append", default=[], metavar="NAME=FOLDER", help="serve a language model to chat with")
    parser.add_argument("--host", help="interface to listen on (default 127.0.0.1); any other than a loopback one needs a token")
    parser.add_argument("--http-port", type=int, metavar="PORT", help="default 8000; 0 takes a free one")
    parser.add_argument("--grpc-port", type=int, metavar="PORT", help="default 8001; 0 takes a free one")
    parser.add_argument("--token-file", metavar="FILE", help="file with the bearer token that requests must carry (or CORRAL_SERVE_TOKEN)")


def serving_recipe(arguments: argparse.Namespace, overrides: Sequence[str]) -> Recipe:
    """The recipe with the short options over it, and the dotted ones over both. Raises ConfigError."""
    from app.config.loading import load_recipe, resolved, toml_value

    words = [f"--{key}={getattr(arguments, name)}" for name, key in OPTIONS.items() if getattr(arguments, name) is not None]
    given = resolved(load_recipe(arguments.recipe))
    for option, key in (("model", "serving.models"), ("chat", "serving.chat")):
        named = {name: {"path": path} for name, path in (_pair(option, text) for text in getattr(arguments, option))}
        words += [f"--{key}={toml_value(given[key] | named)}"] if named else []
    return load_recipe(arguments.recipe, [*words, *overrides])


def _pair(option: str, text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise ConfigError(f"--{option}={text}: write --{option} NAME=FOLDER")
    return name, path


def checked_models(models: Mapping[str, ServedModelConfig], trust_remote_code: bool) -> dict[str, ServedModelConfig]:
    """The models with the kind of each, seen from its folder. Raises ModelError for a folder that is not there, not whole or of
    another kind than it is said to be, ConfigError for a temperature that would change nothing."""
    from app.config.shared import BUILT_IN_MODELS
    from app.models.heads import check_reward_model
    from app.models.load import check_model_folder
    from app.models.scoring import kind_of

    checked = {}
    for name, model in models.items():
        if model.path in BUILT_IN_MODELS:
            raise ConfigError(f"model {name} = {model.path}: `corral serve` needs a model's folder, such as runs/demo/sft/model")
        check_model_folder(model.path, chat_template=False)
        kind = kind_of(model.path)
        if model.kind not in (None, kind):
            raise ModelError(f"model {name}: {model.path} is a {_NOUN[kind]}, not a {_NOUN[model.kind]}: leave kind out, or change path")
        if kind == "reward":
            check_reward_model(model.path, trust_remote_code)
            if model.temperature != 1.0:
                raise ConfigError(f"model {name}, temperature {model.temperature}: a reward model has none; leave it out")
        checked[name] = model.model_copy(update={"kind": kind})
    return checked


_NOUN = {"reward": "reward model", "reference": "language model"}


def opened_doors(config: ServingConfig) -> ServingConfig:
    """The doors' configuration with a free port in place of each 0. Raises ConfigError when a port is taken, or the host none of ours."""
    from serve.access import listening_address

    address = listening_address(config.host)
    ports = {key: _free_port(address, getattr(config, key), key) for key in ("http_port", "grpc_port")}
    return config.model_copy(update=ports)


def _free_port(address: str, port: int, key: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ConfigError(
                f"serving.{key} = {port}: cannot listen there ({error.strerror}); choose another port or stop what uses it"
            ) from error
        bound: int = probe.getsockname()[1]
        return bound
