"""One real update, DeepSpeed and all, on one rank in large micro-batches and on two ranks in small ones: the same numbers."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.config.ppo import PpoConfig
from app.data.token_cache import SftRow, write_threads
from app.experience import Experience
from app.models.heads import ValueModel, init_reward_model, save_reward_model
from app.models.load import load_causal_lm, load_tokenizer
from app.models.policy import PolicyModel
from app.numerics import gather_response
from app.workers.ppo_checkpoint import policy_weights
from tests.bigram_models import ROWS, sample_experience
from tests.tiny_models import make_neox

TEMPERATURE = 0.9
TEXTS = {"path": "texts", "batch_size": 8, "micro_batch_size": 2}
AT_ONCE = {"epochs": 1, "minibatches": 1}
"""One rank then learns from the forward passes that it inspected the batch with, two ranks run theirs again."""

CONFIGS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": {"entropy_coef": 0.01}, "pretraining": {**TEXTS, "coef": 0.0}},
    "ppo_without_texts": {"algorithm": {"entropy_coef": 0.01}},
    "grpo": {"algorithm": {"name": "grpo"}, "samples_per_prompt": 2},
    "frozen": {"algorithm": {"name": "grpo"}, "samples_per_prompt": 2, "freeze_layers": 1},
    "lora": {"algorithm": {"name": "grpo"}, "samples_per_prompt": 2, "lora": {"rank": 4, "alpha": 6}},
    "warm_up": {"critic_warmup_steps": 1, "pretraining": {**TEXTS, "coef": 0.5}},
    "value_head": {
        "critic_warmup_steps": 1,
        "pretraining": {**TEXTS, "coef": 0.5},
        "critic_model": "value_head",
    },
    "warm_up_at_once": {"critic_warmup_steps": 1, "pretraining": {**TEXTS, "coef": 0.5}, **AT_ONCE},
    "value_head_at_once": {"critic_warmup_steps": 1, "pretraining": {**TEXTS, "coef": 0.5}, "critic_model": "value_head", **AT_ONCE},
}
WARM_UP = [name for name, config in CONFIGS.items() if "critic_warmup_steps" in config]
ZERO_STAGE = {("lora", 2): 3, ("value_head", 2): 2, ("value_head_at_once", 2): 3}
CANARY = torch.arange(4, 40)
UPDATE = """
import sys
from pathlib import Path
import numpy as np
import torch
from app.workers.learner import LearnerSpec, LearnerWorker

canary = [np.arange(4, 40, dtype=np.int32)]
folder, rank, world, port, temperature = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
out = {}
for name, (config, experience) in torch.load(f"{folder}/inputs-{world}.pt", weights_only=False).items():
    worker = LearnerWorker()
    spec = LearnerSpec(f"{folder}/policy", f"{folder}/reward", "fp32", temperature, config, pretraining=Path(folder, "texts.arrow"))
    worker.start(spec, rank, world, ("127.0.0.1", port))
    logprobs, metrics = worker.logprobs(canary), {}
    out[name] = [(metrics, logprobs)]
    for step in (0, 3) if config.critic_warmup_steps else (3,):
        if config.reuse_forward:
            worker.inspect(experience.tokens)
        metrics = worker.update(experience, step)
        logprobs = worker.logprobs(canary)
        out[name].append((metrics, logprobs))
    worker.save(f"{folder}/saved-{name}-{world}")
    worker.export(f"{folder}/exported-{name}-{world}")
    worker.update(experience, 4)
    straight = worker.logprobs(canary)
    worker.load(f"{folder}/saved-{name}-{world}")
    assert (worker.logprobs(canary)[0] == logprobs[0]).all()
    worker.update(experience, 4)
    assert (worker.logprobs(canary)[0] == straight[0]).all() and (straight[0] != logprobs[0]).any()
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
        proximal_BT, _, _ = policy(tokens.ids_BS, tokens.attention_BS, tokens.prompt_lengths_B, tokens.mask_BT, TEMPERATURE)
        values_BS = critic(tokens.ids_BS, tokens.attention_BS)
    values_BT = gather_response(values_BS[:, :-1], tokens.prompt_lengths_B, tokens.mask_BT) if algorithm.has_critic else None
    if config.has_value_head:
        values_BT = torch.zeros(tokens.mask_BT.shape)
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
    reuse = {"reuse_forward": world == 1 and name.endswith("_at_once")}
    return PpoConfig.model_validate({**common, **workers, **reuse, **CONFIGS[name]})


def has_critic_model(name: str) -> bool:
    return config_of(name, 1, 4).has_critic_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outputs(folder: Path) -> dict[int, dict[str, Any]]:
    """Metrics of each update, and log-probs before and after them, by number of ranks and name of the config; all at once."""
    policy, reward = make_neox(folder / "policy"), str(folder / "reward")
    save_reward_model(init_reward_model(policy, seed=0), load_tokenizer(policy), reward, reward_offset=0.5)
    draw = np.random.default_rng(0)
    texts = [draw.integers(4, 260, size).astype(np.int32) for size in draw.integers(3, 30, 20)]
    write_threads((SftRow(ids, np.arange(len(ids)) % 5 > 0) for ids in texts), folder / "texts.arrow")
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
        assert saved == ({"policy", "critic"} if has_critic_model(name) else {"policy"})
    return {world: torch.load(folder / f"outputs-{world}.pt", weights_only=False) for world in (1, 2)}


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_and_micro_batches_do_not_matter(name: str, outputs: dict[int, dict[str, Any]]) -> None:
    for (one, one_logprobs), (two, two_logprobs) in zip(outputs[1][name][1:], outputs[2][name][1:], strict=True):
        assert one.keys() == two.keys()
        for metric in one.keys() - {"first_step_mismatch"}:
            assert two[metric] == pytest.approx(one[metric], rel=1e-4, abs=1e-5), metric
        assert max(one["first_step_mismatch"], two["first_step_mismatch"]) < 1e-5
        assert ("critic_grad_norm" in one) is has_critic_model(name)
        assert abs(one_logprobs[0] - two_logprobs[0]).max() < 1e-4


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", WARM_UP)
def test_the_warm_up_leaves_the_policy_as_it_is_bit_for_bit(name: str, world: int, outputs: dict[int, dict[str, Any]]) -> None:
    (_, before), (warm_up, between), (metrics, after) = outputs[world][name]
    assert np.array_equal(before[0], between[0]) and abs(after[0] - between[0]).max() > 1e-3
    assert ("policy_grad_norm" in warm_up) is name.startswith("value_head")  # of the head alone
    assert metrics["value_loss"] != warm_up["value_loss"]
    if not name.endswith("_at_once"):  # a single step at this rate goes too far
        assert metrics["value_loss"] < warm_up["value_loss"], "the critic has not learnt"
    assert "pretraining_loss" not in warm_up and 3 < metrics["pretraining_loss"] < 9


@pytest.mark.parametrize("world", [1, 2])
def test_texts_without_a_weight_change_nothing_bit_for_bit(world: int, outputs: dict[int, dict[str, Any]]) -> None:
    (off, off_logprobs), (without, logprobs) = outputs[world]["ppo"][1], outputs[world]["ppo_without_texts"][1]
    assert off == without and np.array_equal(off_logprobs[0], logprobs[0])


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
    assert abs(logprobs_T.numpy() - outputs[world][name][1][1][0]).max() < 1e-4
    for weight, tensor in policy_weights(folder / f"saved-{name}-{world}").items():
        assert torch.equal(tensor, model.state_dict()[weight]), weight
