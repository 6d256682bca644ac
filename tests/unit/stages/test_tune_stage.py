"""`corral tune` around its trials: SFT and reward model are trained once, whatever happens to the search, and reused by content hash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.data.corpus import Corpus, Split
from app.durable import read_json
from app.errors import CheckpointError, ConfigError, CorralError, Interrupted
from app.formats.records import Message, PromptItem
from app.run_folder import RunFolder
from app.stages import pipeline, tune
from app.stages.ppo import PromptSets, prompt_sets
from app.stages.preparation import Prepared
from app.stages.tuning import trial
from app.tracking import RunTracker

CORPUS: Any = SimpleNamespace(sha256="d" * 64)


@contextmanager
def start_scoring(reward_paths: Sequence[str], reference_path: str) -> Iterator[Any]:
    yield [SimpleNamespace(models=(path, reference_path)) for path in reward_paths]


class Stages:
    """Stages that write a model of one file, counted; the search does what `ends` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: Counter[str] = Counter()
        self.given: list[Any] = []
        self.ends: list[Any] = []
        prepared = SimpleNamespace(model_path="base", template=SimpleNamespace(decode=str), corpus=SimpleNamespace(pretraining=None))
        monkeypatch.setattr(pipeline, "prepare", lambda *_: prepared)
        monkeypatch.setattr("app.stages.rewards.other_vocabulary", lambda *_, **__: None)
        monkeypatch.setattr(pipeline, "PeakMemory", lambda _: SimpleNamespace(__enter__=None, __exit__=None, peak_bytes=0))
        monkeypatch.setattr(pipeline.Pipeline, "__enter__", lambda self: self)
        monkeypatch.setattr(pipeline.Pipeline, "__exit__", lambda self, *_: None)
        monkeypatch.setattr(pipeline.Pipeline, "_centre", lambda self, pool: 0.0)
        monkeypatch.setattr(pipeline, "raylet_pids", list)
        monkeypatch.setattr(pipeline, "writes_text", lambda _: False)
        monkeypatch.setattr(pipeline, "prompt_sets", lambda *_: None)
        monkeypatch.setattr(pipeline, "write_report", lambda _: None)
        monkeypatch.setattr(pipeline, "train_sft", lambda recipe, run, *_: self._train(run, "sft"))
        monkeypatch.setattr(pipeline, "train_reward_model", lambda recipe, run, *_, **__: self._train(run, "rm"))
        monkeypatch.setattr(tune, "run_search", self._search)

    def _train(self, run: RunFolder, stage: str) -> dict[str, Any]:
        self.trained[stage] += 1
        model = run.stage(stage) / "model"
        model.mkdir(exist_ok=True)
        (model / "weights").write_text(f"{stage} {self.trained[stage]}")
        return {}

    def _search(self, recipe: Recipe, inputs: Any, run: Path, concurrent: int, tracker: RunTracker) -> Any:
        self.given.append(inputs)
        (run / "tune" / "experiment_state-2026-01-01.json").write_text("{}")  # as Tune does
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def finished_trial(name: str, objective: float, status: str = "TERMINATED") -> Any:
    result = {"step": 2, "objective": objective, "score": objective, "mean_kl": 1.0}
    error = RuntimeError("ray\nRuntimeError: lost") if status == "ERROR" else None
    return SimpleNamespace(trial_id=name, status=status, last_result=result, config={"values": {"ppo.epochs": 1}}, get_error=lambda: error)


def run_tune(folder: Path) -> dict[str, Any]:
    recipe = with_values(
        Recipe(), {"run.dir": str(folder), "ppo.steps": 2, "tune.space": {"ppo.epochs": {"type": "choice", "values": [1]}}}
    )
    run = RunFolder.open(recipe, "tune")
    with RunTracker(folder) as tracker:
        return tune.run_tune(recipe, run, CORPUS, tracker, start_scoring, 1)


def test_models_are_trained_once_and_every_life_of_the_search_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    stages.ends = [Interrupted("stopped"), [finished_trial("a", 1.0), finished_trial("b", 2.0), finished_trial("c", 9.0, "ERROR")]]
    with pytest.raises(Interrupted):
        run_tune(tmp_path)
    found = run_tune(tmp_path)["tune"]
    assert stages.trained == {"sft": 1, "rm": 1}
    first, second = stages.given
    assert (first.sft_path, first.reward_path) == (second.sft_path, second.reward_path)
    assert [row["status"] for row in found["trials"]] == ["finished", "finished", "failed"]
    assert found["best"]["trial"] == "trial_b" and found["best_config"] == {"ppo.epochs": 1}
    parents = read_json(tmp_path / "tune" / "manifest.json")["parents"]
    assert parents == {"data": "d" * 64} | {stage: read_json(tmp_path / stage / "manifest.json")["sha256"] for stage in ("sft", "rm")}
    assert run_tune(tmp_path)["tune"] == found  # finished: nothing is searched again
    assert stages.trained == {"sft": 1, "rm": 1} and not stages.ends


def test_a_search_does_not_go_on_from_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    stages.ends = [Interrupted("stopped")]
    with pytest.raises(Interrupted):
        run_tune(tmp_path)
    (tmp_path / "sft" / "model" / "weights").write_text("something else")
    with pytest.raises(CheckpointError, match="began with another sft and rm"):
        run_tune(tmp_path)
    assert stages.trained == {"sft": 2, "rm": 2}  # both by their content, which is not what they were


def test_a_search_without_a_sound_trial_fails_or_has_no_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    spoilt = finished_trial("a", 1.0)
    spoilt.last_result |= {"status": "diverged", "why": "score -9"}
    stages.ends = [[finished_trial("a", 1.0, "ERROR")], [spoilt]]
    with pytest.raises(CorralError, match=r"all 1 trials failed, the first with: RuntimeError: lost"):
        run_tune(tmp_path)
    found = run_tune(tmp_path)["tune"]
    assert found["best"] is None and found["best_config"] is None and found["trials"][0]["why"] == "score -9"


SEARCHED = {"tune.space": {"ppo.reward.delta": {"type": "choice", "values": [False, True]}}}


class Letters:
    """A template whose tokens are characters."""

    eos_id = 0

    def encode(self, messages: Sequence[Message], *, open_assistant: bool) -> tuple[list[int], list[bool]]:
        ids = [ord(letter) for message in messages for letter in message.content]
        return ids, [False] * len(ids)

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def sets_of(reference: str | None, values: dict[str, Any]) -> PromptSets:
    item = PromptItem("a", "tree", (Message("user", "why"),), reference=reference)
    split = Split([], [], [item, item])
    return prompt_sets(with_values(Recipe(), values), Prepared(Corpus(split, split, {}), "", None, Letters()))  # type: ignore[arg-type]


def test_trials_that_subtract_the_score_of_the_reference_answer_have_one() -> None:
    """Prompts are written once for all trials, also where the recipe itself does not ask for reference answers."""
    (reference, _) = [prompt.reference for prompt in sets_of("so", SEARCHED).train.prompts]
    assert reference is not None and reference.tolist() == [ord("s"), ord("o"), 0]
    assert sets_of("so", {}).train.prompts[0].reference is None


def test_a_trial_is_refused_where_the_data_has_no_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "ray", None)  # nothing is started
    delta = {"ppo.reward.delta": True}
    without = sets_of(None, SEARCHED)
    with pytest.raises(ConfigError, match=r"no prompt in the data has a reference answer .* set ppo\.reward\.delta = false"):
        trial.train(with_values(Recipe(), delta), SimpleNamespace(prompts=without), *[None] * 4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no prompt in the data has a reference answer"):
        sets_of(None, delta)
