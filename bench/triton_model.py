"""Log-probs of a language model in Triton's Python backend: rows of a batch padded to the longest, plain Transformers.

Triton loads this file by itself, beside config.pbtxt (see bench/triton_server.py); nothing of this repository is there.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)  # Triton's interpreter does not look at it

import torch  # noqa: E402
import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # noqa: E402
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


class TritonPythonModel:
    """Named as Triton wants it."""

    def initialize(self, arguments: dict[str, str]) -> None:
        parameters = json.loads(arguments["model_config"])["parameters"]
        torch.set_num_threads(int(parameters["threads"]["string_value"]))
        self.model = AutoModelForCausalLM.from_pretrained(parameters["path"]["string_value"], dtype=torch.float32).eval()

    @torch.inference_mode()
    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer [b, T - 1] for each request [b, T] of a batch that the dynamic batcher has put together."""
        # Tensors travel by DLPack: the arrays of this backend, built for NumPy 1, are empty with NumPy 2.
        blocks = [from_dlpack(triton.get_input_tensor_by_name(request, "input_ids").to_dlpack()).long() for request in requests]
        rows = [row for block in blocks for row in block]
        ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        attention_BS = torch.arange(ids_BS.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        logits_BRV = self.model(input_ids=ids_BS, attention_mask=attention_BS.long(), use_cache=False).logits[:, :-1]
        picked_BR = logits_BRV.gather(-1, ids_BS[:, 1:, None])[..., 0]
        logprobs_BR = picked_BR - logits_BRV.logsumexp(-1)
        answers, first = [], 0
        for block in blocks:
            values = logprobs_BR[first : first + len(block), : block.shape[1] - 1]
            answers.append(triton.InferenceResponse([triton.Tensor.from_dlpack("logprobs", to_dlpack(values.contiguous()))]))
            first += len(block)
        return answers
