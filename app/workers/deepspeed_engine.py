"""A DeepSpeed engine around one model: its config, optimizer, schedule, exact gradients and full weights.

DeepSpeed is imported inside the functions that need it: a driver that only builds configs never pays for it, and
what must be set before the import (accelerator, compiled ops) is set by `import_deepspeed`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from app.checkpoint import UNWRITTEN
from app.config.shared import DeepSpeedConfig, OptimizerConfig
from app.durable import writing
from app.errors import CheckpointError, ConfigError, NonFiniteError
from app.schema import merge

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

CHECKPOINT_TAG = "engine"
GATHERED_BYTES = 256 * 2**20  # parameters that a ZeRO 3 worker holds whole at a time, beside those of its share
RANDOM_FILE = "random-{rank:05d}.pt"


def deepspeed_config(
    ds: DeepSpeedConfig, optimizer: OptimizerConfig, *, precision: str, micro_batch_size: int, accumulation: int
) -> dict[str, Any]:
    """The DeepSpeed JSON of one engine. `precision` is fp32, bf16 or fp16; `ds.extra` is merged last, section by section.

    `accumulation` counts micro-batches per optimizer step on each worker. Raises ConfigError as `DeepSpeedConfig.require_precision`.
    """
    ds.require_precision(precision)
    zero: dict[str, Any] = {"stage": ds.zero_stage}
    if ds.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if ds.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return merge(config, ds.extra)


def lr_factor(optimizer: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Optimizer step (from 0) -> factor on the peak learning rate.

    Warm-up rises linearly from 0 and reaches 1 on step `warmup_steps - 1`; linear and cosine fall from there to 0 just after the last step.
    """
    warmup = optimizer.warmup_steps
    decay_steps = max(1, total_steps - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / decay_steps)
        if optimizer.schedule == "linear":
            return 1.0 - progress
        if optimizer.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed for the accelerator of this process, with nothing to compile and without its chatter."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # On CPUs DeepSpeed compiles this communication op at start-up (35 s, needs g++); gloo does the same work without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)(\..*)?")
    return deepspeed


def start_engine(
    model: torch.nn.Module,
    optimizer: OptimizerConfig,
    ds: DeepSpeedConfig,
    *,
    precision: str,
    micro_batch_size: int,
    accumulation: int,
    total_steps: int,
) -> DeepSpeedEngine:
    """Wrap `model` in an engine with AdamW and its schedule; the process group must exist already.

    Raises ConfigError when the accelerator of this process has no such precision.
    """
    deepspeed = import_deepspeed()
    workers = torch.distributed.get_world_size()
    ds = ds.in_effect(precision, workers)
    accelerator = deepspeed.get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f'model.precision = "fp16" is not supported by DeepSpeed\'s accelerator "{accelerator.device_name()}": take "bf16" or "fp32"'
        )
    if ds.gradient_checkpointing:
        _checkpoint_activations(model)
    adamw = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=accelerator.device_name() == "cpu",  # a tenth of the time: no temporaries of the model's size
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(adamw, lr_factor(optimizer, total_steps)),
        config=deepspeed_config(ds, optimizer, precision=precision, micro_batch_size=micro_batch_size, accumulation=accumulation),
    )
    if workers == 1 and engine.zero_optimization_stage() == 0:
        engine.enable_backward_allreduce = False  # it would copy every gradient into a buffer and back
    engine.train()  # models are loaded in evaluation mode, in which nothing drops out and no activation is recomputed
    return engine


def begin_micro_batch(engine: DeepSpeedEngine, *, last: bool) -> None:
    """Before the forward pass of a micro-batch: say whether it is the last one of its optimizer step.

    Without this DeepSpeed counts to `accumulation`; with it a step may have any number of micro-batches.
    """
    engine.set_gradient_accumulation_boundary(last)


def backward_scaled(engine: DeepSpeedEngine, loss: torch.Tensor) -> None:
    """Backward of a micro-batch's loss (scalar) that is already divided by the global totals of its optimizer step.

    DeepSpeed means to average: it divides by the micro-batches of a step and by the number of workers. Here the sum over
    micro-batches and workers *is* the gradient, so the first division is turned off and the second undone.
    """
    engine.backward(loss * engine.dp_world_size, scale_wrt_gas=False)


def optimizer_step(engine: DeepSpeedEngine, what: str = "model") -> float | None:
    """Clip, step and clear the gradients; returns their global 2-norm before clipping.

    Call it once after every `backward_scaled`; where more micro-batches of the step are to come it only counts, and returns None.

    what: model and step, for messages. Raises NonFiniteError, on every rank, where the norm is not finite: without ZeRO before the
    step; with it after DeepSpeed has skipped the step. In fp16 a skipped step only lowers the loss scale, and infinity is returned.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm = None
    if engine.zero_optimization_stage() == 0:  # the optimizer is torch's own, and DeepSpeed keeps no norm
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # no loss of this step reached it: Adam counts the step all the same, as it does under ZeRO
                parameter.grad = torch.zeros_like(parameter)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        _require_finite(norm, what, "before the step")
    engine.step()
    if norm is not None:
        return norm
    _forget_gradients(engine)
    norm = float(engine.get_global_grad_norm())
    if engine.was_step_applied():
        _require_finite(norm, what, "and the weights have taken it: go on from the last checkpoint")
    elif not engine.fp16_enabled():
        _require_finite(norm, what, "and DeepSpeed has skipped the step")
    return norm


def _forget_gradients(engine: DeepSpeedEngine) -> None:
    """Of the step that is done. ZeRO 3, and ZeRO 2 with offload, overwrite them with those of the next step's first micro-batch and add
    the others' to them: what the first does not reach, such as a value head by texts, would go on with its old ones."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.grad_partitions_flat_buffer.zero_()
    elif stage == 2:
        for gradient in getattr(engine.optimizer, "accumulated_grads_in_cpu", {}).values():
            gradient.zero_()


