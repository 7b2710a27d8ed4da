"""One example of every operation: what it is called with, so that one test can hold it to its float64 reference.

A new operation needs one entry in `examples`. Inputs are drawn on the CPU; floating-point ones ask for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, randint, randn

from ferrovae import ops, use_backend


@dataclass(frozen=True)
class Example:
    """A call and its inputs; `same` is the share of integers in the results that must be equal."""

    call: Callable[..., Any]
    inputs: Sequence[Tensor]
    tolerance: float = 2e-5
    same: float = 1.0


def examples() -> dict[str, Example]:
    """By name, of the operations there are."""
    torch.manual_seed(0)
    x, codebook = randn(300, 24), randn(70, 24)
    pixels = randint(256, (5, 3, 4, 6)) / 127.5 - 1
    mixture = [randn(5, 10, 4, 6), *(randn(5, 3, 10, 4, 6) for _ in range(3))]
    plain: dict[str, list[Tensor]] = {
        "bernoulli_log_prob": [randint(2, (37, 130)), randn(37, 130)],
        "categorical_log_prob": [randint(5, (9, 33)), randn(9, 5, 33)],
        "code_cross_entropy": [x, codebook, randint(70, (300,))],
        "code_logsumexp": [x, codebook],
        "continuous_bernoulli_log_prob": [torch.rand(37, 130), randn(37, 130)],
        "discretized_logistic_log_prob": [pixels, randn(5, 3, 4, 6), randn(5, 3, 4, 6) - 2],
        "discretized_logistic_mixture_log_prob": [pixels, *mixture],
        "expected_code": [x, codebook],
        "gaussian_log_prob": [randn(37, 130), randn(37, 130), randn(37, 130)],
        "mean_code_entropy": [x, codebook],
        "nearest_code": [x, codebook],
        "negative_binomial_log_prob": [randint(9, (37, 30)), randn(37, 30), randn(37, 30)],
        "poisson_log_prob": [randint(9, (37, 30)), randn(37, 30)],
        "residual_nearest_code": [x, torch.stack([codebook, codebook.flip(0) / 3])],
        "sign_code_entropy": [randn(40, 10) / 10],
        "sign_code_mean": [randn(40, 10) / 10],
    }
    found = {name: Example(getattr(ops, name), inputs) for name, inputs in plain.items() if hasattr(ops, name)}
    special = {
        "code_sums": Example(lambda x, indices: ops.code_sums(x, indices, 70), [x, randint(70, (300,))]),
        "reparameterize_kl": Example(_seeded("reparameterize_kl"), [randn(37, 50), randn(37, 50)]),
        "reparameterize_kl_from_moments": Example(_seeded("reparameterize_kl_from_moments"), [randn(5, 8, 4, 3)]),
        # Scores in float32 may order two noisy distances that nearly tie otherwise than float64 does.
        "sample_code": Example(_seeded("sample_code"), [x, codebook], same=0.98),
    }
    return found | {name: example for name, example in special.items() if hasattr(ops, name)}


def results(example: Example, device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """What the call returns and the gradients of its inputs, on the CPU: floating-point as float64."""
    inputs = [_input(tensor, device, dtype) for tensor in example.inputs]
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    with use_backend(backend):
        returned = example.call(*inputs)
        values = list(returned) if isinstance(returned, tuple | list) else [returned]
        smooth = [value for value in values if value.requires_grad]
        gradients: Sequence[Tensor] = ()
        if smooth:
            weights = [torch.linspace(1, 2, value.numel(), device=device).view_as(value) for value in smooth]
            total = sum((value.double() * weight).sum() for value, weight in zip(smooth, weights, strict=True))
            gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [_plain(tensor) for tensor in (*values, *gradients)]


def compare(example: Example, ours: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Integers equal, the rest close in proportion to the largest of its tensor."""
    for mine, due in zip(ours, truth, strict=True):
        if not due.is_floating_point():
            assert float((mine == due).double().mean()) >= example.same
        else:
            size = float(due.abs().max()) if due.numel() else 1.0
            torch.testing.assert_close(mine, due, rtol=example.tolerance, atol=example.tolerance * max(size, 1e-3))


def public() -> set[str]:
    """The operations that users call."""
    return {name for name in ops.__all__ if name.islower() and name != "use_backend"}


def _seeded(name: str) -> Callable[..., Any]:
    return lambda x, *rest: getattr(ops, name)(x, *rest, seed=torch.tensor([11], device=x.device))


def _input(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.to(device)
    return tensor.detach().to(device, dtype).requires_grad_()


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor
