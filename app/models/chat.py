"""Talking to a model: the turns so far, and answers that are shown while they are sampled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from app.data.templates import build_template
from app.errors import ModelError
from app.formats.records import Message
from app.models.context import context_of
from app.models.load import check_language_model, load_causal_lm, load_tokenizer


class Chat:
    """A conversation with the model in `path`, on a GPU where there is one (then in bfloat16).

    temperature: 0 takes the likeliest token every time. Raises ModelError for a folder that cannot be loaded, writes no
    answers or has no template, and where no question fits beside the longest answer.
    """

    def __init__(self, path: str, *, temperature: float = 1.0, max_new_tokens: int = 256, system: str | None = None) -> None:
        check_language_model(path)
        self._context = context_of(path)
        if self._context is not None and max_new_tokens >= self._context:
            raise ModelError(f"--max-new-tokens = {max_new_tokens} leaves no room for a question in the model's {self._context}: lower it")
        self._template = build_template("auto", load_tokenizer(path))
        on_gpu = torch.cuda.is_available()
        self._model = load_causal_lm(path, "bf16" if on_gpu else "fp32")
        if on_gpu:
            torch.nn.Module.to(self._model, "cuda")  # in place
        # Not the folder's, which may hold a nucleus or a repetition penalty: PPO samples without.
        self._model.generation_config = GenerationConfig()
        self._temperature, self._max_new_tokens = temperature, max_new_tokens
        self._opening = [Message("system", system)] if system else []
        self.turns: list[Message] = []

    def forget(self) -> None:
        """Start anew, with the system message alone."""
        self.turns = []

    def reply(self, text: str, show: Callable[[str], None]) -> str:
        """Answer `text`; `show` is given the pieces of the answer as they come. The oldest exchanges make room where the context is
        full. Raises ModelError, and forgets `text`, when it does not fit even alone."""
        kept = [*self.turns, Message("user", text)]
        ids = self._encode(kept)
        while self._context is not None and len(ids) + self._max_new_tokens > self._context:
            if len(kept) == 1:
                raise ModelError(
                    f"{len(ids)} tokens and an answer of up to {self._max_new_tokens} do not fit the model's {self._context}: "
                    "say less, or lower --max-new-tokens"
                )
            kept = kept[2:]
            ids = self._encode(kept)
        prompt = torch.tensor([ids], device=self._model.device)
        sampling = {"do_sample": True, "temperature": self._temperature, "top_k": 0} if self._temperature else {"do_sample": False}
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self._max_new_tokens,
            eos_token_id=self._template.eos_id,
            pad_token_id=self._template.pad_id,
            streamer=_Streamer(self._template.tokenizer, show),
            **sampling,
        )
        answer = self._template.decode(output[0, len(ids) :].tolist())
        self.turns = [*kept, Message("assistant", answer)]
        return answer

    def _encode(self, turns: list[Message]) -> list[int]:
        return self._template.encode([*self._opening, *turns], open_assistant=True)[0]


class _Streamer(TextStreamer):
    """Hands finished pieces of text on instead of printing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers for each piece."""
        self._show(text)
