"""The network that makes a stage's codes from what the stages before it have found."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ferrovae.nn.quantizers.checks import require


class ImplicitCodebook(nn.Module):
    """f(e, c) for a code e and a condition c of D dimensions (QINCo, Huijben et al., 2024, arXiv:2401.14732, eq. 2).

    x_0 = W [c; e] + b, x_{l+1} = x_l + W''_l silu(W'_l x_l + b'_l) + b''_l. Every code is transformed by itself, so a
    known index needs one code a row, not K.

    Args:
        dim: D.
        dim_hidden: of each residual block, by default D.
        depth: residual blocks.
        l2norm_output: bring the results to length 1.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False) -> None:
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        require(self, dim >= 1 and hidden >= 1, f"dim is {dim} and dim_hidden {hidden}, expected at least 1")
        require(self, depth >= 0, f"depth is {depth}, expected at least 0")
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)]
        )
        self.l2norm_output = l2norm_output

    def forward(self, codes: Tensor, *, condition: Tensor) -> Tensor:
        """Every code under every condition: codes (H, K, D), condition (B, N, D) -> (H, B, N, K, D).

        codes may be (K, D), then the result has no H; condition may be (N, D), a batch of one.
        """
        if condition.ndim == 2:
            condition = condition[None]
        return self.pairs(codes[..., None, None, :, :], condition[:, :, None])

    def pairs(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Each code under its condition; both (..., D), and they broadcast. In the dtype of the codes."""
        weight, dim = self.proj_in.weight, codes.shape[-1]
        given = linear(condition.to(weight.dtype), weight[:, :dim], self.proj_in.bias)
        x = given + linear(codes.to(weight.dtype), weight[:, dim:])
        for layer in self.layers:
            x = layer(x) + x
        x = x.to(torch.promote_types(x.dtype, codes.dtype))
        return normalize(x, dim=-1) if self.l2norm_output else x
