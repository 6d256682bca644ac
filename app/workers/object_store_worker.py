"""What vLLM imports in each process of an engine before it loads the model, so that all of them know the backend `object_store`: workers
of a tensor-parallel engine are processes of their own, which run nothing else of ours. Its class extends vLLM's workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.workers.object_store_transfer import register_object_store_backend

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker
else:
    Worker = object

register_object_store_backend()


class ObjectStoreWorker(Worker):
    """What vLLM's workers can do beside what they can by themselves."""

    def abandon_weight_update(self) -> None:
        """End an update that broke off, so that the next one finds no layer that waits for the rest of the last one's weights. What the
        model is until then is nobody's policy."""
        self._weight_update_active = True  # vLLM says no where a part of it could not be taken, and leaves the layers as they are
        self.finish_weight_update()
