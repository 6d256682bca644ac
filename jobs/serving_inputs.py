"""What `corral serve` is given: its options as recipe keys, and the checks before Ray starts."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from app.config.recipe import Recipe
    from app.config.serving import ModelKind, ServedModelConfig, ServingConfig

SECTIONS = ("run", "model", "reward", "rollout.temperature", "scoring", "serving")
TOKEN_VARIABLE = "CORRAL_SERVE_TOKEN"
OPTIONS = {"host": "serving.host", "http_port": "serving.http_port", "grpc_port": "serving.grpc_port", "token_file": "serving.token_file"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, or the models themselves; the other options are the short names of recipe keys."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="TOML file; any of its keys may follow as --dotted.key=value")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="serve a reward model or a reference policy")
    parser.add_argument("--chat", action="append", default=[], metavar="NAME=FOLDER", help="serve a language model to chat with")
    parser.add_argument("--host", help="interface to listen on (default 127.0.0.1); any other than a loopback one needs a token")
    parser.add_argument("--http-port", type=int, metavar="PORT", help="default 8000; 0 takes a free one")
    parser.add_argument("--grpc-port", type=int, metavar="PORT", help="default 8001; 0 takes a free one")
    parser.add_argument("--token-file", metavar="FILE", help=f"file with the bearer token that requests must carry (or {TOKEN_VARIABLE})")


def serving_recipe(arguments: argparse.Namespace, overrides: Sequence[str]) -> Recipe:
    """The recipe with the short options over it. Raises ConfigError."""
    from app.config.loading import load_recipe, resolved, with_values

    recipe = load_recipe(arguments.recipe, overrides)
    values: dict[str, Any] = {key: getattr(arguments, name) for name, key in OPTIONS.items() if getattr(arguments, name) is not None}
    given = resolved(recipe)
    for option, key in (("model", "serving.models"), ("chat", "serving.chat")):
        named = getattr(arguments, option)
        if named:
            values[key] = given[key] | {name: {"path": path} for name, path in (_pair(option, text) for text in named)}
    return with_values(recipe, values, "corral serve")


def _pair(option: str, text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise ConfigError(f"--{option}={text}: write --{option} NAME=FOLDER")
    return name, path


def checked_models(models: Mapping[str, ServedModelConfig], trust_remote_code: bool) -> dict[str, ServedModelConfig]:
    """The models with the kind of each, seen from its folder. Raises ModelError for a folder that is not there, not whole or of
    another kind than it is said to be, ConfigError for a temperature that would change nothing."""
    from app.models.heads import check_reward_model
    from app.models.load import check_model_folder

    checked = {}
    for name, model in models.items():
        check_model_folder(model.path, chat_template=False)
        kind = model_kind(name, model.path)
        if model.kind not in (None, kind):
            raise ModelError(f"serving.models.{name}: {model.path} is a {_NOUN[kind]}, not a {_NOUN[model.kind]}: leave kind out, or change path")
        if kind == "reward":
            check_reward_model(model.path, trust_remote_code)
            if model.temperature != 1.0:
                raise ConfigError(f"serving.models.{name}.temperature = {model.temperature}: a reward model has none; leave it out")
        checked[name] = model.model_copy(update={"kind": kind})
    return checked


_NOUN = {"reward": "reward model", "reference": "language model"}


def model_kind(name: str, path: str) -> ModelKind:
    """What the folder holds. Raises ModelError for what neither scores nor writes."""
    from app.models.load import scores_text, writes_text

    if scores_text(path):
        return "reward"
    if writes_text(path):
        return "reference"
    raise ModelError(f"serving.models.{name}: {path} is an encoder without a score head; train a reward model from it with `corral rm`")


def bearer_token(config: ServingConfig) -> str | None:
    """The token of `serving.token_file`, or of the environment. Raises ConfigError for a file that holds none."""
    if config.token_file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = Path(config.token_file).expanduser().read_text().strip()
    except OSError as error:
        raise ConfigError(f"serving.token_file = {config.token_file}: cannot be read ({error.strerror}); check the path") from error
    if not token or len(token.split()) != 1:
        raise ConfigError(f"serving.token_file = {config.token_file}: holds no token; write one word into it, such as `openssl rand -hex 32`")
    return token


def opened_doors(config: ServingConfig, token: str | None) -> ServingConfig:
    """The doors' configuration with a free port in place of each 0. Raises ConfigError when the host is none of this machine, or open
    to others without a token, or a port is taken."""
    try:
        address = socket.getaddrinfo(config.host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ConfigError(f"serving.host = {config.host}: no such host ({error.strerror}); use 127.0.0.1") from error
    if token is None and not ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"serving.host = {config.host}: others can reach it, and requests need no token; "
            f"set serving.token_file or {TOKEN_VARIABLE}, or listen on 127.0.0.1"
        )
    ports = {key: _free_port(str(address), getattr(config, key), key) for key in ("http_port", "grpc_port")}
    return config.model_copy(update=ports)


def _free_port(address: str, port: int, key: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ConfigError(f"serving.{key} = {port}: cannot listen there ({error.strerror}); choose another port or stop what uses it") from error
        bound: int = probe.getsockname()[1]
        return bound
