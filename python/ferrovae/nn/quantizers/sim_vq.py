"""SimVQ: a fixed random codebook seen through one trained map, so that every code moves with every other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ferrovae.nn.quantizers.checks import check_channels, check_floating, require
from ferrovae.nn.quantizers.mixed_radix import check_indices
from ferrovae.nn.quantizers.older_state import rename
from ferrovae.nn.quantizers.rows import mean_square
from ferrovae.nn.quantizers.straight_through import rotate_to, straight_through
from ferrovae.ops import nearest_code


class SimVQ(nn.Module):
    """The nearest of the codes f(e_k), e_k fixed and f trained (Zhu et al., 2024, arXiv:2411.02038).

    With c the code nearest to x, the loss is w (mean (sg[x] - c)^2 + b mean (x - sg[c])^2), sg stopping gradients: the
    first term trains f, the second x. Neither is dropped in eval mode. The lookup is exact and holds no N x K matrix.

    Arguments, results and `state_dict` are those of `vector_quantize_pytorch.SimVQ` 1.32.

    Args:
        dim: D, channels of x and of a code.
        codebook_size: K.
        codebook_transform: f, a module (K, `frozen_codebook_dim`) -> (K, D); by default a linear map without bias.
        init_fn: applied to the standard normal e / sqrt(frozen_codebook_dim) once, at the start.
        channel_first: x is (B, D, ...).
        rotation_trick: pass gradients to x rotated and scaled as the code lies to it; otherwise unchanged.
        input_to_quantize_commit_loss_weight: b.
        commitment_weight: w.
        frozen_codebook_dim: dimensions of e; default D.

    Raises:
        ValueError: a size is under 1, or `init_fn` changes how many codes there are.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] | None = None,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        for name, size in (("dim", dim), ("codebook_size", codebook_size), ("frozen_codebook_dim", frozen_dim)):
            require(self, size >= 1, f"{name} is {size}, expected at least 1")
        self.dim = dim
        self.codebook_size = codebook_size
        self.channel_first = channel_first
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        codebook = torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5
        if init_fn is not None:
            codebook = init_fn(codebook)
            require(
                self,
                codebook.ndim == 2 and codebook.shape[0] == codebook_size,
                f"init_fn gave {tuple(codebook.shape)}, expected ({codebook_size}, D)",
            )
        if codebook_transform is None:
            codebook_transform = nn.Linear(frozen_dim, dim, bias=False)
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", codebook)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # As upstream's 1.20.0 called them.
        rename(state_dict, prefix, {"codebook": "frozen_codebook", "codebook_to_codes": "code_transform"})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def codebook(self) -> Tensor:
        """The codes as f makes them now, (K, D), differentiable in its parameters."""
        return self.code_transform(self.frozen_codebook)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes of indices (B, ...) in [0, K), laid out as x; f sees all K codes, as in `forward`.

        Raises:
            ValueError: an index is out of range. TypeError: they are not integers.
        """
        check_indices(self, indices, self.codebook_size)
        codes = embedding(indices, self.codebook)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize.

        Args:
            x: (B, ..., D), or (B, D, ...) if `channel_first`; floating point. B alone is enough.

        Returns:
            quantized: shape and dtype of x: the codes up to rounding, with a gradient to x (also in eval mode).
            indices: int64, the shape of x without its channels; 0 for a vector with a NaN.
            loss: scalar, float32 (float64 for float64), also in eval mode; 0 for no vectors.

        Raises:
            ValueError: x has another shape, or f gives codes of another. TypeError: x is not floating point.
        """
        where = f"(B, {self.dim}, ...)" if self.channel_first else f"(B, ..., {self.dim})"
        require(self, x.ndim >= 2, f"x is {tuple(x.shape)}, expected {where}")
        check_channels(self, x, self.dim, 1 if self.channel_first else -1, where)
        check_floating(self, "x", x)
        tokens = x.movedim(1, -1) if self.channel_first else x
        with torch.autocast(x.device.type, enabled=False):
            quantized, indices, loss = self.quantize_rows(tokens.to(torch.promote_types(x.dtype, torch.float32)))
        quantized = quantized.to(x.dtype)
        return quantized.movedim(-1, 1) if self.channel_first else quantized, indices, loss

    def quantize_rows(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The same of x (..., D), float32 or float64; rows: bool, broadcasting to (...): those the loss is about."""
        codebook = self.codebook
        expected = (self.codebook_size, self.dim)
        if tuple(codebook.shape) != expected:
            raise ValueError(f"SimVQ: codebook_transform gives {tuple(codebook.shape)}, expected {expected}")
        codebook = codebook.to(x.dtype)
        indices = nearest_code(x.detach(), codebook.detach())
        codes = embedding(indices, codebook)
        to_input = mean_square(x - codes.detach(), rows) * self.input_to_quantize_commit_loss_weight
        loss = (mean_square(x.detach() - codes, rows) + to_input) * self.commitment_weight
        return rotate_to(x, codes) if self.rotation_trick else straight_through(x, codes), indices, loss
