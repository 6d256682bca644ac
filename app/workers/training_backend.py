"""Ray Train's process group, by the nodes' addresses. A module of its own because Ray Train's controller loads it too."""

from __future__ import annotations

from typing import Any

from ray.train.torch.config import TorchConfig, _TorchBackend

from app.workers.network import use_node_address


class NodesBackend(_TorchBackend):
    """The group is made before our own function runs on the workers."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_address)
        super().on_start(worker_group, backend_config)


class NodesConfig(TorchConfig):
    """`TorchConfig` whose workers meet by their nodes' addresses."""

    @property
    def backend_cls(self) -> type[NodesBackend]:
        return NodesBackend
