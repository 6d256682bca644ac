"""From a protocol's request to a model's replicas and back, whichever door it came through."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayError

from app.config.serving import OUTPUTS, Output, ServingConfig
from app.errors import BadRequestError, ModelNotFoundError, NotReadyError, ScoringTimeoutError, TooLongError
from app.workers.scoring_messages import ModelDescription, ScoringAnswer, ScoringRequest
from serve.failures import as_scoring_error
from serve.protocol.messages import InferRequest, InferResponse
from serve.protocol.sequences import IDS, MASK, TEXT, Sequences, from_rows, from_tensors, texts
from serve.protocol.tensors import Tensor
from serve.texts import Conversation, Texts

PROBE_SECONDS = 5.0
"""How long a replica may take to say what it is."""

PAUSE_SECONDS = 0.1
"""Before a request is sent again after its replica died."""

ATTEMPTS = 3
"""At an answer from the version that the request was read for."""


class Handle(Protocol):
    """The part of a Serve deployment handle that is called here: `infer` and `describe` of a replica."""

    infer: Any
    describe: Any


class Gateway:
    """All models of the service by name.

    Every method raises ScoringError and its kinds. A request whose replica dies is sent to another one until its deadline:
    scoring twice changes nothing.
    """

    def __init__(self, handles: Mapping[str, Handle], config: ServingConfig, trust_remote_code: bool = False) -> None:
        self._handles = handles
        self._config = config
        self._texts = Texts(trust_remote_code)
        self._described: dict[str, ModelDescription] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self._handles)

    @property
    def max_sequences(self) -> int:
        return self._config.max_request_sequences

    async def ready(self, model: str, version: str = "") -> bool:
        """Whether a replica answers. Raises ModelNotFoundError."""
        try:
            await self.describe(model, version)
        except (NotReadyError, ScoringTimeoutError):
            return False
        return True

    async def describe(self, model: str, version: str = "") -> ModelDescription:
        """What the model is now."""
        description: ModelDescription = await self._call(model, "describe", _Patience(PROBE_SECONDS))
        self._described[model] = description
        _check_version(description, version)
        return description

    async def infer(self, request: InferRequest, request_id: str = "") -> InferResponse:
        """The answer to tensors."""
        return await self._answer(request, lambda description: self._from_tensors(request.inputs, description.path), request_id)

    async def score_ids(self, model: str, rows: list[list[int]], request_id: str = "") -> InferResponse:
        """The model's usual output for sequences of token ids."""
        self._check_count(len(rows))

        async def read(description: ModelDescription) -> Sequences:
            return from_rows(rows)

        return await self._answer(InferRequest(model, "", "", {}), read, request_id)

    async def score_conversations(self, model: str, conversations: Sequence[Conversation], request_id: str = "") -> InferResponse:
        """The model's usual output for conversations, rendered by its own chat template."""
        self._check_count(len(conversations))

        async def read(description: ModelDescription) -> Sequences:
            return from_rows(await self._texts.conversations(description.path, conversations))

        return await self._answer(InferRequest(model, "", "", {}), read, request_id)

    async def _answer(
        self, request: InferRequest, read: Callable[[ModelDescription], Awaitable[Sequences]], request_id: str
    ) -> InferResponse:
        """The answer, wholly of one version of the model: weights may be swapped at any moment, and what was read for the old ones
        (tokens, kind, vocabulary) is then read again. `read` gives the sequences for a model as described."""
        for _ in range(ATTEMPTS):
            description = await self._description(request.model, request.version)
            outputs = _outputs(request, description)
            sequences = await read(description)
            self._check_logits(outputs, sequences, description)
            timeout = min(request.timeout_seconds or description.timeout_seconds, description.timeout_seconds)
            answers = await self._ask(request.model, sequences, outputs, timeout, alone=request.alone, request_id=request_id)
            if {answer.model for answer in answers} == {description.identity}:
                return _response(request, sequences, outputs, answers)
            self._described.pop(request.model, None)
        raise NotReadyError(f"model {request.model} is being replaced; ask again")

    async def _description(self, model: str, version: str) -> ModelDescription:
        """The latest known description; asked for anew where it is missing or of another version than the caller wants."""
        known = self._described.get(model)
        if known is None or version not in ("", known.identity.version):
            return await self.describe(model, version)
        return known

    async def _from_tensors(self, inputs: Mapping[str, Tensor], path: str) -> Sequences:
        if inputs.keys() == {TEXT}:
            return from_rows(await self._texts.ids(path, texts(inputs, self.max_sequences)))
        if IDS in inputs and inputs.keys() <= {IDS, MASK}:
            return from_tensors(inputs, self.max_sequences)
        raise BadRequestError(f"inputs are {IDS} with or without {MASK}, or {TEXT} alone, not {', '.join(sorted(inputs))[:200]}")

    def _check_count(self, count: int) -> None:
        if count > self.max_sequences:
            raise BadRequestError(f"{count} sequences, a request has at most {self.max_sequences}")

    def _check_logits(self, outputs: Sequence[Output], sequences: Sequences, description: ModelDescription) -> None:
        size = 2 * sequences.mask_BT.size * description.vocabulary
        if "logits" in outputs and size > self._config.max_logits_bytes:
            raise TooLongError(
                f"logits of {sequences.mask_BT.shape[0]} x {sequences.mask_BT.shape[1]} tokens take {size} bytes, the service sends "
                f"{self._config.max_logits_bytes} (serving.max_logits_bytes): send fewer sequences, or ask for logprobs"
            )

    async def _ask(
        self, model: str, sequences: Sequences, outputs: Sequence[Output], timeout: float, *, alone: bool, request_id: str
    ) -> list[ScoringAnswer]:
        patience = _Patience(timeout)
        requests = [ScoringRequest(sequences.ids_N, sequences.lengths_B, each, alone=alone, request_id=request_id) for each in outputs]
        return [await self._call(model, "infer", patience, request) for request in requests]

    async def _call(self, model: str, method: str, patience: _Patience, *arguments: Any) -> Any:
        """A method of one of the model's replicas. Raises ModelNotFoundError, ScoringTimeoutError when the patience is at its end, and
        what the replica raised."""
        if model not in self._handles:
            raise ModelNotFoundError(f"no model {model[:80]!r}; this service has {', '.join(self.names)}")
        while True:
            try:
                return await self._attempt(model, method, patience.left(), *arguments)
            except RayActorError as error:
                if patience.left() < PAUSE_SECONDS:
                    raise as_scoring_error(error, model) from error
                await asyncio.sleep(PAUSE_SECONDS)
            except TimeoutError as error:
                if isinstance(error, RayError):  # the replica's own
                    raise as_scoring_error(error, model) from error
                reason = f"model {model}: no answer within {patience.seconds:.3g} s; ask again, or for less at a time"
                raise ScoringTimeoutError(reason) from None
            except Exception as error:
                raise as_scoring_error(error, model) from error

    async def _attempt(self, model: str, method: str, timeout: float, *arguments: Any) -> Any:
        response = getattr(self._handles[model], method).remote(*arguments)
        try:
            return await asyncio.wait_for(response, timeout)
        except (TimeoutError, asyncio.CancelledError):
            response.cancel()  # nobody waits for it any more
            raise


