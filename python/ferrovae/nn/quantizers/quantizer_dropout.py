"""Quantizer dropout: a residual stack trained to make do with its first stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ferrovae.nn.quantizers.checks import require
from ferrovae.nn.quantizers.keyed_sampling import key_of, keyed_words
from ferrovae.nn.quantizers.rank_sum import rank_and_world_size


def draw_last_stage(
    low: int, high: int, *, seed: int | Tensor, batch: int | None, device: torch.device | str | None
) -> Tensor:
    """The last stage to keep, uniform on low..high - 1, as a function of the seed: int64 [], or [B] for each sample.

    One draw is the same on every rank that holds the seed; the samples of different ranks are drawn apart.
    """
    if isinstance(seed, int):
        seed = torch.full((), seed % 2**32, dtype=torch.int64, device=device)
    stream = 0 if batch is None else 1 + rank_and_world_size()[0]
    counters = torch.arange(1 if batch is None else batch, device=device)
    last = low + keyed_words(seed, counters, stream) % (high - low)
    return last[0] if batch is None else last


class QuantizerDropout(nn.Module):
    """What a residual stack of Q stages needs to drop its later ones (SoundStream, arXiv:2107.03312, section III-C).

    In training, the last stage kept is uniform on c..Q - 1, and the number of stages kept is rounded up to a multiple
    of m, at most Q (EnCodec, arXiv:2210.13438). No stage is skipped by a branch: a stack computes them all and masks,
    so one graph serves every draw.

    Args:
        num_quantizers: Q.
        quantize_dropout: whether to drop; a stack of one stage never does.
        quantize_dropout_cutoff_index: c, the earliest stage that may be the last.
        quantize_dropout_multiple_of: m.
        quantize_dropout_per_sample: draw for each sample of a batch rather than once for all.

    Raises:
        ValueError: Q or m is under 1, or c out of range.
    """

    def __init__(
        self,
        num_quantizers: int,
        *,
        quantize_dropout: bool,
        quantize_dropout_cutoff_index: int,
        quantize_dropout_multiple_of: int,
        quantize_dropout_per_sample: bool,
    ) -> None:
        super().__init__()
        cutoff, multiple = quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        require(self, num_quantizers >= 1, f"num_quantizers is {num_quantizers}, expected at least 1")
        require(self, cutoff >= 0, f"quantize_dropout_cutoff_index is {cutoff}, expected at least 0")
        require(self, multiple >= 1, f"quantize_dropout_multiple_of is {multiple}, expected at least 1")
        self.num_quantizers = num_quantizers
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = cutoff
        self.quantize_dropout_multiple_of = multiple
        self.quantize_dropout_per_sample = quantize_dropout_per_sample
        require(
            self,
            not self.quantize_dropout or cutoff < num_quantizers,
            f"quantize_dropout_cutoff_index is {cutoff}, expected less than the {num_quantizers} stages",
        )

    def dropout_state(self) -> Tensor | None:
        """A floating-point tensor that is equal on all ranks and moves with every training step; None without one."""
        return None

    def dropout_seed(self, device: torch.device | str | None) -> Tensor:
        """The seed of one step, int64 [].

        In one process it comes from torch's generator, which activation checkpointing replays. Ranks, whose generators
        may differ, take it from the bits of `dropout_state`, and so agree without a message: a step that moves nothing,
        as while gradients accumulate, repeats the draw. Ranks with no such state share nothing that could disagree, and
        draw each for itself.
        """
        state = self.dropout_state()
        if state is not None and rank_and_world_size()[1] > 1:
            return key_of(state.detach().to(torch.float32))
        return torch.randint(2**31, (), device=device)

    def kept_stages(self, batch: int, device: torch.device | str | None, seed: int | Tensor | None = None) -> Tensor:
        """How many stages to keep, in 1..Q: int64 [], or [B] with `quantize_dropout_per_sample`.

        A seed fixes the draw: an int, or int64 [] so that a graph can hold it; None takes `dropout_seed`.
        """
        if seed is None:
            seed = self.dropout_seed(device)
        samples = batch if self.quantize_dropout_per_sample else None
        low, high, multiple = (
            self.quantize_dropout_cutoff_index,
            self.num_quantizers,
            self.quantize_dropout_multiple_of,
        )
        last = draw_last_stage(low, high, seed=seed, batch=samples, device=device)
        return ((last + multiple) // multiple * multiple).clamp(max=high)

    def complete_stages(self, indices: Tensor) -> Tensor:
        """Indices (..., q) of the first q stages as (..., Q): -1 for the rest.

        Raises:
            ValueError: q exceeds Q, or falls short of it although the stack was not trained for that.
            TypeError: the indices are not integers.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"{type(self).__name__}: indices is {indices.dtype}, expected an integer dtype")
        stages = indices.shape[-1] if indices.ndim else 0
        fits = 1 <= stages <= self.num_quantizers
        require(
            self,
            fits,
            f"indices is {tuple(indices.shape)}, expected (..., Q) with Q at most {self.num_quantizers} stages",
        )
        missing = self.num_quantizers - stages
        require(
            self,
            missing == 0 or self.quantize_dropout,
            f"indices has {stages} of {self.num_quantizers} stages: only quantize_dropout=True trains for fewer",
        )
        return pad(indices, (0, missing), value=-1)


def stage_mask(kept: Tensor, stage: int, ndim: int) -> Tensor:
    """Whether a stage is kept, bool, broadcasting to a tensor of `ndim` axes whose first are the B samples."""
    mask = kept > stage
    return mask.reshape(mask.shape + (1,) * (ndim - 1)) if mask.ndim else mask
