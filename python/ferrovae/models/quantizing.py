"""One view of every quantizer: a grid of vectors in, vectors and codes of the same grid out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """vectors (B, D, *grid), codes int64 (B, *grid, *stages), and the layer's loss, a scalar in nats per example."""

    vectors: Tensor
    codes: Tensor
    loss: Tensor


class GridQuantizer:
    """Calls a quantizer of this library or of vector-quantize-pytorch, whatever its layout and its results.

    A layer takes (B, P, D), (B, D, P) or (B, D, H, W), as its own options say, and returns vectors, indices
    (B, P) or (B, P, Q) with Q stages, heads or codebooks, and perhaps a loss: a mean over elements, one for each stage.

    Raises:
        ValueError: the layer does not tell its `codebook_size`, one integer.
    """

    def __init__(self, layer: nn.Module) -> None:
        size = getattr(layer, "codebook_size", None)
        if not isinstance(size, int):
            raise ValueError(
                f"VQVAE: the quantizer {type(layer).__name__} has codebook_size {size!r}, expected one integer: "
                "as many codes in every stage"
            )
        self.num_codes = size
        self.layer = layer
        self._as_image = bool(getattr(layer, "accept_image_fmap", False))
        channel_last = getattr(layer, "channel_last", not getattr(layer, "channel_first", False))
        self._channel_last = bool(channel_last) and not self._as_image

    @property
    def dim(self) -> int | None:
        """Channels of the vectors, where the layer tells."""
        dim = getattr(self.layer, "dim", None)
        return dim if isinstance(dim, int) else None

    @property
    def stages(self) -> tuple[int, ...]:
        """Shape of the codes at one place of the grid: () for a single one."""
        layer: Any = self.layer
        if hasattr(layer, "num_quantizers"):
            return (int(layer.num_quantizers),)
        if getattr(layer, "heads", 1) > 1:
            return (int(layer.heads),)
        if getattr(layer, "keep_num_codebooks_dim", False):
            return (int(layer.num_codebooks),)
        return ()

    def __call__(self, vectors: Tensor, freeze: bool | None) -> Quantized:
        """vectors: (B, D, *grid). freeze: leave the codebook as it is; None: as the layer's mode says."""
        batch, dim, *grid = vectors.shape
        freezes = "freeze_codebook" in inspect.signature(self.layer.forward).parameters
        options = {"freeze_codebook": freeze} if freezes else {}
        quantized, indices, *rest = self.layer(self._tokens(vectors), **options)
        expected = (batch, *grid, *self.stages)
        if not isinstance(indices, Tensor) or indices.numel() != math.prod(expected):
            found = tuple(indices.shape) if isinstance(indices, Tensor) else type(indices).__name__
            raise ValueError(
                f"VQVAE: the quantizer {type(self.layer).__name__} returned indices {found} for vectors "
                f"{tuple(vectors.shape)}, expected {expected} in its own layout"
            )
        elements = math.prod(grid) * self._code_dim(dim)
        loss = rest[0].sum() * elements if rest else vectors.new_zeros(())
        return Quantized(self._to_grid(quantized, grid), indices.reshape(expected).to(torch.int64), loss)

    def vectors(self, codes: Tensor, grid: Sequence[int]) -> Tensor:
        """The vectors of codes (N, *grid, *stages), as (N, D, *grid)."""
        layer: Any = self.layer
        tokens = codes if self._as_image else codes.reshape(codes.shape[0], math.prod(grid), *self.stages)
        lookup = getattr(layer, "get_output_from_indices", None) or layer.indices_to_codes
        return self._to_grid(lookup(tokens), grid)

    def _tokens(self, vectors: Tensor) -> Tensor:
        if self._as_image:
            return vectors
        tokens = vectors.flatten(2) if vectors.ndim > 2 else vectors[..., None]
        return tokens.movedim(1, -1) if self._channel_last else tokens

    def _to_grid(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        tokens = tokens.movedim(-1, 1) if self._channel_last else tokens
        return tokens.reshape(*tokens.shape[:2], *grid)

    def _code_dim(self, dim: int) -> int:
        """Dimensions of a code, over which the layer's loss is a mean."""
        size = getattr(self.layer, "codebook_dim", dim)
        return size if isinstance(size, int) else dim
