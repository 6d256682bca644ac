"""`--resume`: a command that only goes on with a run, and says so where there is none or nothing is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import CheckpointError, ConfigError, first_line
from app.run_layout import MANIFEST

if TYPE_CHECKING:
    from app.config.recipe import Recipe

STAGES_OF = {"pipeline": ("sft", "rm", "ppo"), "sft": ("sft",), "rm": ("rm",), "ppo": ("ppo",), "tune": ("tune",)}
"""What a command has to finish. An evaluation has no stage: it is made anew each time."""


def require_unfinished(recipe: Recipe, command: str) -> None:
    """Raises ConfigError where neither `run.dir` nor `run.storage` holds a run, CheckpointError where `run.dir` holds a finished
    one, or one of another configuration.

    With `run.storage` a finished run may still have changes to send there, and goes on.
    """
    from app.durable import read_json
    from app.run_folder import refuse_other_config, run_identity

    folder = Path(recipe.run.dir).absolute()
    if not (folder / MANIFEST).is_file():
        storage = recipe.run.storage
        if storage is not None and _is_kept(storage):
            return
        nor = "" if storage is None else f", and neither does {storage}"
        raise ConfigError(
            f"--resume: {recipe.run.dir} holds no run to go on with{nor}: correct --run.dir, or leave --resume out to begin one"
        )
    manifest = read_json(folder / MANIFEST)
    sessions = manifest.get("sessions") or [{}]
    ended = sessions[-1].get("outcome") == "finished" and recipe.run.storage is None
    if command in STAGES_OF and ended and all(_is_whole(folder / stage) for stage in STAGES_OF[command]):
        refuse_other_config(folder, manifest, run_identity(recipe))
        raise CheckpointError(
            f"--resume: run folder {folder} is finished, and nothing is left to resume: leave --resume out to have its summary written "
            "again, or choose another --run.dir for a new run"
        )


def _is_kept(url: str) -> bool:
    """Whether a URL holds a run. Raises ConfigError where it cannot be read."""
    from app.storage.place import open_place

    try:
        return open_place(url).read(MANIFEST) is not None
    except OSError as error:
        raise ConfigError(f"run.storage = {url}: cannot be read ({first_line(error)}); check the URL and the credentials") from error


def _is_whole(stage: Path) -> bool:
    """Whether a stage is finished, and its files are those that it left."""
    from app.durable import damage, read_json

    return (stage / MANIFEST).is_file() and damage(stage, read_json(stage / MANIFEST)["files"]) is None
