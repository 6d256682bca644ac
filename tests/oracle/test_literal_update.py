"""One update of every algorithm on a tiny transformer: batch, gradients and weights against an independent version.

The independent version knows one sequence at a time, without padding or batches: plain log-softmax over the model's logits, token
by token, the literal credit and losses, gradients by autograd of the literal sum, and optimizers written out. The other side is
what the learner runs: padded micro-batches, `PolicyModel`, `ValueModel`, credit and loss of app.algorithms.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from app.algorithms.algorithm import Algorithm
from app.algorithms.grpo import Grpo, GrpoOptions
from app.algorithms.ppo import Ppo, PpoOptions
from app.algorithms.reinforce_pp import ReinforcePp, ReinforcePpOptions
from app.algorithms.rloo import Rloo, RlooOptions
from app.algorithms.surrogate import Surrogate, SurrogateConfig
from app.experience import Experience, FinishReason, Minibatch, PolicyOutputs, Prompt, Rollout, TokenBatch, Totals
from app.models.heads import ValueModel
from app.models.load import load_causal_lm
from app.models.policy import PolicyModel
from app.numerics import gather_response
from tests.oracle.literal_step import Row, Settings, Token, credit
from tests.tiny_models import VOCABULARY, make_neox

KL_COEF, TEMPERATURE, LR = 0.2, 0.8, 0.05
GROUPS = [0, 0, 1, 1, 0, 1]
SCORES = [1.5, -0.5, 0.25, 2.0, -1.0, 0.75]
SHAPES = [(5, 4), (3, 7), (6, 1), (2, 5), (4, 6), (7, 3)]  # prompt and response tokens
ADAM = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-5}
FULL = {"clip_high": 0.28, "dual_clip": 3.0, "entropy_coef": 0.02}
CASES: dict[str, tuple[Algorithm[Any], Settings]] = {
    "ppo": (
        Ppo(PpoOptions(lam=0.9, value_coef=0.5)),
        Settings("ppo", lam=0.9, value_coef=0.5, value_clip=0.2, whiten=True),
    ),
    "grpo": (
        Grpo(GrpoOptions(), Surrogate(SurrogateConfig(**FULL), kl_in_reward=False, kl_in_loss="k3")),  # type: ignore[arg-type]
        Settings("grpo", kl_in_reward=False, kl_in_loss="k3", per_sequence=True, **FULL),  # type: ignore[arg-type]
    ),
    "rloo": (Rloo(RlooOptions()), Settings("rloo")),
    "reinforce_pp": (
        ReinforcePp(ReinforcePpOptions(gamma=0.95), Surrogate(max_lag=1, kl_in_reward=True, kl_in_loss="k2")),
        Settings("reinforce_pp", gamma=0.95, max_lag=1, kl_in_loss="k2"),
    ),
}


class Setup(NamedTuple):
    """Four models (float64) and rollouts of the proximal policy's prompts; `policy` and `critic` are where the update begins."""

    policy: PreTrainedModel
    critic: ValueModel | PolicyModel
    proximal: PreTrainedModel
    old_critic: ValueModel | PolicyModel
    behaviour: PreTrainedModel
    reference: PreTrainedModel
    rollouts: list[Rollout]


def moved(model: Any, seed: int, size: float) -> Any:
    """A copy a random step away."""
    import copy

    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return other


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    path = make_neox(Path(tmp_path_factory.mktemp("policy")))
    proximal = load_causal_lm(path).double()
    old_critic = moved(ValueModel.from_causal_lm(path).double(), 1, 0.3)
    torch.manual_seed(3)
    torch.nn.init.normal_(old_critic.head.weight, std=0.3)
    draw = np.random.default_rng(0)
    rollouts = []
    for number, (prompt, response) in enumerate(SHAPES):
        ids = draw.integers(4, VOCABULARY, prompt + response).astype(np.int32)
        item = Prompt(str(GROUPS[number]), "", ids[:prompt])
        rollouts.append(Rollout(item, number, ids[prompt:], np.zeros(response, np.float32), FinishReason.STOP, 0))
    return Setup(
        policy=moved(proximal, 5, 0.05),
        critic=moved(old_critic, 6, 0.05),
        proximal=proximal,
        old_critic=old_critic,
        behaviour=moved(proximal, 7, 0.05),
        reference=moved(proximal, 8, 0.1),
        rollouts=rollouts,
    )


# --- the independent version ---------------------------------------------------------------------------------------------


