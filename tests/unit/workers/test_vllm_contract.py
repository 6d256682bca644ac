"""What is asked of vLLM on GPUs, against vLLM's own classes: an upgrade that changes them fails here, without a GPU."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from app.config.rollout import RolloutConfig
from app.config.shared import WorkersConfig
from app.workers.rollout_engine import load_engine

ENGINE_PROCESS = """
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.utils.import_utils import resolve_obj_by_qualname

resolve_obj_by_qualname("EXTENSION")  # what a worker's process does, and nothing else of ours
print(WeightTransferEngineFactory._registry["object_store"]().__name__)
"""


def told(config: RolloutConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `vllm.LLM` is given for an engine."""
    monkeypatch.setattr("vllm.LLM", lambda **given: given)
    given: dict[str, Any] = load_engine("policy", config, precision="bf16", max_model_len=512, seed=3)
    return given


def test_every_process_of_an_engine_knows_the_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a tensor-parallel engine are spawned, and so begin with nothing."""
    config = RolloutConfig(engines=WorkersConfig(gpus=2), transfer="object_store")
    given = told(config, monkeypatch)
    assert given["weight_transfer_config"].backend == "object_store"
    command = [sys.executable, "-c", ENGINE_PROCESS.replace("EXTENSION", str(given.get("worker_extension_cls")))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["ObjectStoreEngine"], done.stderr[-500:]


ON_GPUS = [
    {"engines": {"gpus": 1}},
    {"engines": {"gpus": 2}, "transfer": "object_store"},
    {"engines": {"gpus": 1}, "colocate": True, "transfer": "ipc"},
]


@pytest.mark.parametrize("config", ON_GPUS)
def test_vllm_has_every_setting_of_an_engine(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import EngineArgs

    given = told(RolloutConfig.model_validate(config), monkeypatch)
    assert given.keys() <= {field.name for field in dataclasses.fields(EngineArgs)}


@pytest.mark.parametrize("config", ON_GPUS)
def test_a_step_ends_with_its_tokens(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs vLLM would begin the next step before it hands out the last one: weights that come in between two calls would come into the
    middle of a pass, whose tokens get the version that is current when they are handed out."""
    assert told(RolloutConfig.model_validate(config), monkeypatch)["async_scheduling"] is False
