"""A penalty that holds the moments of every channel near those of a distribution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import require


class VectorNorm(nn.Module):
    """sum_m w_m mean_d (M_m(z_d) - t_m)^2 over the mean, variance, skewness and excess kurtosis of a batch.

    The variance is unbiased (of a single row it is 0); skewness and kurtosis are the means of the third and fourth
    powers of (z - mean) / max(std, eps), the latter less 3.

    Args:
        l1_target, l1_weight: t and w of the mean.
        l2_target, l2_weight: of the variance.
        l3_target, l3_weight: of the skewness.
        l4_target, l4_weight: of the excess kurtosis.
        eps: the least standard deviation to divide by.
    """

    def __init__(
        self,
        l1_target: float = 0.0,
        l1_weight: float = 0.1,
        l2_target: float = 1.0,
        l2_weight: float = 0.07,
        l3_target: float = 0.0,
        l3_weight: float = 0.06,
        l4_target: float = 0.0,
        l4_weight: float = 0.05,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.l1_target, self.l1_weight = l1_target, l1_weight
        self.l2_target, self.l2_weight = l2_target, l2_weight
        self.l3_target, self.l3_weight = l3_target, l3_weight
        self.l4_target, self.l4_weight = l4_target, l4_weight
        self.eps = eps

    @classmethod
    def build(cls, name: str) -> VectorNorm:
        """A preset: none; var, kurt (of unit variance); var_tanh, var_sigmoid, var_laplace (as those distributions).

        Raises:
            ValueError: there is no such preset.
        """
        variances = {"var": 1.0, "var_tanh": 0.8225, "var_sigmoid": 3.29, "var_laplace": 2.0}
        if name == "none":
            return cls(l1_weight=0.0, l2_weight=0.0, l3_weight=0.0, l4_weight=0.0)
        if name == "kurt":
            return cls()
        require(
            "VectorNorm", name in variances, f"vector_norm is {name!r}, expected none, kurt or one of {[*variances]}"
        )
        return cls(l2_target=variances[name], l3_weight=0.0, l4_weight=0.0)

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """z (N, D) -> the penalty [], and the four moments of each channel, (D,), by name; all 0 without rows."""
        if z.shape[0] == 0:
            nothing = z.new_zeros(z.shape[1])
            return z.sum(), dict.fromkeys(("mean", "variance", "skewness", "kurtosis"), nothing)
        variance, mean = torch.var_mean(z, dim=0, correction=min(1, z.shape[0] - 1))
        scores = (z - mean) / variance.clamp_min(self.eps**2).sqrt()
        skewness, kurtosis = scores.pow(3).mean(dim=0), scores.pow(4).mean(dim=0) - 3
        moments = {"mean": mean, "variance": variance, "skewness": skewness, "kurtosis": kurtosis}
        wanted = (
            (self.l1_target, self.l1_weight),
            (self.l2_target, self.l2_weight),
            (self.l3_target, self.l3_weight),
            (self.l4_target, self.l4_weight),
        )
        penalty = z.new_zeros(())
        for moment, (target, weight) in zip(moments.values(), wanted, strict=True):
            if weight != 0:
                penalty = penalty + weight * (moment - target).square().mean()
        return penalty, moments
