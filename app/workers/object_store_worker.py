"""What vLLM imports in each process of an engine before it loads the model, so that all of them know the backend `object_store`: workers
of a tensor-parallel engine are processes of their own, which run nothing else of ours."""

from __future__ import annotations

from app.workers.object_store_transfer import register_object_store_backend

register_object_store_backend()


class ObjectStoreWorker:
    """Extends vLLM's workers, by nothing but what this module does when they import it."""