def _require_finite(norm: float, what: str, state: str) -> None:
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"{what}: the gradient norm is {norm}, {state}: lower the learning rate, raise model.precision, or look for broken rows"
        )


def full_parameters(
    engine: DeepSpeedEngine, wanted: Callable[[str, torch.nn.Parameter], bool] = lambda name, parameter: True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every wanted parameter once (tied ones under their first name) with its full, detached tensor, under any ZeRO stage.

    Under ZeRO 3 they are gathered in buckets of GATHERED_BYTES, copied one by one, and every worker has to iterate to the end. Under
    other stages they are the engine's own, which the next optimizer step changes.
    """
    parameters = [(name, parameter) for name, parameter in engine.module.named_parameters() if wanted(name, parameter)]
    if engine.zero_optimization_stage() != 3:
        yield from ((name, parameter.detach()) for name, parameter in parameters)
        return
    deepspeed = import_deepspeed()
    for bucket in _buckets(parameters, GATHERED_BYTES):
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
            yield from ((name, parameter.detach().clone()) for name, parameter in bucket)


def _buckets(parameters: Iterable[tuple[str, torch.nn.Parameter]], limit: int) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    """In order, as many at a time as have at most `limit` bytes together when they are gathered; a larger one alone."""
    bucket: list[tuple[str, torch.nn.Parameter]] = []
    room = limit
    for name, parameter in parameters:
        size = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if bucket and size > room:
            yield bucket
            bucket, room = [], limit
        bucket.append((name, parameter))
        room -= size
    if bucket:
        yield bucket


@contextmanager
def full_weights(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within this block `engine.module` holds its full weights on every worker, under any ZeRO stage. Collective; only for reading."""
    if engine.zero_optimization_stage() != 3:
        yield
        return
    with import_deepspeed().zero.GatheredParameters(list(engine.module.parameters())):
        yield


def save_engine(engine: DeepSpeedEngine, folder: Path, state: Mapping[str, Any]) -> None:
    """Write weights, optimizer, schedule, rank 0's `state` and the random state of every worker under `folder`, which all of them share.

    Collective; every worker writes its own shards. Raises DiskError.
    """
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    with writing(f"{folder}: the checkpoint", UNWRITTEN):
        engine.save_checkpoint(str(folder), tag=CHECKPOINT_TAG, client_state=dict(state))
        torch.save(random, folder / RANDOM_FILE.format(rank=engine.global_rank))


def load_engine(engine: DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    """Restore what `save_engine` wrote and return its `state`. Collective.

    Raises CheckpointError if a part is missing, or if another number of workers wrote it, which may shard it otherwise.
    """
    path, state = None, None
    if len(list(folder.glob("random-*.pt"))) == engine.dp_world_size:
        path, state = engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
    if path is None or state is None:
        raise CheckpointError(f"{folder}: no complete DeepSpeed checkpoint for {engine.dp_world_size} workers; delete it to start over")
    random = torch.load(folder / RANDOM_FILE.format(rank=engine.global_rank), weights_only=True)
    torch.set_rng_state(random["cpu"])
    if random["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return dict(state)


def apply_settings(engine: DeepSpeedEngine, optimizer: OptimizerConfig) -> None:
    """Give the engine its own AdamW settings again: `load_engine` brought those of whoever wrote the checkpoint, which a population
    changes from copy to copy. The schedule goes on where the checkpoint left it. Without a change nothing changes, bit for bit."""
    schedule = engine.lr_scheduler
    schedule.base_lrs = [optimizer.lr] * len(schedule.base_lrs)
    for group, factor in zip(engine.optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group |= {"initial_lr": optimizer.lr, "lr": optimizer.lr * factor(schedule.last_epoch)}
        group |= {"betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight in what `save_engine` wrote under `folder`, float32, under any ZeRO stage and without the workers that wrote it.

    Raises CheckpointError if a part is missing.
    """
    shards = folder / CHECKPOINT_TAG
    if not shards.is_dir():
        raise CheckpointError(f"{folder}: holds no DeepSpeed checkpoint; name a complete one")
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        if not list(shards.glob("*_optim_states.pt")):  # ZeRO 0 keeps its weights whole
            (file,) = shards.glob("*_model_states.pt")
            module = torch.load(file, map_location="cpu", weights_only=False)["module"]
            return {name: tensor.float() for name, tensor in module.items()}
        with contextlib.redirect_stdout(io.StringIO()):
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=CHECKPOINT_TAG))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); name a complete checkpoint") from error


def _checkpoint_activations(model: torch.nn.Module) -> None:
    trunk = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if trunk is None or not trunk.supports_gradient_checkpointing:
        raise ConfigError(f"{type(model).__name__} cannot recompute activations: set deepspeed.gradient_checkpointing = false")
    trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
