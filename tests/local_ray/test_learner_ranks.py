"""One real update, DeepSpeed and all, on one rank in large micro-batches and on two ranks in small ones: the same numbers."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.config.ppo import PpoConfig
from app.experience import Experience
from app.models.heads import ValueModel, init_reward_model, save_reward_model
from app.models.load import load_causal_lm, load_tokenizer
from app.models.policy import PolicyModel
from app.numerics import gather_response
from app.workers.ppo_checkpoint import policy_weights
from tests.bigram_models import ROWS, sample_experience
from tests.tiny_models import make_neox

TEMPERATURE = 0.9
CONFIGS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": {"entropy_coef": 0.01}},
    "grpo": {"algorithm": {"name": "grpo"}, "samples_per_prompt": 2},
    "frozen": {"algorithm": {"name": "grpo"}, "samples_per_prompt": 2, "freeze_layers": 1},
    "lora": {"algorithm": {"name": "grpo"}, "samples_per_prompt": 2, "lora": {"rank": 4, "alpha": 6}},
}
ZERO_STAGE = {("lora", 2): 3}
CANARY = torch.arange(4, 40)
UPDATE = """
import sys
import numpy as np
import torch
from app.workers.learner import LearnerSpec, LearnerWorker

canary = [np.arange(4, 40, dtype=np.int32)]
folder, rank, world, port, temperature = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
out = {}
for name, (config, experience) in torch.load(f"{folder}/inputs-{world}.pt", weights_only=False).items():
    worker = LearnerWorker()
    worker.start(LearnerSpec(f"{folder}/policy", f"{folder}/reward", "fp32", temperature, config), rank, world, ("127.0.0.1", port))
    metrics = worker.update(experience, 3)
    logprobs = worker.logprobs(canary)
    worker.save(f"{folder}/saved-{name}-{world}")
    worker.export(f"{folder}/exported-{name}-{world}")
    worker.update(experience, 4)
    straight = worker.logprobs(canary)
    worker.load(f"{folder}/saved-{name}-{world}")
    assert (worker.logprobs(canary)[0] == logprobs[0]).all()
    worker.update(experience, 4)
    assert (worker.logprobs(canary)[0] == straight[0]).all() and (straight[0] != logprobs[0]).any()
    out[name] = metrics, logprobs
if rank == 0:
    torch.save(out, f"{folder}/outputs-{world}.pt")
"""


def experience_of(config: PpoConfig, policy_path: str, reward_path: str) -> Experience:
    """A credited batch whose proximal log-probs and values are those of the models that the learner starts from."""
    algorithm = config.make_algorithm()
    batch = sample_experience(11, algorithm)
    tokens = batch.tokens
    policy, critic = PolicyModel(load_causal_lm(policy_path)), ValueModel.from_reward_model(reward_path)
    with torch.no_grad():
        proximal_BT, _ = policy(tokens.ids_BS, tokens.attention_BS, tokens.prompt_lengths_B, tokens.mask_BT, TEMPERATURE)
        values_BS = critic(tokens.ids_BS, tokens.attention_BS)
    values_BT = gather_response(values_BS[:, :-1], tokens.prompt_lengths_B, tokens.mask_BT) if algorithm.has_critic else None
    reference_BT = (proximal_BT + 0.1 * batch.reference_BT).float() * tokens.mask_BT
    experience = replace(
        batch,
        scores_B=batch.scores_B.float(),
        behaviour_BT=proximal_BT,
        proximal_BT=proximal_BT,
        reference_BT=reference_BT,
        values_BT=values_BT,
    )
    return algorithm.credit(experience, kl_coef=0.1)


def config_of(name: str, world: int, micro_batch_size: int) -> PpoConfig:
    optimizer = {"lr": 1e-2, "eps": 1e-3}  # a large eps: Adam's first steps blow up rounding where gradients are nearly 0
    zero = {"deepspeed": {"zero_stage": ZERO_STAGE.get((name, world), 1)}}
    free = {"max_logprob_mismatch": 100}  # the batch is learnt from again after the weights have moved
    common = {**zero, **free, "batch_size": ROWS, "epochs": 2, "minibatches": 2, "policy": optimizer, "critic": optimizer}
    workers = {"workers": {"count": world}, "micro_batch_size": micro_batch_size}
    return PpoConfig.model_validate({**common, **workers, **CONFIGS[name]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outputs(folder: Path) -> dict[int, dict[str, Any]]:
    """Metrics and log-probs after the update, by number of ranks and name of the config; all three processes at once."""
    policy, reward = make_neox(folder / "policy"), str(folder / "reward")
    save_reward_model(init_reward_model(policy, seed=0), load_tokenizer(policy), reward, reward_offset=0.5)
    processes = []
    for world, micro_batch_size in ((1, 4), (2, 1)):
        inputs = {}
        for name in CONFIGS:
            config = config_of(name, world, micro_batch_size)
            inputs[name] = config, experience_of(config, policy, reward)
        torch.save(inputs, folder / f"inputs-{world}.pt")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world):
            command = [sys.executable, "-c", UPDATE, *map(str, (folder, rank, world, port, TEMPERATURE))]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-3000:]
    for name in CONFIGS:
        saved = {path.name for path in (folder / f"saved-{name}-2").iterdir()}
        assert saved == ({"policy", "critic"} if name == "ppo" else {"policy"})
    return {world: torch.load(folder / f"outputs-{world}.pt", weights_only=False) for world in (1, 2)}


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_and_micro_batches_do_not_matter(name: str, outputs: dict[int, dict[str, Any]]) -> None:
    (one, one_logprobs), (two, two_logprobs) = outputs[1][name], outputs[2][name]
    assert one.keys() == two.keys()
    for metric in one.keys() - {"first_step_mismatch"}:
        assert two[metric] == pytest.approx(one[metric], rel=1e-4, abs=1e-5), metric
    assert max(one["first_step_mismatch"], two["first_step_mismatch"]) < 1e-5
    assert ("critic_grad_norm" in one) is (name == "ppo")
    assert abs(one_logprobs[0] - two_logprobs[0]).max() < 1e-4


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["frozen", "lora"])
def test_nothing_but_what_is_trained_moves(name: str, world: int, outputs: dict[int, dict[str, Any]], folder: Path) -> None:
    """In the exported model, which computes what the learner did and is what its checkpoint holds."""
    start, model = load_causal_lm(str(folder / "policy")).state_dict(), load_causal_lm(str(folder / f"exported-{name}-{world}"))
    moved = {weight for weight, tensor in model.state_dict().items() if not torch.equal(tensor, start[weight])}
    linear = {f"{weight}.weight" for weight, part in model.base_model.named_modules(prefix="gpt_neox") if isinstance(part, torch.nn.Linear)}
    lower = {weight for weight in start if weight.startswith(("gpt_neox.layers.0.", "gpt_neox.embed_in."))}
    assert moved == (linear if name == "lora" else start.keys() - lower)
    with torch.no_grad():
        logprobs_T = model(CANARY[None]).logits[0, :-1].log_softmax(-1).gather(-1, CANARY[1:, None])[:, 0]
    assert abs(logprobs_T.numpy() - outputs[world][name][1][0]).max() < 1e-4
    for weight, tensor in policy_weights(folder / f"saved-{name}-{world}").items():
        assert torch.equal(tensor, model.state_dict()[weight]), weight