def literal_outputs(model: PreTrainedModel, rollout: Rollout) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-prob and entropy of each response token, each a scalar, from one unpadded sequence."""
    ids = torch.from_numpy(rollout.sequence.astype(np.int64))
    logits_SV = model(ids[None]).logits[0] / TEMPERATURE
    logprobs, entropies = [], []
    for place in range(len(rollout.prompt.ids), len(ids)):
        distribution_V = logits_SV[place - 1].exp() / logits_SV[place - 1].exp().sum()
        logprobs.append(distribution_V[ids[place]].log())
        entropies.append(-(distribution_V * distribution_V.log()).sum())
    return logprobs, entropies


def literal_values(critic: ValueModel | PolicyModel, rollout: Rollout) -> list[torch.Tensor]:
    """Of a model of its own, or of a policy's value head."""
    ids = torch.from_numpy(rollout.sequence.astype(np.int64))
    if isinstance(critic, PolicyModel):
        inner, outer = critic.value_head.inner, critic.value_head.outer  # type: ignore[union-attr]
        hidden_SH = critic.language_model(ids[None], output_hidden_states=True).hidden_states[-1][0]
        states = range(len(rollout.prompt.ids) - 1, len(ids) - 1)
        return [(inner.weight @ hidden_SH[s] + inner.bias).clamp(min=0) @ outer.weight[0] + outer.bias[0] for s in states]
    hidden_SH = critic.trunk(ids[None]).last_hidden_state[0]
    states = range(len(rollout.prompt.ids) - 1, len(ids) - 1)
    return [hidden_SH[state] @ critic.head.weight[0] + critic.head.bias[0] for state in states]


def literal_rows(setup: Setup, algorithm: Algorithm[Any], settings: Settings) -> list[Row]:
    """The batch, credited."""
    rows = []
    for number, rollout in enumerate(setup.rollouts):
        with torch.no_grad():
            behaviour, proximal, reference = (
                literal_outputs(model, rollout)[0] for model in (setup.behaviour, setup.proximal, setup.reference)
            )
            values = literal_values(setup.old_critic, rollout) if algorithm.has_critic else [torch.zeros(())] * len(rollout.ids)
        row = Row(SCORES[number], GROUPS[number])
        for b, p, r, v in zip(behaviour, proximal, reference, values, strict=True):
            row.tokens.append(Token(float(b), float(p), float(r), current=math.nan, entropy=math.nan, old_value=float(v)))
        rows.append(row)
    credit(rows, settings)
    return rows


