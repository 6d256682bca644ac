"""What is asked of vLLM on GPUs, against vLLM's own classes: an upgrade that changes them fails here, without a GPU."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
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


@pytest.mark.parametrize("gpus", [0, 2])
def test_every_process_of_an_engine_knows_the_object_store(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a tensor-parallel engine are spawned, and so begin with nothing."""
    config = RolloutConfig(engines=WorkersConfig(gpus=gpus), transfer="object_store")
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


@pytest.mark.parametrize("refused", [False, True])
def test_an_update_that_broke_off_can_be_begun_again(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """refused: vLLM's worker could not take a part of it, and counts it as ended, with its layers half loaded."""
    from vllm.v1.worker import gpu_worker

    from app.workers.object_store_worker import ObjectStoreWorker

    class Worker(gpu_worker.Worker, ObjectStoreWorker):  # as vLLM extends it
        def __init__(self) -> None:
            self.said = list[str]()
            self.weight_transfer_engine: Any = None
            self.vllm_config: Any = None
            self.model_runner: Any = SimpleNamespace(reset_lora_state=lambda: None)
            self._weight_update_active = self._weight_update_is_draft = False

    steps = ("start_weight_update", "update_weights", "finish_weight_update")

    def engine(worker: Worker) -> Any:
        def update(info: Any) -> None:
            if refused:
                raise OSError("the learner's memory is gone")

        said = {step: lambda step=step: worker.said.append(step) for step in steps} | {"update_weights": update}
        return SimpleNamespace(**said, reset_weight_update_target=lambda: None)

    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
    worker = Worker()
    worker.weight_transfer_engine = engine(worker)
    worker.start_weight_update()
    with pytest.raises(OSError, match="gone") if refused else nullcontext():
        worker.update_weights({})
    worker.abandon_weight_update()
    worker.start_weight_update()
    worker.finish_weight_update()
    assert worker.said == ["start_weight_update", "finish_weight_update"] * 2
