"""`corral serve build`: the service as a config file for `serve deploy`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import serving_inputs
from jobs.command import Tool, output_path
from jobs.serving import APPLICATION, Service, check

if TYPE_CHECKING:
    from app.config.serving import ChatModelConfig, ServedModelConfig
    from app.schema import Config, PathMark

HEADER = """\
# For `serve deploy FILE`, on a cluster where Corral can be imported; `corral serve build` wrote it.
# Another path and version under user_config are swapped in place; any other change replaces a model's replicas.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """As for `corral serve`, and where the file goes."""
    serving_inputs.add_arguments(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="default: standard output")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Check the models and write the file. Raises CorralError for what `corral serve` would refuse."""
    import yaml

    document = config_file(check(serving_inputs.serving_recipe(arguments, overrides)))
    text = HEADER + yaml.safe_dump(document, sort_keys=False)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        output_path(arguments.output).write_text(text)
    return 0


def config_file(service: Service) -> dict[str, Any]:
    """The document, checked against Serve's schema. It listens where `corral serve` would."""
    from ray.serve.schema import ServeDeploySchema

    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": service.doors.host, "port": service.doors.http_port},
        "applications": [*_scoring(service), *_chat(service)],
    }
    ServeDeploySchema.model_validate(document)
    return document


def _scoring(service: Service) -> list[dict[str, Any]]:
    models = _entries(service.models)
    if not models:
        return []
    user_configs = [{"name": name, "user_config": {"path": model["path"], "version": model["version"]}} for name, model in models.items()]
    builder = {"import_path": "serve.builders:scoring", "args": {**_shared_arguments(service), "serving.models": models}}
    return [{"name": APPLICATION, "route_prefix": "/", **builder, "deployments": user_configs}]


def _chat(service: Service) -> list[dict[str, Any]]:
    models = _entries(service.doors.chat)
    if not models:
        return []
    from serve.chat import APPLICATION as CHAT
    from serve.chat import ROUTE

    builder = {"import_path": "serve.builders:chat", "args": {**_shared_arguments(service), "serving.chat": models}}
    return [{"name": CHAT, "route_prefix": ROUTE, **builder}]


def _entries(models: Mapping[str, ServedModelConfig | ChatModelConfig]) -> dict[str, dict[str, Any]]:
    """Every value, also the defaults, so that the file says what there is to edit; paths as seen from anywhere."""
    return {name: model.model_dump(mode="json", exclude_none=True) | _paths(model) for name, model in models.items()}


def _paths(config: Config) -> dict[str, str]:
    """The paths of a config itself, as seen from anywhere."""
    from app.config.paths import named_paths
    from app.models.load import seen_from_anywhere

    def seen(path: str, mark: PathMark) -> str:
        return str(Path(path).expanduser().absolute()) if mark.written else seen_from_anywhere(path)

    return {
        named.key: seen(named.value, named.mark) for named in named_paths(config) if isinstance(named.value, str) and "." not in named.key
    }


def _shared_arguments(service: Service) -> dict[str, Any]:
    model, doors = service.recipe.model, service.doors.model_dump(mode="json", exclude={"models", "chat"}, exclude_none=True)
    return {
        "model.precision": model.precision,
        "model.trust_remote_code": model.trust_remote_code,
        **{f"serving.{key}": value for key, value in (doors | _paths(service.doors)).items()},
    }


TOOL = Tool(
    purpose="write a config file of the service for Ray's `serve deploy`",
    details=(
        "Takes what `corral serve` takes, checks it and writes the file; nothing is started. Edit it and deploy it again to update.\n\n"
        "example:\n  corral serve build --model reward=runs/demo/rm/model -o service.yaml && serve deploy service.yaml"
    ),
    add_arguments=add_arguments,
    run=run,
    keys=serving_inputs.SECTIONS,
)
