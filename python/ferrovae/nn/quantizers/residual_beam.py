"""Beam search over the stages of a residual stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ferrovae.nn.quantizers.implicit_codebook import ImplicitCodebook
from ferrovae.nn.quantizers.residual_lookup import StackResult
from ferrovae.nn.quantizers.residual_stages import StageCall
from ferrovae.nn.quantizers.stack_update import ResidualStage, StageUpdate, shared_updates
from ferrovae.nn.quantizers.token_codebooks import ConditionedTransform


class _Level(NamedTuple):
    """What a stage kept: J inputs, M candidates."""

    inputs: Tensor  # (..., J, D)
    parents: Tensor  # (..., M) int64: of which input
    indices: Tensor  # (..., M) int64: its code
    losses: Tensor  # (..., M)


def beam_search(
    stages: Sequence[ResidualStage],
    networks: Sequence[ImplicitCodebook | None],
    x: Tensor,
    call: StageCall,
    width: int,
    weights: Tensor,
) -> StackResult:
    """The sequence of codes with the smallest weighted sum of losses that a beam finds, for each of x (B, ..., D).

    After every stage the `width` best sequences are kept, each continued by the `width` codes nearest to its residual.
    The stages' losses are means over the visible tokens; the codebooks learn from the best sequence's residuals.

    weights: (Q,), of each stage's loss in the sum.
    """
    residual, quantized = x.unsqueeze(-2), torch.zeros_like(x).unsqueeze(-2)
    scores = x.new_zeros(*x.shape[:-1], 1)
    levels: list[_Level] = []
    for number, (stage, network) in enumerate(zip(stages, networks, strict=True)):
        visible = call.visible(number, x.shape[:-1])
        vectors, indices, losses = _candidates(stage, network, residual, quantized, visible, call, width)
        steps = losses * weights[number]
        if call.dropout.kept is not None:
            # A dropped stage continues each sequence in one way, at no cost.
            others = torch.full_like(steps, torch.inf)
            others[..., 0] = 0.0
            kept = call.dropout.mask(number, x.shape[:-1])
            assert kept is not None
            steps = torch.where(kept[..., None, None], steps, others)
        count = indices.shape[-1]
        candidates = (scores[..., None] - steps.detach()).flatten(-2)
        most = 1 if number == len(stages) - 1 else width
        scores, chosen = candidates.topk(min(most, candidates.shape[-1]), dim=-1)
        left_over = call.left_over(residual.unsqueeze(-2), vectors)
        total = quantized.unsqueeze(-2) + vectors
        levels.append(
            _Level(
                residual,
                chosen // count,
                indices.flatten(-2).gather(-1, chosen),
                losses.flatten(-2).gather(-1, chosen),
            )
        )
        residual, quantized = (_pick(tensor.flatten(-3, -2), chosen) for tensor in (left_over, total))
    return _best(stages, levels, quantized[..., 0, :], call)


def _candidates(
    stage: ResidualStage,
    network: ImplicitCodebook | None,
    residual: Tensor,
    quantized: Tensor,
    visible: Tensor | None,
    call: StageCall,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes (..., J, k, D) nearest to each residual (..., J, D), their indices and losses (..., J, k)."""
    transform = None if network is None else ConditionedTransform(network, quantized)
    # The axis of sequences is one more of the grid, which a mask may leave out.
    shape = (residual.shape[0], -1) if residual.ndim > 2 else residual.shape[:-1]
    tokens = residual.reshape(*shape, residual.shape[-1])
    mask = None if visible is None else visible[..., None].expand(residual.shape[:-1]).reshape(tokens.shape[:-1])
    result = stage(
        tokens,
        mask=mask,
        topk=width,
        sample_codebook_temp=call.temperature,
        freeze_codebook=call.freeze,
        codebook_transform_fn=transform,
    )
    vectors, indices, losses = result
    grid = residual.shape[:-1]
    vectors = vectors.reshape(*grid, *vectors.shape[-2:])
    indices, count = indices.reshape(*grid, -1), indices.shape[-1]
    if losses.ndim:
        losses = losses.reshape(*grid, count)
    else:
        errors = mse_loss(vectors.detach(), residual.detach().unsqueeze(-2).expand(vectors.shape), reduction="none")
        losses = errors.mean(dim=-1)
    if visible is not None:
        vectors = torch.where(visible[..., None, None, None], vectors, 0.0)
        losses = torch.where(visible[..., None, None], losses, 0.0)
    return vectors, indices, losses


def _best(stages: Sequence[ResidualStage], levels: Sequence[_Level], quantized: Tensor, call: StageCall) -> StackResult:
    """From the last stage back to the first, by parents."""
    place = torch.zeros_like(levels[-1].indices[..., :1])
    indices, losses, inputs = [], [], []
    for level in reversed(levels):
        indices.append(level.indices.gather(-1, place)[..., 0])
        losses.append(level.losses.gather(-1, place)[..., 0])
        place = level.parents.gather(-1, place)
        inputs.append(_pick(level.inputs, place)[..., 0, :])
    indices, losses, inputs = indices[::-1], losses[::-1], inputs[::-1]
    grid, found, means = quantized.shape[:-1], [], []
    for number, (index, loss) in enumerate(zip(indices, losses, strict=True)):
        visible = call.visible(number, grid)
        found.append(index if visible is None else torch.where(visible, index, -1))
        means.append(loss.mean() if visible is None else loss.sum() / visible.sum().clamp(min=1))
    updates: list[StageUpdate] = []
    seen: list[tuple[Tensor, Tensor | None]] = []
    for number, stage in enumerate(stages if stages[0].training and not call.freeze else []):
        visible = call.visible(number, grid)
        mask = None if visible is None else visible.reshape(1, -1)
        rows = stage._rows(inputs[number].detach().to(torch.float32))
        own: list[StageUpdate] = []
        stage.updates = own
        stage._update(rows, found[number].reshape(1, -1), mask)
        stage.updates = None
        updates += [call.dropout.mark(update, number) for update in own]
        seen.append((rows, mask))
    if updates and updates[0].book.options.shared_by_stages:
        updates = shared_updates(updates[0].book, updates, seen)
    return StackResult(quantized, torch.stack(found, dim=-1), torch.stack(means), updates)


def _pick(vectors: Tensor, chosen: Tensor) -> Tensor:
    """(..., J, D), (..., M) -> (..., M, D)."""
    return vectors.gather(-2, chosen[..., None].expand(*chosen.shape, vectors.shape[-1]))
