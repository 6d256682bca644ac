"""The winner of a search as a recipe of its own, and a manifest of its model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.config.loading import to_toml, with_values
from app.config.recipe import Recipe
from app.durable import file_hashes, hash_of, read_json, write_json
from app.errors import ConfigError
from app.run_layout import MANIFEST, MODEL, SEARCH
from app.search.results import Search, Trial, as_options

BEST = "best"


@dataclass(frozen=True)
class Promotion:
    """What was written. manifest and model are None where the search kept no model of the winner."""

    winner: Trial
    recipe: Path
    manifest: Path | None
    model: Path | None


def promote(path: Path, to: Path | None = None) -> Promotion:
    """Write the best configuration of the search in the run folder `path` as the recipe `to` (default: `tune/best.toml` in it), and
    beside it `NAME.manifest.json`: which model that is, by content hash, and what it came from.

    Raises ConfigError where the folder holds no finished search or none of its trials can be promoted, and where `to` holds something else.
    """
    search = Search.read(path)
    winner = search.winner
    if winner is None:
        ends = ", ".join(f"{count} {end}" for end, count in search.counts.items())
        raise ConfigError(f"{path}: no trial of this search can be promoted ({ends}): search again, in another run.dir or a narrower space")
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    recipe = best_recipe(manifest.get("config"), winner, path)
    file = to or path / SEARCH / f"{BEST}.toml"
    text = heading(search, winner) + to_toml(recipe)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{file}: is there already, with other content: give another file with --to, or remove it")
    file.write_text(text, encoding="utf-8")
    model = kept_model(path, winner)
    if model is None:
        return Promotion(winner, file, None, None)
    described = file.with_suffix(".manifest.json")
    write_json(described, describe(winner, model, manifest, path, file))
    return Promotion(winner, file, described, model)


def best_recipe(config: Any, winner: Trial, path: Path) -> Recipe:
    """The recipe of the run with the winner's values, a run folder of its own, and without the space that was searched: values at its
    ends need not fit the winner's others."""
    try:
        recipe = Recipe.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise ConfigError(
            f"{path / MANIFEST}: {where} is none of this version's recipes ({first['msg']}): promote with the version that searched"
        ) from error
    return with_values(recipe, {"tune.space": {}, **winner.config, "run.dir": f"{recipe.run.dir}-{BEST}"}, f"{path}: {winner.name}")


def heading(search: Search, winner: Trial) -> str:
    """Comment lines that tell where the recipe comes from."""
    numbers = {"objective": winner.objective, "score": winner.score, "KL": winner.kl}
    reached = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
    lines = [
        f"The best of {len(search.trials)} trials of {search.path}: {winner.name} ({winner.status} after {winner.steps} steps, {reached}).",
        *(f"searched: {option}" for option in as_options(winner.config)),
    ]
    return "".join(f"# {line}\n" for line in lines)


def kept_model(path: Path, winner: Trial) -> Path | None:
    """The Hugging Face folder of the winner's policy, or None where the search kept none."""
    folders = (path / SEARCH / name / MODEL for name in (BEST, winner.name))
    return next((folder.absolute() for folder in folders if (folder / "config.json").is_file()), None)


def describe(winner: Trial, model: Path, manifest: dict[str, Any], path: Path, recipe: Path) -> dict[str, Any]:
    """Which weights these are and what they came from, every part by its SHA-256."""
    files = file_hashes(model)
    numbers = {name: getattr(winner, name) for name in ("status", "steps", "objective", "score", "kl")}
    return {
        "model": {"path": str(model), "sha256": hash_of(files), "files": files},
        "recipe": {"path": recipe.name, "sha256": hashlib.sha256(recipe.read_bytes()).hexdigest()},
        "trial": {"name": winner.name, "config": dict(winner.config), **numbers},
        "search": str(path.absolute()),
        "parents": {stage: record["sha256"] for stage, record in manifest["stages"].items() if stage != SEARCH},
        "data": manifest["data"],
    }
