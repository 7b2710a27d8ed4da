"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from ferrovae.training.errors import ConfigurationError
from ferrovae.training.schedule import kl_weight, learning_rate, warmup_steps


@pytest.mark.parametrize("shape", ["exponential", "cosine"])
def test_both_ends(shape: str) -> None:
    rate = [learning_rate(step, 11, first=1e-3, final=1e-4, shape=shape) for step in range(11)]
    assert rate[0] == pytest.approx(1e-3, rel=1e-12)
    assert rate[10] == pytest.approx(1e-4, rel=1e-12)
    assert rate == sorted(rate, reverse=True)


def test_exponential_has_a_constant_ratio() -> None:
    rate = [learning_rate(step, 6, first=1.0, final=1 / 32, shape="exponential") for step in range(6)]
    assert rate == pytest.approx([2.0**-step for step in range(6)], rel=1e-12)


def test_cosine_is_halfway_in_the_middle() -> None:
    assert learning_rate(5, 11, first=3.0, final=1.0, shape="cosine") == pytest.approx(2.0, rel=1e-12)
    quarter = 1 + (1 + math.sqrt(0.5))
    assert learning_rate(1, 5, first=3.0, final=1.0, shape="cosine") == pytest.approx(quarter, rel=1e-12)


def test_constant_and_a_single_step() -> None:
    assert learning_rate(3, 5, first=0.1, final=0.1, shape="constant") == 0.1
    assert learning_rate(0, 1, first=0.1, final=0.01, shape="exponential") == 0.1


def test_kl_warmup_is_a_ramp_that_ends_at_one() -> None:
    assert [kl_weight(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert kl_weight(0, 0) == 1.0


def test_a_ramp_that_outlives_training_is_refused() -> None:
    assert warmup_steps(1.5, 10, 15) == 15
    with pytest.raises(ConfigurationError, match="which is 15 steps, but training ends after 14"):
        warmup_steps(1.5, 10, 14)
