"""The softmax over codes as a textbook has it, in float64: what the soft code operations are tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")


def distances(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """[..., N, D], [..., K, D] -> [..., N, K], term by term; the root has gradient 0 at 0."""
    if metric in ("euclidean", "sqeuclidean"):
        square = (x.unsqueeze(-2) - codebook.unsqueeze(-3)).square().sum(-1)
        if metric == "sqeuclidean":
            return square
        return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())
    if metric == "dot":
        return -(x @ codebook.mT)
    lengths = x.norm(dim=-1).unsqueeze(-1) * codebook.norm(dim=-1).unsqueeze(-2)
    return 1 - torch.where(lengths == 0, 0.0, x @ codebook.mT / torch.where(lengths == 0, 1.0, lengths))


def scores(x: Tensor, codebook: Tensor, temperature: Tensor | float, metric: str) -> Tensor:
    """-distance / temperature in float64."""
    return -distances(x.double(), codebook.double(), metric) / temperature


def value_and_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> list[Tensor]:
    """What `function` returns for the inputs as `dtype`, and the gradients of its sum with fixed weights, float64."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    value = function(*leaves)
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    gradients = torch.autograd.grad((value * weights).sum(), leaves)
    return [tensor.detach().double() for tensor in (value, *gradients)]


def assert_like_truth(
    ours: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: tuple[Tensor, ...], tolerance: float = 2e-5
) -> None:
    """Value and gradients of ours in float32 and of the truth in float64 agree, relative to the largest of each."""
    found = value_and_gradients(ours, inputs, torch.float32)
    for name, got, due in zip(
        ("value", "x", "codebook", "temperature"), found, value_and_gradients(truth, inputs, torch.float64), strict=True
    ):
        assert got.shape == due.shape, name
        scale = max(due.abs().max().item(), 1e-3) if due.numel() else 1.0
        torch.testing.assert_close(got, due, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")
