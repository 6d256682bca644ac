"""Log-probs, entropy and the response's place in a sequence, against literal versions over floats."""

from __future__ import annotations

import math
import random

import pytest
import torch

from app.numerics import entropy, gather_response, token_logprobs

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def literal_probabilities(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(logit / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def test_table() -> None:
    # Probabilities after the tokens are (1/6, 2/6, 3/6) and (1/4, 1/4, 2/4); the tokens are 0, 2, 1.
    # So p(2 | first) = 1/2 and p(1 | second) = 1/4. At temperature 0.5 weights are squared: 9/14 and 1/6.
    logits_BSV = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 1.0, 2.0], [9.0, 9.0, 9.0]]]).log()
    ids_BS = torch.tensor([[0, 2, 1]])
    torch.testing.assert_close(token_logprobs(logits_BSV, ids_BS), torch.tensor([[0.5, 0.25]]).log(), **CLOSE)
    torch.testing.assert_close(token_logprobs(logits_BSV, ids_BS, 0.5), torch.tensor([[9 / 14, 1 / 6]]).log(), **CLOSE)
    # Entropy of (1/4, 1/4, 1/2): 0.25 * log 4 * 2 + 0.5 * log 2 = 1.5 log 2; of three equal ones log 3.
    torch.testing.assert_close(entropy(logits_BSV)[:, 1:], torch.tensor([[1.5 * math.log(2), math.log(3)]]), **CLOSE)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_literal(temperature: float) -> None:
    draw = random.Random(23)
    rows, positions, vocabulary = 3, 6, 7
    logits = [[[draw.gauss(0, 2) for _ in range(vocabulary)] for _ in range(positions)] for _ in range(rows)]
    ids = [[draw.randrange(vocabulary) for _ in range(positions)] for _ in range(rows)]
    logprobs = [[0.0] * (positions - 1) for _ in range(rows)]
    entropies = [[0.0] * positions for _ in range(rows)]
    for row in range(rows):
        for t in range(positions):
            probabilities = literal_probabilities(logits[row][t], temperature)
            entropies[row][t] = sum(-p * math.log(p) for p in probabilities)
            if t + 1 < positions:
                logprobs[row][t] = math.log(probabilities[ids[row][t + 1]])
    torch.testing.assert_close(token_logprobs(torch.tensor(logits), torch.tensor(ids), temperature), torch.tensor(logprobs), **CLOSE)
    torch.testing.assert_close(entropy(torch.tensor(logits), temperature), torch.tensor(entropies), **CLOSE)


def test_gather_response_literal() -> None:
    """Position by position: response token t of a row is sequence token prompt + t, predicted at sequence position prompt + t - 1."""
    prompts, responses, longest = [1, 4, 2], [5, 2, 3], 5
    positions = max(p + r for p, r in zip(prompts, responses, strict=True)) - 1
    x_BS = torch.tensor([[100.0 * row + position + 1 for position in range(positions)] for row in range(3)])
    expected = [[0.0] * longest for _ in range(3)]
    for row in range(3):
        for position in range(positions):
            response_index = position + 1 - prompts[row]
            if 0 <= response_index < responses[row]:
                expected[row][response_index] = 100.0 * row + position + 1
    mask_BT = torch.arange(longest) < torch.tensor(responses)[:, None]
    torch.testing.assert_close(gather_response(x_BS, torch.tensor(prompts), mask_BT), torch.tensor(expected))
