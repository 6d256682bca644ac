"""`corral tune --promote`: the recipe loads and says what the winner said; the manifest names its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.config.loading import load_recipe, resolved
from app.durable import tree_hash
from app.run_folder import run_identity
from app.search.promotion import promote
from jobs.main import main
from tests.unit.search.searches import row, write_search

TUNE = Path(__file__).resolve().parents[3] / "jobs" / "recipes" / "tiny" / "tune.toml"
WON = {"ppo.kl.coef": 0.0123, "ppo.policy.lr": 7.5e-05, "ppo.epochs": 2}
SHA = "a" * 64


def searched(folder: Path, best: str | None = "t1", config: Any = None, **won: Any) -> Path:
    """A run folder of the tiny search; `won` are further values of the winner."""
    recipe = load_recipe(TUNE, [f"--run.dir={folder}"])
    folder.mkdir(exist_ok=True)
    stages = {"sft": {"sha256": SHA}, "tune": {"sha256": "b" * 64}}
    manifest = {"config": config or recipe.model_dump(mode="json"), "stages": stages, "data": {"sha256": "c" * 64}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = [row("t0", {**WON, "ppo.epochs": 1}, 0.1), row("t1", WON | won, 0.5)]
    return write_search(folder, rows if best else [row("t0", WON, None, "failed")], best)


def keep_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_recipe_is_the_searched_one_with_the_best_values(tmp_path: Path) -> None:
    folder = searched(tmp_path / "run")
    done = promote(folder)
    assert done.recipe == folder / "tune" / "best.toml"
    before, after = resolved(load_recipe(TUNE, [f"--run.dir={folder}"])), resolved(load_recipe(done.recipe))
    changed = {key: value for key, value in after.items() if value != before[key]}
    assert changed == {**WON, "tune.space": {}, "run.dir": f"{folder}-best"}
    assert "trials of" in done.recipe.read_text().splitlines()[0]
    assert "# searched: --ppo.epochs=2" in done.recipe.read_text()


def test_a_promoted_recipe_can_be_promoted_again(tmp_path: Path) -> None:
    """Its run has the identity that its own manifest would hold."""
    once = load_recipe(promote(searched(tmp_path / "run")).recipe)
    again = searched(tmp_path / "other", config=once.model_dump(mode="json"))
    assert run_identity(load_recipe(promote(again).recipe)) == run_identity(once)


def test_values_that_fit_the_winner_alone_are_no_hindrance(tmp_path: Path) -> None:
    """The space has ppo.batch_size up to what the winner's micro-batch does not divide."""
    recipe = load_recipe(TUNE, ["--tune.space={'ppo.batch_size' = {type = 'choice', values = [16, 32]}}"])
    folder = searched(tmp_path / "run", config=recipe.model_dump(mode="json"), **{"ppo.batch_size": 32, "ppo.micro_batch_size": 32})
    assert load_recipe(promote(folder).recipe).ppo.micro_batch_size == 32


@pytest.mark.parametrize("place", ["best", "t1"])
def test_the_manifest_names_the_model_and_where_it_came_from(tmp_path: Path, place: str) -> None:
    folder = searched(tmp_path / "run")
    model = keep_model(folder / "tune" / place / "model")
    done = promote(folder, tmp_path / "mine.toml")
    assert done.manifest == tmp_path / "mine.manifest.json"
    manifest = json.loads(done.manifest.read_text())
    assert manifest["model"]["path"] == str(model)
    assert manifest["model"]["sha256"] == tree_hash(model)
    assert set(manifest["model"]["files"]) == {"config.json", "model.safetensors"}
    assert manifest["trial"]["config"] == WON
    assert manifest["parents"] == {"sft": SHA}


def test_the_command_tells_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = searched(tmp_path / "run")
    assert main(["tune", "--promote", str(folder), "--to", str(tmp_path / "new" / "best.toml")]) == 0
    assert "only the recipe was written" in capsys.readouterr().out
    keep_model(folder / "tune" / "best" / "model")
    assert main(["tune", "--promote", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "only the recipe" not in out and str(folder / "tune" / "best.manifest.json") in out


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    taken = tmp_path / "taken.toml"
    taken.write_text("mine")
    run = str(searched(tmp_path / "run"))
    old = searched(tmp_path / "old", config={"ppo": {"epoch": 1}})
    bare = searched(tmp_path / "bare")
    (bare / "manifest.json").unlink()
    for words, told in (
        ([str(tmp_path / "empty")], "it holds no search"),
        ([str(tmp_path / "nowhere")], "it holds no search"),
        ([str(searched(tmp_path / "lost", best=None))], "no trial of this search can be promoted (1 failed)"),
        ([str(old)], "ppo.epoch is none of this version's recipes"),
        ([str(bare)], "manifest.json: config is none of this version's recipes"),
        ([run, "--to", str(taken)], "is there already"),
        ([run, "--ppo.epochs=3"], "has no option --ppo.epochs=3"),
        ([], "DIR"),
    ):
        assert main(["tune", "--promote", *words]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    assert taken.read_text() == "mine"