def literal_loss(setup: Setup, rows: list[Row], settings: Settings, algorithm: Algorithm[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(policy loss, value loss) as sums of scalars that carry gradients, straight from the formulas."""
    count = sum(len(row.tokens) for row in rows)
    policy, value = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    high = settings.clip if settings.clip_high is None else settings.clip_high
    for row, rollout in zip(rows, setup.rollouts, strict=True):
        share = 1 / (len(rows) * len(row.tokens)) if settings.per_sequence else 1 / count
        values = literal_values(setup.critic, rollout) if algorithm.has_critic else [None] * len(row.tokens)
        for token, current, entropy, new_value in zip(row.tokens, *literal_outputs(setup.policy, rollout), values, strict=True):
            ratio = (current - token.proximal).exp()
            bounded = ratio if 1 - settings.clip <= ratio <= 1 + high else torch.tensor(1 + high if ratio > 1 else 1 - settings.clip)
            objective = min(ratio * token.advantage, bounded * token.advantage)
            if settings.dual_clip is not None and token.advantage < 0 and objective < settings.dual_clip * token.advantage:
                objective = torch.tensor(settings.dual_clip * token.advantage)
            weight = min(math.exp(token.proximal - token.behaviour), settings.max_importance) if settings.max_lag else 1.0
            policy = policy - share * weight * objective - share * settings.entropy_coef * entropy
            if settings.kl_in_loss is not None:
                weight = min(math.exp(current.item() - (token.behaviour if settings.max_lag else token.proximal)), settings.max_importance)
                apart = current - token.reference
                estimate = apart**2 / 2 if settings.kl_in_loss == "k2" else (-apart).exp() - 1 + apart
                policy = policy + share * settings.kl_coef * weight * estimate
            if new_value is not None:
                assert settings.value_clip is not None
                error = (new_value - token.returns) ** 2
                step = new_value.item() - token.old_value
                if abs(step) > settings.value_clip:
                    far = (token.old_value + math.copysign(settings.value_clip, step) - token.returns) ** 2
                    error = torch.tensor(far) if far > error.item() else error
                value = value + settings.value_coef * error / 2 / count
    return policy, value


def literal_adam(gradients: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """The first step from empty moments: m / (1 - b1) = g and v / (1 - b2) = g^2."""
    out = []
    for gradient, weight in zip(gradients, weights, strict=True):
        mean = (1 - 0.9) * gradient / (1 - 0.9)
        square = (1 - 0.95) * gradient**2 / (1 - 0.95)
        out.append(weight - 0.01 * mean / (square.sqrt() + 1e-5))
    return out


# --- what the learner runs -----------------------------------------------------------------------------------------------


def forward(policy: PreTrainedModel, critic: ValueModel | PolicyModel | None, tokens: TokenBatch) -> PolicyOutputs:
    """As LearnerWorker does it."""
    model = critic if isinstance(critic, PolicyModel) else PolicyModel(policy)
    logprobs_BT, entropy_BT, values_BT = model(
        tokens.ids_BS, tokens.attention_BS, tokens.prompt_lengths_B, tokens.mask_BT, TEMPERATURE, True
    )
    if isinstance(critic, ValueModel):
        values_BS = critic(tokens.ids_BS, tokens.attention_BS)
        values_BT = gather_response(values_BS[:, :-1], tokens.prompt_lengths_B, tokens.mask_BT)
    return PolicyOutputs(logprobs_BT, values_BT, entropy_BT)


def credited_batch(setup: Setup, algorithm: Algorithm[Any]) -> Experience:
    tokens = TokenBatch.from_rollouts(setup.rollouts, pad_id=0)
    with torch.no_grad():
        before = forward(setup.proximal, setup.old_critic if algorithm.has_critic else None, tokens)
        behaviour_BT = forward(setup.behaviour, None, tokens).logprobs_BT
        reference_BT = forward(setup.reference, None, tokens).logprobs_BT
    experience = Experience(
        tokens,
        torch.tensor(SCORES, dtype=torch.float64),
        behaviour_BT,
        before.logprobs_BT,
        reference_BT,
        before.values_BT,
        torch.tensor(GROUPS),
    )
    return algorithm.credit(experience, kl_coef=KL_COEF)


@pytest.mark.parametrize(("algorithm", "settings"), CASES.values(), ids=CASES.keys())
def test_update(setup: Setup, algorithm: Algorithm[Any], settings: Settings) -> None:
    settings = replace(settings, kl_coef=KL_COEF)
    rows, credited = literal_rows(setup, algorithm, settings), credited_batch(setup, algorithm)
    for name, actual_BT in (("advantage", credited.advantages_BT), ("returns", credited.returns_BT)):
        assert actual_BT is not None
        expected = torch.tensor([getattr(token, name) for row in rows for token in row.tokens], dtype=torch.float64)
        torch.testing.assert_close(actual_BT[credited.mask_BT].double(), expected, rtol=1e-5, atol=1e-5)

    parameters = [*setup.policy.parameters(), *(setup.critic.parameters() if algorithm.has_critic else [])]
    policy, value = literal_loss(setup, rows, settings, algorithm)
    expected_gradients = gradients_of(policy + value, parameters)
    totals = Totals(tokens=int(credited.mask_BT.sum()), sequences=len(rows))
    policy_sum, value_sum, gradients = 0.0, 0.0, [torch.zeros_like(p) for p in parameters]
    for part in ([0, 3], [5, 1, 4], [2]):  # uneven micro-batches, in no order
        minibatch = Minibatch.from_rows(credited, torch.tensor(part))
        loss = algorithm.loss(forward(setup.policy, setup.critic if algorithm.has_critic else None, minibatch.tokens), minibatch, totals)
        policy_sum += loss.policy.item()
        value_sum += 0.0 if loss.value is None else loss.value.item()
        added = gradients_of(loss.policy if loss.value is None else loss.policy + loss.value, parameters)
        gradients = [total + one for total, one in zip(gradients, added, strict=True)]
    assert (policy_sum, value_sum) == pytest.approx((policy.item(), value.item()), rel=1e-5, abs=1e-7)
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients)
    assert largest > 1e-3
    apart = max(float((ours - theirs).abs().max()) for ours, theirs in zip(gradients, expected_gradients, strict=True))
    assert apart < 1e-5 * largest

    weights = [parameter.detach().clone() for parameter in parameters]
    for optimizer, expected_step in (
        (lambda p: torch.optim.SGD(p, lr=LR), [w - LR * g for w, g in zip(weights, expected_gradients, strict=True)]),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.0, **ADAM), literal_adam(gradients, weights)),
    ):
        assert_step(optimizer, weights, gradients, expected_step)


def gradients_of(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_step(optimizer: Any, weights: list[torch.Tensor], gradients: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The change of the weights is the expected one within 1e-4 of the largest change."""
    stepped = [torch.nn.Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(stepped, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer(stepped).step()
    changes = [(after.detach() - before, literal - before) for after, before, literal in zip(stepped, weights, expected, strict=True)]
    largest = max(float(theirs.abs().max()) for _, theirs in changes)
    assert largest > 1e-4
    assert max(float((ours - theirs).abs().max()) for ours, theirs in changes) < 1e-4 * largest
