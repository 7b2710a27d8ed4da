"""Vector quantization: each vector is replaced by the nearest vector of a codebook."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ferrovae.nn.quantizers.checks import check_floating, require
from ferrovae.nn.quantizers.codebook import Codebook
from ferrovae.nn.quantizers.straight_through import rotate_to, soft_assignment, straight_through


class LossBreakdown(NamedTuple):
    """The terms of a quantizer's loss, each a scalar before its weight; a term that is off is 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class _Quantized(NamedTuple):
    vectors: Tensor
    indices: Tensor
    commitment: Tensor


class VectorQuantize(nn.Module):
    """The nearest of K codes for every vector, as in VQ-VAE (van den Oord et al., 2017, arXiv:1711.00937).

    Arguments, results and `state_dict` are those of `vector_quantize_pytorch.VectorQuantize` 1.32, so either loads the
    other's checkpoints. The lookup is exact and holds no N x K matrix. Under `torch.distributed` every step sums the
    codebook statistics over the ranks in one all-reduce, whenever the process group was made; all ranks must train
    together, and hold the same codebook to the bit.

    Args:
        dim: channels of the input.
        codebook_size: K, the number of codes.
        codebook_dim: dimensions of a code; another number than `dim` adds the linear maps `project_in`, `project_out`.
        decay: of the moving averages that the codes are made of: new = decay * old + (1 - decay) * batch.
        eps: Laplace smoothing of the moving counts.
        freeze_codebook: leave the codebook as it is in training; `forward` can say otherwise for one call.
        kmeans_init: take the codes from k-means over the first batch, `kmeans_iters` steps, also in eval mode; a
            cluster that attracts no vector becomes the zero code.
        use_cosine_sim: inputs and codes have length 1, and the nearest is the one at the smallest angle.
        threshold_ema_dead_code: a code whose moving count falls under it is replaced by a vector of the batch; 0 never
            replaces. Only in training.
        channel_last: x is (B, N, dim); otherwise (B, dim, N).
        accept_image_fmap: x is (B, dim, H, W).
        commitment_weight: of the mean squared distance between the vectors and their codes in the loss.
        straight_through: needs `rotation_trick=False`. Where the input needs no gradient but `project_in` does,
            give it that of the expected code under softmax(-distance).
        rotation_trick: pass gradients to the input rotated and scaled as the code lies to the vector; by default where
            `dim > 1`. False passes them unchanged.
        ema_update: the codes follow the moving averages. Default: True.
        learnable_codebook: the codes are a parameter, which the loss trains; needs `ema_update=False`.
        return_zeros_for_masked_padding: masked vectors come out as zeros, otherwise as they came in.

    Raises:
        ValueError: a size, rate or weight is out of range, or two arguments exclude each other.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        commitment_weight: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        ema_update: bool | None = None,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
    ) -> None:
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        ema_update = True if ema_update is None else ema_update
        learnable_codebook = bool(learnable_codebook)
        for name, count in (
            ("dim", dim),
            ("codebook_size", codebook_size),
            ("codebook_dim", codebook_dim),
            ("kmeans_iters", kmeans_iters),
        ):
            require(self, count >= 1, f"{name} is {count}, expected at least 1")
        require(self, 0 <= decay <= 1, f"decay is {decay}, expected a number from 0 to 1")
        require(self, eps > 0, f"eps is {eps}, expected a positive number")
        require(self, commitment_weight >= 0, f"commitment_weight is {commitment_weight}, expected a number >= 0")
        require(
            self,
            threshold_ema_dead_code >= 0,
            f"threshold_ema_dead_code is {threshold_ema_dead_code}, expected a number >= 0",
        )
        require(
            self,
            not (straight_through and rotation_trick),
            "straight_through=True excludes the rotation trick: pass rotation_trick=False",
        )
        require(
            self,
            not (learnable_codebook and ema_update),
            "learnable_codebook=True excludes ema_update: pass ema_update=False",
        )
        require(
            self, not (learnable_codebook and use_cosine_sim), "learnable_codebook=True excludes use_cosine_sim=True"
        )
        require(
            self,
            not (learnable_codebook and straight_through),
            "learnable_codebook=True excludes straight_through=True",
        )
        self.dim = dim
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.commitment_weight = commitment_weight
        self.straight_through = straight_through
        self.rotation_trick = rotation_trick
        self.learnable_codebook = learnable_codebook
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        projects = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if projects else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if projects else nn.Identity()
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            cosine=use_cosine_sim,
            dead_code_threshold=threshold_ema_dead_code,
            learnable=learnable_codebook,
            ema_update=ema_update,
        )

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow their moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, codebook_dim) float32; assigning copies into them."""
        return self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed[0].copy_(codes)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices (B, ...), laid out as the layer's input but with `codebook_dim` channels; -1 gives 0."""
        return self._from_channel_last(self._codes(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices in eval mode, laid out as the layer's input; -1 is a zero code."""
        return self._from_channel_last(self.project_out(self._codes(indices).to(self._output_dtype())))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LossBreakdown]:
        """Quantize, and in training let the codebook follow the batch afterwards.

        Args:
            x: (B, dim), (B, N, dim), or as `channel_last` and `accept_image_fmap` say; floating point.
            mask: bool, shaped as the indices; False marks padding, which takes no part in anything.
            freeze_codebook: overrides the layer's own for this call.
            return_loss_breakdown: return a `LossBreakdown` as the fourth value.

        Returns:
            quantized: shape and dtype of x. In eval mode exactly the codes, without a gradient to x.
            indices: int64, the shape of x without its channels; -1 where masked. A vector with a NaN or an infinity
                has index 0 and never enters the codebook.
            loss: scalar, float32 (float64 for a float64 x): `commitment_weight` times the mean squared distance to
                the codes as they were before this step; 0 in eval mode and where everything is masked.

        Raises:
            ValueError: x or mask has another shape.
            TypeError: x is not floating point, or mask not bool.
        """
        tokens = self._to_channel_last(x)
        if mask is not None:
            _check_mask(mask, tokens)
            tokens = torch.where(mask[..., None], tokens, 0.0)
        projected = self.project_in(tokens)
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        with torch.autocast(x.device.type, enabled=False):
            found = self._quantize(
                projected.to(torch.promote_types(x.dtype, torch.float32)), mask, freeze, x.requires_grad
            )
        quantized = self.project_out(found.vectors.to(x.dtype))
        indices = found.indices
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else self._to_channel_last(x)
            quantized = torch.where(mask[..., None], quantized, padding)
            indices = torch.where(mask, indices, -1)
        quantized = self._from_channel_last(quantized)
        loss = self.commitment_weight * found.commitment
        if not return_loss_breakdown:
            return quantized, indices, loss
        zero = torch.zeros_like(loss)
        return quantized, indices, loss, LossBreakdown(found.commitment, zero, zero, zero)

    def _quantize(self, x: Tensor, mask: Tensor | None, freeze: bool, to_input: bool) -> _Quantized:
        """x: (..., codebook_dim), float32 or float64."""
        if self.use_cosine_sim:
            x = normalize(x, dim=-1, eps=1e-6)
        rows = x.detach().to(torch.float32).reshape(-1, self.codebook_dim)
        valid = rows.isfinite().all(dim=-1)
        if mask is not None:
            valid &= mask.reshape(-1)
        self._codebook.start(rows, valid)
        indices = self._codebook.nearest(rows)
        codes = self._codebook.vectors(indices).to(x.dtype).view(x.shape)
        if not self.training:
            return _Quantized(codes, indices.view(x.shape[:-1]), x.new_zeros(()))
        commitment = x.new_zeros(())
        if self.commitment_weight > 0:
            target = codes if self.learnable_codebook and not freeze else codes.detach()
            commitment = _mean_square(target - x, mask)
        vectors = self._with_gradient(x, codes, indices, to_input)
        if not freeze:
            self._codebook.update(rows, indices, valid)
        return _Quantized(vectors, indices.view(x.shape[:-1]), commitment)

    def _with_gradient(self, x: Tensor, codes: Tensor, indices: Tensor, to_input: bool) -> Tensor:
        if to_input:
            return rotate_to(x, codes) if self.rotation_trick else straight_through(x, codes)
        if self.straight_through and x.requires_grad:
            flat = soft_assignment(
                x.reshape(-1, self.codebook_dim), indices, self._codebook.embed[0], cosine=self.use_cosine_sim
            )
            return flat.view(x.shape)
        return codes

    def _codes(self, indices: Tensor) -> Tensor:
        codes = self._codebook.vectors(indices.clamp(min=0))
        return torch.where((indices >= 0)[..., None], codes, 0.0)

    def _output_dtype(self) -> torch.dtype:
        return self.project_out.weight.dtype if isinstance(self.project_out, nn.Linear) else torch.float32

    def _channel_dim(self, ndim: int) -> int:
        return -1 if ndim == 2 or (self.channel_last and not self.accept_image_fmap) else 1

    def _to_channel_last(self, x: Tensor) -> Tensor:
        expected = f"(B, {self.dim}, H, W)" if self.accept_image_fmap else f"(B, {self.dim}) or (B, N, {self.dim})"
        if not (self.channel_last or self.accept_image_fmap):
            expected = f"(B, {self.dim}) or (B, {self.dim}, N)"
        dim = self._channel_dim(x.ndim)
        ndims = (4,) if self.accept_image_fmap else (2, 3)
        require(self, x.ndim in ndims and x.shape[dim] == self.dim, f"x is {tuple(x.shape)}, expected {expected}")
        check_floating(self, "x", x)
        return x.movedim(dim, -1)

    def _from_channel_last(self, x: Tensor) -> Tensor:
        return x.movedim(-1, self._channel_dim(x.ndim))


def _check_mask(mask: Tensor, tokens: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"VectorQuantize: mask is {mask.dtype}, expected torch.bool")
    expected = tuple(tokens.shape[:-1])
    require(
        "VectorQuantize",
        tuple(mask.shape) == expected,
        f"mask is {tuple(mask.shape)}, expected {expected} to match x {tuple(tokens.shape)} (channels last)",
    )


def _mean_square(difference: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the visible elements; 0 where there are none."""
    if mask is None:
        return difference.square().sum() / max(difference.numel(), 1)
    visible = torch.where(mask[..., None], difference, 0.0)
    return visible.square().sum() / (mask.sum() * difference.shape[-1]).clamp(min=1)
