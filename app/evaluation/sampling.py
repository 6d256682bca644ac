"""Answers for a sampling report: every prompt under every sampling configuration, several times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from app.config.data import DataConfig
from app.data.encoding import Cuts, encode_prompts
from app.data.templates import Template
from app.evaluation.progress import Advance
from app.evaluation.sampling_config import SamplingConfig
from app.evaluation.sampling_report import PromptResults, SamplingResult
from app.experience import IntArray
from app.formats.records import Message, PromptItem
from app.workers.sampling import request_seed

REQUESTS_PER_CALL = 256
"""Answers that are sampled together, so that progress is seen and a failure found early."""


class Sampler(Protocol):
    """What samples. `VllmRolloutPool` is one."""

    def sample(self, prompts: Sequence[IntArray], settings: Sequence[Mapping[str, Any]]) -> list[IntArray]:
        """One response (token ids) per prompt, each under vLLM sampling settings of its own. Raises RolloutError."""
        ...


@dataclass(frozen=True)
class Request:
    """One answer to sample. config: place among the configurations; ids: int32 [P], the prompt; settings: vLLM's."""

    prompt: PromptItem
    config: int
    ids: IntArray
    settings: Mapping[str, Any]


def requests(
    prompts: Sequence[PromptItem],
    configurations: Sequence[SamplingConfig],
    template: Template,
    *,
    num_samples: int,
    seed: int,
    data: DataConfig,
) -> list[Request]:
    """Prompt by prompt, `num_samples` answers under each configuration, or one under a greedy one.

    The seed of an answer depends on `seed`, the prompt and the number of the sample alone.
    """
    encoded = {
        system: list(encode_prompts([_under(system, prompt) for prompt in prompts], template, data, Cuts()))
        for system in {configuration.system for configuration in configurations}
    }
    return [
        Request(
            prompt,
            number,
            encoded[config.system][k].ids,
            {**config.generate_args.engine_settings(), "seed": request_seed(seed, prompt.id, i)},
        )
        for k, prompt in enumerate(prompts)
        for number, config in enumerate(configurations)
        for i in range(1 if config.generate_args.is_greedy else num_samples)
    ]


def _under(system: str | None, prompt: PromptItem) -> PromptItem:
    """The prompt behind a system message; one that has its own keeps it."""
    if system is None or prompt.messages[0].role == "system":
        return prompt
    return replace(prompt, messages=(Message("system", system), *prompt.messages))


def answer(sampler: Sampler, wanted: Sequence[Request], template: Template, advance: Advance) -> list[str]:
    """The text of each request's answer."""
    texts = []
    for start in range(0, len(wanted), REQUESTS_PER_CALL):
        part = wanted[start : start + REQUESTS_PER_CALL]
        texts += [template.decode(ids) for ids in sampler.sample([r.ids for r in part], [r.settings for r in part])]
        advance(len(part))
    return texts


def results(wanted: Sequence[Request], texts: Sequence[str], configurations: Sequence[SamplingConfig]) -> list[PromptResults]:
    """The answers put together by prompt and configuration, in the order of the requests."""
    outputs: dict[PromptItem, dict[int, list[str]]] = {}
    for request, text in zip(wanted, texts, strict=True):
        outputs.setdefault(request.prompt, {}).setdefault(request.config, []).append(text)
    return [
        PromptResults.of(prompt.messages, (_result(configurations[number], texts) for number, texts in by_config.items()))
        for prompt, by_config in outputs.items()
    ]


def _result(config: SamplingConfig, texts: Sequence[str]) -> SamplingResult:
    return SamplingResult(sampling_config=config.name, sampling_params=config.as_params(), outputs=tuple(texts))