class _Patience:
    """The seconds that a caller waits, all calls for its answer together."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = asyncio.get_running_loop().time() + seconds

    def left(self) -> float:
        return self._end - asyncio.get_running_loop().time()


def _check_version(description: ModelDescription, version: str) -> None:
    identity = description.identity
    if version not in ("", identity.version):
        raise ModelNotFoundError(f"model {identity.name} has version {identity.version}, not {version[:80]!r}")


def _outputs(request: InferRequest, description: ModelDescription) -> list[Output]:
    """What is asked for, once each."""
    offered = OUTPUTS[description.kind]
    asked = dict.fromkeys(output.name for output in request.outputs)
    for name in asked:
        if name not in offered:
            raise BadRequestError(f"model {request.model} has no output {name[:80]!r}; it has {', '.join(offered)}")
    return [output for output in offered if output in asked] or [offered[0]]


def _response(request: InferRequest, sequences: Sequences, outputs: Sequence[Output], answers: Sequence[ScoringAnswer]) -> InferResponse:
    asked = {output.name: output.binary for output in request.outputs} or dict.fromkeys(outputs, request.binary_output)
    return InferResponse(
        identity=answers[0].model,
        id=request.id,
        outputs=tuple(sequences.spread(output, answer.values) for output, answer in zip(outputs, answers, strict=True)),
        lengths=tuple(sequences.lengths_B.tolist()),
        binary=frozenset(name for name, binary in asked.items() if binary),
    )
