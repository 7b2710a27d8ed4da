"""An optimizer of the codebook's own, which takes a step inside the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from ferrovae.nn.quantizers.rank_sum import RankSum

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def accumulate(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to what their tensors have already."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient


def take_step(optimizer: Optimizer, parameters: Iterable[nn.Parameter], sum_over_ranks: RankSum | None) -> None:
    """A step along the mean of the ranks' gradients, which are then gone."""
    learnt = [parameter for parameter in parameters if parameter.grad is not None]
    if sum_over_ranks is not None and learnt:
        grads = [parameter.grad for parameter in learnt if parameter.grad is not None]
        shares = sum_over_ranks([*grads, grads[0].new_ones(1)])
        for parameter, total in zip(learnt, shares, strict=False):
            parameter.grad = total / shares[-1]
    optimizer.step()
    optimizer.zero_grad()
