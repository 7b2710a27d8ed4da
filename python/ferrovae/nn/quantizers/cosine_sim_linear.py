"""A linear map of directions: cosines between the input and the columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class CosineSimLinear(nn.Module):
    """y_j = s <x, w_j> / (|x| |w_j|), so that |y_j| <= s: (..., dim_in) -> (..., dim_out). A zero x or w_j gives 0.

    Its parameter is `weight`, (dim_in, dim_out).
    """

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=-1) @ normalize(self.weight, dim=0) * self.scale
