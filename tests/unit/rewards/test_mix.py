"""Parts put together: weights, minimum, mean, ensembles, hold-outs and failures."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from app.config.loading import load_recipe, to_toml, with_values
from app.errors import ConfigError
from app.experience import FinishReason, Prompt, Rollout
from app.interfaces import Pending
from app.rewards.length import LengthReward
from app.rewards.mix import Combine, Part, RewardMix, RuleSource, failure_note, score_metrics
from app.rewards.part import Failed, RulePart, Sample


@dataclass(frozen=True)
class Given:
    """A source with fixed answers."""

    answers: Sequence[float | Failed]

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Sequence[float | Failed]]:
        return self

    def result(self) -> Sequence[float | Failed]:
        return self.answers


def part(name: str, *answers: Sequence[float | Failed], **fields: object) -> Part:
    return Part(name, tuple(Given(row) for row in answers), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("combine", "expected"), [("sum", [7.0, -5.0]), ("mean", [7 / 3, -5 / 3]), ("min", [1.0, -8.0])])
def test_combinations(combine: Combine, expected: list[float]) -> None:
    mix = RewardMix((part("a", [1.0, 3.0]), part("b", [3.0, -4.0], weight=2.0)), combine)
    assert mix.score([]).result().total_B.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("combine", ["sum", "mean", "min"])
def test_a_failure_of_one_part_fails_the_rollout_and_never_counts_as_zero(combine: Combine) -> None:
    mix = RewardMix((part("a", [1.0, 1.0, 1.0]), part("b", [Failed("died"), math.inf, 2.0])), combine)
    scores = mix.score([]).result()
    assert np.isnan(scores.total_B).tolist() == [True, True, False]
    assert scores.failures == {"b": "died"}
    assert failure_note(scores) == "2 of 3 scores of the reward b failed (died)"
    metrics = score_metrics(scores)
    assert metrics == {"reward_failed/a": 0.0, "reward/a": 1.0, "reward_failed/b": pytest.approx(2 / 3), "reward/b": 2.0}


def test_every_part_that_failed_says_why_and_those_of_reference_answers_too() -> None:
    good = RewardMix((part("a", [1.0, 2.0]),)).score([]).result()
    assert failure_note(good) is failure_note(good, good) is None
    bad = RewardMix((part("a", [1.0, Failed("no answer")]), part("judge", [math.inf, Failed("late")], hold_out=True))).score([]).result()
    said = "1 of 2 scores of the reward a failed (no answer); 2 of 2 scores of the reward judge failed (the score is inf)"
    assert failure_note(bad) == said
    assert failure_note(good, bad) == said.replace("scores of", "scores of reference answers of")


def test_a_held_out_part_is_scored_and_never_trained_on() -> None:
    mix = RewardMix((part("a", [1.0, 2.0]), part("judge", [100.0, Failed("late")], hold_out=True)))
    scores = mix.score([]).result()
    assert scores.total_B.tolist() == [1.0, 2.0]
    assert score_metrics(scores)["holdout_score"] == 100.0
    assert score_metrics(scores)["reward_failed/judge"] == 0.5


@pytest.mark.parametrize(("combine", "expected"), [("mean", [2.0, 4.0]), ("min", [1.0, 4.0])])
def test_an_ensemble_is_one_part_whose_disagreement_is_known(combine: str, expected: list[float]) -> None:
    scores = RewardMix((part("models", [1.0, 4.0], [3.0, 4.0], combine=combine),)).score([]).result()
    assert scores.total_B.tolist() == expected
    assert scores.disagreement_B is not None and scores.disagreement_B.tolist() == [1.0, 0.0]
    assert score_metrics(scores)["reward_disagreement"] == 0.5


def test_metrics_of_a_part_without_any_score_leave_its_mean_out() -> None:
    scores = RewardMix((part("a", [1.0]), part("judge", [Failed("x")], [Failed("x")], hold_out=True))).score([]).result()
    assert score_metrics(scores) == {"reward_failed/a": 0.0, "reward/a": 1.0, "reward_failed/judge": 1.0}


class Echo(RulePart):
    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Everything that a sample has, in one number."""
        return [float(s.text) + 10 * len(s.ids) + 100 * s.finished + 1000 * len(s.messages) for s in samples]


def test_a_rule_sees_text_ids_and_conversation() -> None:
    prompt = Prompt("p", "", np.array([1], np.int32), ({"role": "user", "content": "hi"},))
    rollouts = [
        Rollout(prompt, 0, np.array([5] * n, np.int32), np.zeros(n, np.float32), finish, 0)
        for n, finish in ((1, FinishReason.STOP), (2, FinishReason.LENGTH))
    ]
    source = RuleSource(Echo(type="echo"), decode=lambda ids: str(len(ids)))
    assert source.score(rollouts).result() == [1111.0, 1022.0]


def test_a_mix_in_a_recipe_reads_back(tmp_path: Path) -> None:
    options = ['--reward.parts.short={type="length", maximum=20}', "--reward.parts.short.weight=0.5", "--reward.combine=min"]
    recipe = load_recipe(None, options)
    assert recipe.reward.mix()["short"] == LengthReward(type="length", maximum=20, weight=0.5)
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_a_search_may_vary_a_part() -> None:
    weight = '--tune.space={"reward.parts.short.weight" = {type = "uniform", low = 0.1, high = 1.0}}'
    recipe = load_recipe(None, ['--reward.parts.short={type="length", maximum=20}', weight])
    assert with_values(recipe, {"reward.parts.short.weight": 0.25}).reward.parts["short"].weight == 0.25
    with pytest.raises(ConfigError, match="unknown key wait"):
        with_values(recipe, {"reward.parts.short.wait": 0.25})


def test_the_short_form_is_one_reward_model() -> None:
    assert list(load_recipe(None).reward.mix()) == ["reward_model"]
    models = load_recipe(None, ["--reward.path=a", '--reward.parts.all={type="reward_model", paths=["a", "b", "b", "c"]}']).reward
    assert models.model_paths() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (['--reward.parts.a={type="length", maximun=20}'], ["reward.parts.a", "did you mean maximum?"]),
        (['--reward.parts.a={type="length"}'], ["reward.parts.a.maximum", "required"]),
        (['--reward.parts.a={type="length", maximum=3, minimum=4}'], ["minimum = 4", "exchange"]),
        (['--reward.parts.a={type="lenght"}'], ["'lenght'", "not one of reward_model, function, length"]),
        (["--reward.parts.a={type='pattern', pattern='a('}"], ["no regular expression", "position 1"]),
        (['--reward.parts.a={type="function", function="f"}'], ["module:callable"]),
        (['--reward.parts.a={type="reward_model", hold_out=true}'], ["only held-out parts"]),
        (['--reward.parts.a={type="reward_model", weight=0}'], ["reward.parts.a.weight = 0", "hold_out = true"]),
        (['--reward.parts.a={type="reward_model", weight=-1}', "--reward.combine=mean"], ["more than 0"]),
        (['--reward.parts."a b"={type="reward_model"}'], ["letters, digits"]),
    ],
)
def test_a_wrong_mix_is_refused_with_its_remedy(options: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, options)
    assert all(part in str(caught.value) for part in parts), caught.value
