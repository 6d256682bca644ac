"""The KL penalty's options: controllers, and those that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from app.algorithms.kl_penalty import KlConfig


def test_a_fixed_coefficient_stays() -> None:
    assert KlConfig(coef=0.1).after(0.1, kl=50.0, sequences=10_000) == 0.1


def test_an_adaptive_one_moves_towards_the_target() -> None:
    config = KlConfig(coef=0.1, controller="adaptive", target=6.0, horizon=1000)
    assert config.after(0.1, kl=6.6, sequences=100) == pytest.approx(0.101)
    assert config.after(0.101, kl=3.0, sequences=50) == pytest.approx(0.101 * 0.99)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"controller": "adaptive"}, "has no target"),
        ({"controller": "adaptive", "target": 6.0, "coef": 0.0}, "stays so"),
        ({"target": 6.0}, "set controller = adaptive"),
    ],
)
def test_contradictions(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KlConfig(**given)
