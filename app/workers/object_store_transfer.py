"""The weight-transfer backend `object_store` of vLLM: an engine loads arrays that Ray has already carried into its process.

It works everywhere, with checksums: see `app.workers.pushed_policy`, which also says what travels. `app.workers.gpu_transfer` is the other
way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BACKEND = "object_store"


def register_object_store_backend() -> None:
    """Teach vLLM's factory the backend `object_store`; calling it again is harmless."""
    import torch
    from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND in WeightTransferEngineFactory._registry:
        return

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        tensors: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    class ObjectStoreEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
        """Receiving side: loads arrays that are already in this process, in checkpoint format."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """Nothing to set up: Ray carries the arrays."""

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: UpdateInfo | dict[str, Any]) -> None:
            # Overrides the base class, which would end with an accelerator synchronisation that CPUs do not have.
            info = self.parse_update_info(update_info) if isinstance(update_info, dict) else update_info
            self.receive_weights(info)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            self.model.load_weights(
                (name, torch.from_numpy(np.array(array)).to(self.device)) for name, array in update_info.tensors.items()
            )

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                repack_output_heads(self.model)

        def shutdown(self) -> None:
            """Nothing is held open."""

    WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreEngine)


def repack_output_heads(model: Any) -> None:
    """Rebuild the packed copy of each output head.

    On CPUs linear layers compute with a packed copy of their weight. The layerwise reload rebuilds those copies, but not
    the one of a head tied to the embeddings: sampling would go on with the old head, silently.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
