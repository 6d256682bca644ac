"""What users of Triton's public client do, run by that client's own Python: `python triton_calls.py FOLDER HTTP GRPC`.

FOLDER/questions.npz holds ids and mask, both INT32 [8, T]. Every answer goes into FOLDER/answers.npz under `client/call`. The
addresses are written as Open-Assistant writes them: `host:port/model` per model.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REWARD, REFERENCE = "reward", "reference"
METHODS = ("is_server_live", "is_server_ready", "get_server_metadata")
MODEL_METHODS = ("is_model_ready", "get_model_metadata", "get_model_config")


def addresses(host_and_port: str) -> dict[str, str]:
    """What stands in Open-Assistant's configuration."""
    return {model: f"{host_and_port}/{model}" for model in (REWARD, REFERENCE)}


async def done(value: Any) -> Any:
    """The value, of a client that answers at once or of one that is awaited."""
    return await value if inspect.isawaitable(value) else value


class Calls:
    """All calls of one client library (`tritonclient.http`, `.grpc` or their `aio`) to one address per model."""

    def __init__(self, library: Any, address: str, ids: np.ndarray, mask: np.ndarray) -> None:
        self.library, self.addresses = library, addresses(address)
        self.ids, self.mask = ids, mask
        self.http = "http" in library.__name__

    async def run(self) -> dict[str, Any]:
        """Answers by call."""
        answers: dict[str, Any] = {}
        for model, address in self.addresses.items():
            url, name = address.split("/")
            client = self.library.InferenceServerClient(url=url, verbose=False)
            try:
                for method in METHODS:
                    assert await done(getattr(client, method)()), method
                for method in MODEL_METHODS:
                    assert await done(getattr(client, method)(name)), method
                    assert await done(getattr(client, method)(name, "1")), method
                assert not await done(client.is_model_ready("nobody")) if self.http else await self.refused(client.is_model_ready, "nobody")
                index = await done(client.get_model_repository_index())
                assert len(index if self.http else index.models) == 2
                for call, answer in (await self.infer(client, name)).items():
                    answers[f"{model}/{call}"] = answer
            finally:
                await done(client.close())
        return answers

    async def infer(self, client: Any, name: str) -> dict[str, Any]:
        """Every way to ask a model."""
        outputs = ("rewards",) if name == REWARD else ("logprobs", "logits")
        answers: dict[str, Any] = {}
        for output in outputs:
            answers[output] = await self.ask(client, name, self.tensors(np.int32), output)
        answers["int64"] = await self.ask(client, name, self.tensors(np.int64), outputs[0])
        answers["unasked"] = await self.ask(client, name, self.tensors(np.int32), outputs[0], named=False)
        answers["version"] = await self.ask(client, name, self.tensors(np.int32), outputs[0], model_version="1", request_id="q")
        answers["text"] = await self.ask(client, name, [self.tensor("text", np.array([[b"hello"], [b"hi"]], object))], outputs[0])
        if self.http:
            for output in outputs:
                answers[f"json_{output}"] = await self.ask(client, name, self.tensors(np.int32, binary=False), output, binary=False)
            answers["gzip"] = await self.ask(client, name, self.tensors(np.int32), outputs[0], request_compression_algorithm="gzip")
            answers["deflate"] = await self.ask(
                client, name, self.tensors(np.int32, binary=False), outputs[0], request_compression_algorithm="deflate"
            )
        else:
            answers["gzip"] = await self.ask(client, name, self.tensors(np.int32), outputs[0], compression_algorithm="gzip")
        wrong = [self.tensor("input_ids", np.array([[-1]], np.int32))]
        assert "non-negative" in await self.refused(client.infer, name, wrong)
        return answers

    def tensors(self, dtype: type, binary: bool = True) -> list[Any]:
        return [self.tensor(name, array.astype(dtype), binary) for name, array in (("input_ids", self.ids), ("attention_mask", self.mask))]

    def tensor(self, name: str, array: np.ndarray, binary: bool = True) -> Any:
        from tritonclient.utils import np_to_triton_dtype

        tensor = self.library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, *([binary] if self.http else []))
        return tensor

    async def ask(self, client: Any, name: str, inputs: Any, output: str, named: bool = True, binary: bool = True, **options: Any) -> Any:
        wanted = self.library.InferRequestedOutput(output, *([binary] if self.http else []))
        result = await done(client.infer(name, inputs, outputs=[wanted] if named else None, **options))
        response = result.get_response()
        if self.http:
            assert (response["model_name"], response["model_version"]) == (name, "1")
            assert len(response["parameters"]["weights_hash"]) >= 16
            assert response.get("id", "") == options.get("request_id", "")
        else:
            assert (response.model_name, response.model_version) == (name, "1")
            assert len(response.parameters["weights_hash"].string_param) >= 16
            assert response.id == options.get("request_id", "")
        return result.as_numpy(output)

    async def refused(self, method: Callable[..., Any], *arguments: Any) -> str:
        """The reason of a call that must fail."""
        from tritonclient.utils import InferenceServerException

        try:
            await done(method(*arguments))
        except InferenceServerException as error:
            return error.message()
        raise AssertionError(f"{method.__name__} was not refused")


def check_descriptors(file: Path) -> None:
    """Every message, field and method of ours is Triton's, by name, number, type and label."""
    from google.protobuf.descriptor_pb2 import FileDescriptorProto
    from tritonclient.grpc import model_config_pb2, service_pb2

    ours = FileDescriptorProto.FromString(file.read_bytes())
    theirs: dict[str, Any] = {}
    for module in (service_pb2, model_config_pb2):
        described = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(described)
        theirs.update({message.name: message for message in described.message_type})
        theirs.update({enum.name: {value.name: value.number for value in enum.value} for enum in described.enum_type})
        theirs.update({f"{service.name}.{method.name}": method for service in described.service for method in service.method})

    def check(one: Any, other: Any) -> None:
        numbered = {field.number: field for field in other.field}
        for field in one.field:
            twin = numbered[field.number]
            same = ("name", "type", "label", "type_name")
            assert [getattr(field, key) for key in same] == [getattr(twin, key) for key in same], f"{one.name}.{field.name}"
        nested = {message.name: message for message in other.nested_type}
        for message in one.nested_type:
            check(message, nested[message.name])

    for message in ours.message_type:
        check(message, theirs[message.name])
    for enum in ours.enum_type:
        assert {value.name: value.number for value in enum.value} == theirs[enum.name]
    for service in ours.service:
        for method in service.method:
            twin = theirs[f"{service.name}.{method.name}"]
            assert (method.input_type, method.output_type) == (twin.input_type, twin.output_type)


def main(folder: Path, http: str, grpc: str) -> None:
    """Ask everything of both doors with all four clients."""
    import tritonclient.grpc
    import tritonclient.grpc.aio
    import tritonclient.http
    import tritonclient.http.aio

    check_descriptors(folder / "descriptor.bin")
    questions = np.load(folder / "questions.npz")
    answers = {}
    for library, address in (
        (tritonclient.http, http),
        (tritonclient.http.aio, http),
        (tritonclient.grpc, grpc),
        (tritonclient.grpc.aio, grpc),
    ):
        calls = Calls(library, address, questions["ids"], questions["mask"])
        found: dict[str, Any] = asyncio.run(calls.run())
        answers.update({f"{library.__name__}/{call}": answer for call, answer in found.items()})
    np.savez(folder / "answers.npz", **answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
