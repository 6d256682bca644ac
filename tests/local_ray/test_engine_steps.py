"""What is in a step's gradient, and that one that is not finite stops before it is in the weights: DeepSpeed's real engines, in a process
of their own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

ENGINES = """
import json, os, sys
import torch
from app.config.shared import DeepSpeedConfig, OptimizerConfig
from app.errors import NonFiniteError
from app.numerics.policy_loss import clipped_policy_loss
from app.workers import deepspeed_engine
from app.workers.deepspeed_engine import backward_scaled, begin_micro_batch, import_deepspeed, optimizer_step, start_engine

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)

class Lifted(torch.nn.Module):  # a log-prob, `lift` nats above that of the proximal policy
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(4, 1, bias=False)

    def forward(self, lift):
        logprobs_BT = self.line(torch.zeros(2, 3, 4, dtype=self.line.weight.dtype) + 1).float().squeeze(-1)
        return logprobs_BT + lift

def step(engine, lift):
    current_BT = engine(lift)
    proximal_BT = (current_BT - lift).detach()
    loss = clipped_policy_loss(
        current_BT, proximal_BT, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), clip=0.2, total_tokens=6
    ).loss
    assert torch.isfinite(loss)
    backward_scaled(engine, loss)
    return optimizer_step(engine, "policy, optimizer step 8")

def weights(engine):
    with import_deepspeed().zero.GatheredParameters(list(engine.module.parameters())):
        return engine.module.line.weight.detach().clone()

def attempt(precision, stage):
    optimizer, ds = OptimizerConfig(lr=0.1), DeepSpeedConfig(zero_stage=stage, extra={"zero_optimization": {"stage": stage}})
    engine = start_engine(Lifted(), optimizer, ds, precision=precision, micro_batch_size=1, accumulation=1, total_steps=9)
    start = weights(engine)
    norm = step(engine, 0.1)
    before = weights(engine)
    assert not torch.equal(start, before), "a healthy step moves the weights"
    try:
        step(engine, 99.0)
        said = ""
    except NonFiniteError as error:
        said = str(error)
    return {"stage": engine.zero_optimization_stage(), "norm": norm, "said": said, "same": torch.equal(before, weights(engine))}

def collected():  # every weight under ZeRO 3, and how many were whole at a time
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(5)))
    expected = [layer.weight.detach().clone() for layer in layers]
    ds = DeepSpeedConfig(zero_stage=3, extra={"zero_optimization": {"stage": 3}})
    engine = start_engine(layers, OptimizerConfig(), ds, precision="fp32", micro_batch_size=1, accumulation=1, total_steps=9)
    deepspeed_engine.GATHERED_BYTES = 2 * 4 * 4 * 4
    whole, found = [], []
    for name, tensor in deepspeed_engine.full_parameters(engine):
        found.append(tensor)
        whole.append(sum(parameter.numel() > 0 for parameter in engine.module.parameters()))
    return {"same": all(map(torch.equal, found, expected)), "whole": whole}

class TrunkAndHead(torch.nn.Module):  # each part's gradient is 1 in each of 4 places
    def __init__(self):
        super().__init__()
        self.trunk, self.head = torch.nn.Linear(4, 1, bias=False), torch.nn.Linear(4, 1, bias=False)

    def forward(self, *parts):
        return sum(getattr(self, part)(torch.ones(4)).sum() for part in parts)

def norms(stage, offload):  # of steps whose first micro-batch, or whole, does not reach the head
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    ds = DeepSpeedConfig(zero_stage=stage, extra={"zero_optimization": zero})
    engine = start_engine(TrunkAndHead(), OptimizerConfig(), ds, precision="fp32", micro_batch_size=1, accumulation=2, total_steps=9)
    found = []
    for head in (["head"], ["head"], [], ["head"]):
        begin_micro_batch(engine, last=False)
        backward_scaled(engine, engine("trunk"))
        optimizer_step(engine)
        begin_micro_batch(engine, last=True)
        backward_scaled(engine, engine("trunk", *head))
        found.append(optimizer_step(engine))
    return found

found = [collected(), [norms(stage, offload) for stage, offload in json.loads(sys.argv[1])]]
print(json.dumps([*found, attempt("fp32", 0), attempt("fp32", 1), attempt("fp32", 3), attempt("bf16", 1), attempt("bf16", 2)]))
"""

STAGES = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
"""ZeRO stage, and whether the optimizer is offloaded."""


@pytest.fixture(scope="module")
def said() -> list[Any]:
    """What the process has found."""
    done = subprocess.run([sys.executable, "-c", ENGINES, json.dumps(STAGES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_zero_3_gathers_weights_in_buckets_and_each_copy_outlives_its_bucket(said: list[Any]) -> None:
    assert said[0] == {"same": True, "whole": [2, 2, 2, 2, 1]}


@pytest.mark.parametrize("case", range(len(STAGES)), ids=map(str, STAGES))
def test_a_gradient_is_of_its_own_step_alone(case: int, said: list[Any]) -> None:
    """Also of a part that the first micro-batch, or none, reaches, such as a value head when texts go before the rollouts."""
    both, trunk_alone = math.sqrt(4 * 2**2 + 4 * 1**2), 4.0
    assert said[1][case] == pytest.approx([both, both, trunk_alone, both])


def test_a_loss_that_is_finite_and_its_gradient_not(said: list[Any]) -> None:
    attempts = said[2:]
    assert [attempt["stage"] for attempt in attempts] == [0, 1, 3, 1, 2]
    for attempt in attempts:
        assert math.isfinite(attempt["norm"]) and attempt["norm"] > 0
        assert attempt["said"].startswith("policy, optimizer step 8: the gradient norm is "), attempt
        assert attempt["same"], "the weights have changed"
    assert "the gradient norm is nan, before the step" in attempts[0]["said"]
    assert all("the gradient norm is inf, and DeepSpeed has skipped the step" in attempt["said"] for attempt in attempts[1:])
