"""How the learning rate and the weight of the KL move: pure functions of the step."""

from __future__ import annotations

import math

from ferrovae.training.errors import ConfigurationError


def learning_rate(step: int, steps: int, *, first: float, final: float, shape: str) -> float:
    """The learning rate of `step` in 0..steps-1: `first` at the first step, `final` at the last.

    exponential: first (final / first)^t; cosine: final + (first - final) (1 + cos pi t) / 2; t = step / (steps - 1).
    """
    t = step / (steps - 1) if steps > 1 else 0.0
    if shape == "exponential":
        return first * (final / first) ** t
    if shape == "cosine":
        return final + (first - final) * (1 + math.cos(math.pi * t)) / 2
    return first


def kl_weight(step: int, warmup_steps: int) -> float:
    """The weight of the KL at `step`: (step + 1) / warmup_steps, and 1 from step warmup_steps - 1 on."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def warmup_steps(epochs: float, steps_per_epoch: int, steps: int) -> int:
    """The steps of a ramp over `epochs`; one that outlives the `steps` of training is an error."""
    ramp = math.ceil(epochs * steps_per_epoch)
    if ramp > steps:
        raise ConfigurationError(
            f"kl_warmup_epochs is {epochs:g}, which is {ramp} steps, but training ends after {steps}: "
            "the objective would never become the ELBO"
        )
    return ramp
