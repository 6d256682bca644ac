"""A policy on its way from the learner to the rollout engines, through Ray's object store.

What never changes, frozen layers or the weights below adapters, is put there once; a push carries what is trained. Engines read
both and add adapters to what they stand beside, so an engine that starts later needs nothing else. Every bucket has a checksum,
which whoever reads it compares.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from app.errors import WeightPushError
from app.models.adapters import is_adapter, merged_weights

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

BUCKET_BYTES = 64 * 2**20  # weights travel in pieces of about this size
LANGUAGE_MODEL = "language_model."
"""What the names of the policy's weights begin with in the learner (see `app.models.policy`)."""

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]  # parameter name -> array


@dataclass(frozen=True)
class Shipment:
    """Weights in the object store, in buckets. whole: bytes of them that a model without adapters has as well; checksums: of the
    buckets, as they were when they were put there."""

    buckets: tuple[ray.ObjectRef[Weights], ...] = ()
    bytes: int = 0
    whole: int = 0
    checksums: tuple[int, ...] = ()


@dataclass(frozen=True)
class PushedPolicy:
    """One version of the policy. frozen: what all versions share; scale: of its adapters, None without any; first: whether `frozen`
    has been put into the object store for this version."""

    trained: Shipment
    frozen: Shipment
    scale: float | None
    first: bool

    @property
    def bytes(self) -> int:
        """What this version has brought into the object store."""
        return self.trained.bytes + (self.frozen.bytes if self.first else 0)

    @property
    def share(self) -> float:
        """`bytes` as a share of what the whole policy would take."""
        return self.bytes / (self.trained.whole + self.frozen.whole)

    def weights(self, version: int) -> Iterator[Weights]:
        """The whole policy under the names of a model without adapters, float32, bucket after bucket. version: for messages.

        Where the store has lost one, with the learner that put it there, or one is not what was put there (WeightPushError), the call
        itself raises, before there is any bucket."""
        buckets: list[Weights] = ray.get([bucket for shipment in (self.trained, self.frozen) for bucket in shipment.buckets])
        require_intact(buckets, [*self.trained.checksums, *self.frozen.checksums], version)
        return iter(buckets) if self.scale is None else self._merged(buckets, self.scale)

    def _merged(self, buckets: Iterable[Weights], scale: float) -> Iterator[Weights]:
        # what the store hands out is read-only, which torch does not know
        tensors = ((name, torch.from_numpy(np.array(array))) for bucket in buckets for name, array in bucket.items())
        yield from in_buckets((name, tensor.numpy()) for name, tensor in merged_weights(tensors, scale))


class PolicyOutbox:
    """The sending side, in every rank of the learner; rank 0 puts."""

    def __init__(self, engine: DeepSpeedEngine, *, scale: float | None, sends: bool) -> None:
        """scale: of the policy's adapters, None without any."""
        self._engine, self._scale, self._sends = engine, scale, sends
        self._frozen: Shipment | None = None

    def push(self) -> PushedPolicy:
        """The policy as it is now. Collective."""
        trained = self._ship(trained=True)
        first = self._frozen is None
        if self._frozen is None:
            self._frozen = self._ship(trained=False)
        return PushedPolicy(trained, self._frozen, self._scale, first)

    def merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole policy, adapters merged; each tensor is valid until the next step. Collective under ZeRO 3."""
        weights = self._parameters()
        return weights if self._scale is None else merged_weights(weights, self._scale)

    def _parameters(self, trained: bool | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        from app.workers.deepspeed_engine import full_parameters

        def wanted(name: str, parameter: torch.nn.Parameter) -> bool:
            return name.startswith(LANGUAGE_MODEL) and trained in (None, parameter.requires_grad)

        for name, tensor in full_parameters(self._engine, wanted):
            yield name.removeprefix(LANGUAGE_MODEL), tensor

    def _ship(self, *, trained: bool) -> Shipment:
        weights = self._parameters(trained)
        if not self._sends:
            for _ in weights:  # takes part in gathering
                pass
            return Shipment()
        buckets: list[ray.ObjectRef[Weights]] = []
        checksums: list[int] = []
        sizes: dict[str, int] = {}
        for bucket in in_buckets((name, tensor.float().cpu().numpy()) for name, tensor in weights):
            sizes |= {name: array.nbytes for name, array in bucket.items()}
            checksums.append(checksum(bucket))
            buckets.append(ray.put(bucket))
        whole = sum(size for name, size in sizes.items() if not is_adapter(name))
        return Shipment(tuple(buckets), sum(sizes.values()), whole, tuple(checksums))


def checksum(bucket: Weights) -> int:
    """CRC-32 over names, types, shapes and bytes: some 2 GB a second."""
    value = 0
    for name, array in bucket.items():
        value = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def require_intact(buckets: Sequence[Weights], checksums: Sequence[int], version: int) -> None:
    """Raises WeightPushError where a bucket does not have its checksum."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # the sum releases the interpreter lock
        found = list(pool.map(checksum, buckets))
    for number, (bucket, value, expected) in enumerate(zip(buckets, found, checksums, strict=True), start=1):
        if value != expected:
            raise WeightPushError(
                f"policy version {version}: bucket {number} of {len(buckets)} ({next(iter(bucket), 'no weights')}, ...) is not what the "
                f"learner has sent (checksum {value:08x} instead of {expected:08x}): run the same command again, and without the nodes "
                "of this learner and this engine where it comes back: memory or network of one of them is faulty"
            )


def in_buckets(arrays: Iterable[tuple[str, Array]]) -> Iterator[dict[str, Array]]:
    """Named arrays in pieces of about `BUCKET_BYTES`."""
    bucket: dict[str, Array] = {}
    size = 0
    for name, array in arrays:
        bucket[name] = array
        size += array.nbytes
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = {}, 0
    if bucket:
        yield bucket
