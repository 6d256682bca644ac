"""`corral serve build`: the service as a config file for `serve deploy`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jobs import serving_inputs
from jobs.command import Tool, output_path
from jobs.serving import APPLICATION, Service, check

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

    from app.models.load import seen_from_anywhere

    model = service.recipe.model
    served = {name: config.model_copy(update={"path": seen_from_anywhere(config.path)}) for name, config in service.models.items()}
    doors = service.doors.model_dump(mode="json", exclude={"models", "chat"}, exclude_none=True)
    arguments: dict[str, Any] = {
        "model.precision": model.precision,
        "model.trust_remote_code": model.trust_remote_code,
        **{f"serving.{key}": value for key, value in doors.items()},
    }
    applications: list[dict[str, Any]] = []
    if served:
        models = {name: config.model_dump(mode="json", exclude_none=True) for name, config in served.items()}
        applications.append(
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "serve.builders:scoring",
                "args": {**arguments, "serving.models": models},
                "deployments": [
                    {"name": name, "user_config": {"path": config.path, "version": config.version}} for name, config in served.items()
                ],
            }
        )
    if service.doors.chat:
        from serve.chat import APPLICATION as CHAT
        from serve.chat import ROUTE

        models = {name: config.model_dump(mode="json", exclude_none=True) for name, config in service.doors.chat.items()}
        applications.append(
            {"name": CHAT, "route_prefix": ROUTE, "import_path": "serve.builders:chat", "args": {**arguments, "serving.chat": models}}
        )
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": service.doors.host, "port": service.doors.http_port},
        "applications": applications,
    }
    ServeDeploySchema.model_validate(document)
    return document


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
