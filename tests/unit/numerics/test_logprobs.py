"""Log-probs of next tokens: gradients, precision, chunks and what the backward pass holds."""

from __future__ import annotations

import pytest
import torch

from app.numerics import entropy, gather_response, label_logprobs, logprobs, token_logprobs


def plain_token_logprobs(logits_BSV: torch.Tensor, ids_BS: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits_BSV[:, :-1] / temperature).log_softmax(-1).gather(-1, ids_BS[:, 1:, None]).squeeze(-1)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(3, 7, 11, dtype=torch.float64), torch.randint(0, 11, (3, 7))


@pytest.mark.parametrize("chunk", [1, 33 * 2, 2**22], ids=["position by position", "two positions", "whole"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_values_and_gradients_equal_log_softmax(
    batch: tuple[torch.Tensor, torch.Tensor], temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    logits, ids = batch
    upstream = torch.randn(3, 6, dtype=torch.float64)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    actual, expected = token_logprobs(ours, ids, temperature), plain_token_logprobs(plain, ids, temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    actual.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-12)


def test_gradcheck(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, ids = batch
    assert torch.autograd.gradcheck(lambda x: label_logprobs(x, ids[:, :3], 0.8), (logits[:, :3].clone().requires_grad_(),))


def test_entropy_in_chunks(batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = entropy(batch[0], 0.7)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(entropy(batch[0], 0.7), whole)


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_entropy_gradient(batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    assert torch.autograd.gradcheck(lambda x: entropy(x, 0.8), (batch[0][:, :3].clone().requires_grad_(),))


def test_half_precision_logits_are_computed_in_float32() -> None:
    torch.manual_seed(3)
    logits, ids = torch.randn(2, 5, 300).bfloat16().requires_grad_(), torch.randint(0, 300, (2, 5))
    result = token_logprobs(logits, ids)
    assert result.dtype == torch.float32
    assert entropy(logits).dtype == torch.float32
    torch.testing.assert_close(result, plain_token_logprobs(logits.detach().float(), ids, 1.0), rtol=1e-6, atol=1e-6)
    result.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_backward_holds_the_logits_and_nothing_else_of_their_size() -> None:
    logits, ids = torch.randn(2, 5, 50, requires_grad=True), torch.randint(0, 50, (2, 5))
    held: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        token_logprobs(logits, ids, 0.7).sum()
        entropy(logits)
    large = [x for x in held if x.numel() >= 2 * 4 * 50]
    assert {x.data_ptr() for x in large} == {logits.data_ptr()}


def test_a_token_depends_on_the_logits_before_it_only(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, ids = batch[0].clone().requires_grad_(), batch[1]
    token_logprobs(logits, ids)[0, 2].backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(-1).nonzero().tolist() == [[0, 2]]
    assert logits.grad[0, 2].argmax() == ids[0, 3]


def test_impossible_tokens_add_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    torch.testing.assert_close(entropy(logits), torch.tensor([[2.0]]).log())
    entropy(logits.requires_grad_()).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, 1, 3))  # two equal ones are as uncertain as can be


def test_no_position_is_no_number() -> None:
    logits_BSV = torch.zeros(2, 0, 5, requires_grad=True)
    logprobs_BS, entropy_BS = label_logprobs(logits_BSV, torch.zeros(2, 0, dtype=torch.long)), entropy(logits_BSV)
    assert logprobs_BS.shape == entropy_BS.shape == (2, 0)
    (logprobs_BS.sum() + entropy_BS.sum()).backward()
    assert logits_BSV.grad is not None and logits_BSV.grad.shape == (2, 0, 5)


def test_labels_must_fit_the_logits() -> None:
    with pytest.raises(ValueError, match="differ in rows or positions"):
        label_logprobs(torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.long))


def test_gathered_values_sit_before_their_token() -> None:
    # Prompt of 2, response of 2: response token 0 is sequence token 2, judged at position 1; token 1 at position 2.
    values_BS = torch.tensor([[0.0, 1.0, 2.0, 3.0, float("nan")]], requires_grad=True)
    mask_BT = torch.tensor([[True, True, False]])
    gathered = gather_response(values_BS, torch.tensor([2]), mask_BT)
    assert gathered.tolist() == [[1.0, 2.0, 0.0]]
    gathered.sum().backward()
    assert values_BS.grad is not None
    assert values_BS.grad.tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0]]
