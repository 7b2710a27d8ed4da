"""`torch.vmap` of the operations behind `reparameterize_kl`: B calls of N examples are one call of B N examples.

Every call numbers its examples from 0, so calls that share a seed share their noise (`randomness="same"`, or a seed
that is given). Calls with seeds of their own (`randomness="different"`) run one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ferrovae.ops._functions import one_by_one
from ferrovae.ops._registry import Operation

_Folded = tuple[list[Tensor | None], int]


def register(forward: Operation, backward: Operation, tensors: int) -> None:
    """Rules for an operation of `tensors` moments, and for its backward pass."""

    def forward_rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        *inputs, seed, example_ids, samples, first, elementwise, backend = args
        if dims[len(inputs)] is not None:
            return one_by_one(forward.on, info.batch_size, dims, args)
        moments, prior = _front(inputs, dims, info.batch_size, tensors)
        size, examples = info.batch_size, moments[0].shape[1]
        shared = all(
            p is None or (dim is None and p.shape[1] == 1) for p, dim in zip(prior, dims[tensors:], strict=False)
        )
        prior = [p if p is None else (p[0] if shared else _rows(p, examples)) for p in prior]
        ids = _ids(example_ids, dims[len(inputs) + 1], size, examples, seed)
        z, kl = forward(*(_fold(m) for m in moments), *prior, seed, ids, samples, first, elementwise, backend=backend)
        return (z.unflatten(1, (size, examples)), kl.unflatten(0, (size, examples))), (1, 0)

    def backward_rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        *inputs, dz, dkl, seed, example_ids, samples, first, prior_gradients, backend = args
        at = len(inputs)
        if dims[at + 2] is not None:
            return one_by_one(backward.on, info.batch_size, dims, args)
        moments, prior = _front(inputs, dims, info.batch_size, tensors)
        size, examples = info.batch_size, moments[0].shape[1]
        (dz, dkl), _ = _front([dz, dkl], dims[at : at + 2], size, 2)
        ids = _ids(example_ids, dims[at + 3], size, examples, seed)
        *of_moments, first_prior, second_prior = backward(
            *(_fold(m) for m in moments),
            *(None if p is None else _rows(p, examples) for p in prior),
            None if dz is None else dz.transpose(0, 1).flatten(1, 2),
            None if dkl is None else _fold(dkl),
            seed,
            ids,
            samples,
            first,
            prior_gradients,
            backend=backend,
        )
        of_prior = []
        for gradient, p in ((first_prior, prior[0]), (second_prior, prior[1])):
            if p is None or not prior_gradients:
                of_prior.append(gradient.expand(size, 0))
                continue
            gradient = gradient.unflatten(0, (size, examples))
            of_prior.append(gradient if p.shape[1] == examples else gradient.sum(1, keepdim=True))
        results = *(g.unflatten(0, (size, examples)) for g in of_moments), *of_prior
        return results, (0,) * len(results)

    forward.register_vmap(forward_rule)
    backward.register_vmap(backward_rule)


def _front(inputs: list[Any], dims: tuple[int | None, ...], size: int, tensors: int) -> tuple[list[Any], list[Any]]:
    """The inputs with the mapped dimension first, expanded where there is none: the moments, the others."""
    moved = [
        None if x is None else (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0))
        for x, dim in zip(inputs, dims, strict=False)
    ]
    return moved[:tensors], moved[tensors:]


def _fold(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _rows(parameter: Tensor, examples: int) -> Tensor:
    """A parameter of the prior [B, 1 or N, D] as [B N, D]."""
    return _fold(parameter.expand(-1, examples, -1))


def _ids(example_ids: Tensor | None, dim: int | None, size: int, examples: int, seed: Tensor) -> Tensor:
    if example_ids is None:
        return torch.arange(examples, device=seed.device).repeat(size)
    return example_ids.repeat(size) if dim is None else example_ids.movedim(dim, 0).flatten()
