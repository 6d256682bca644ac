"""Requests for a report and their answers put together, with a sampler that repeats its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from app.config.data import DataConfig
from app.data.templates import Template, build_template
from app.evaluation.sampling import REQUESTS_PER_CALL, Request, answer, requests, results
from app.evaluation.sampling_config import GenerateArgs, SamplingConfig
from app.experience import IntArray
from app.formats.records import Message, PromptItem
from tests.tiny_models import make_tokenizer

CONFIGURATIONS = [
    SamplingConfig("k50", GenerateArgs(top_k=50, max_new_tokens=8)),
    SamplingConfig("greedy", GenerateArgs(do_sample=False), "Be brief."),
]
PROMPTS = [PromptItem(name, name, (Message("user", f"Question {name}"),)) for name in ("a", "b")]


class Echo:
    """Answers with the prompt's last bytes and its temperature."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def sample(self, prompts: Sequence[IntArray], settings: Sequence[Mapping[str, Any]]) -> list[IntArray]:
        self.calls.append(len(prompts))
        tokenizer = make_tokenizer()
        texts = [
            f"{tokenizer.decode(ids, skip_special_tokens=True)[-1]} at {s['temperature']:g}"
            for ids, s in zip(prompts, settings, strict=True)
        ]
        return [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]


@pytest.fixture(scope="module")
def template() -> Template:
    return build_template("chat", make_tokenizer())


def wanted(template: Template, prompts: Sequence[PromptItem] = PROMPTS, samples: int = 3, seed: int = 1) -> list[Request]:
    return requests(prompts, CONFIGURATIONS, template, num_samples=samples, seed=seed, data=DataConfig(max_prompt_length=64))


def test_greedy_is_sampled_once(template: Template) -> None:
    assert [(r.prompt.id, r.config) for r in wanted(template)] == [("a", 0)] * 3 + [("a", 1)] + [("b", 0)] * 3 + [("b", 1)]


def test_seeds_depend_on_prompt_and_sample_alone(template: Template) -> None:
    seeds = {(r.prompt.id, k % 4): r.settings["seed"] for k, r in enumerate(wanted(template)) if r.config == 0}
    assert len(set(seeds.values())) == 6
    alone = wanted(template, PROMPTS[1:], samples=1)
    assert alone[0].settings["seed"] == seeds["b", 0]
    assert wanted(template, seed=2)[0].settings["seed"] != seeds["a", 0]


def test_a_system_message_stands_in_front_of_prompts_without_one(template: Template) -> None:
    own = PromptItem("c", "c", (Message("system", "Rhyme."), Message("user", "Question c")))
    texts = [template.tokenizer.decode(r.ids) for r in wanted(template, [PROMPTS[0], own], samples=1)]
    assert [text.count("Be brief.") for text in texts] == [0, 1, 0, 0]
    assert [text.count("Rhyme.") for text in texts] == [0, 0, 1, 1]
    assert all(text.endswith("<|assistant|>") for text in texts)


def test_answers_find_their_place(template: Template) -> None:
    many = [PromptItem(str(k), str(k), (Message("user", f"Question {k}"),)) for k in range(100)]
    asked, sampler, progressed = wanted(template, many), Echo(), []
    texts = answer(sampler, asked, template, progressed.append)
    assert sampler.calls == progressed == [REQUESTS_PER_CALL, 400 - REQUESTS_PER_CALL]
    answered = results(asked, texts, CONFIGURATIONS)
    assert [row.prompt for row in answered] == [f"Question {k}" for k in range(100)]
    for k, row in enumerate(answered):
        assert [(r.sampling_config, r.outputs) for r in row.results] == [
            ("k50", (f"{k % 10} at 1",) * 3),
            ("greedy", (f"{k % 10} at 0",)),
        ]
    assert answered[0].results[1].sampling_params == {"do_sample": False, "system": "Be brief."}
