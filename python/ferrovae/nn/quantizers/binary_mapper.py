"""Independent bits as one code: sampled from their logits, with the gradient of the code's probabilities."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from ferrovae.nn.quantizers.checks import check_floating, require
from ferrovae.nn.quantizers.mixed_radix import check_indices


class BinaryMapper(nn.Module):
    """Draws d bits with logits a and gives their code as a one-hot vector of 2^d (Fleuret, 2025, arXiv:2510.17558).

    P(bit_i = 1) = sigmoid(a_i / temperature) for the draw, code = sum_i bit_i 2^i. The gradient is that of the
    probabilities at temperature 1,

        G_k = prod_i sigmoid(a_i)^{bit_i(k)} (1 - sigmoid(a_i))^{1 - bit_i(k)},

    which are built by doubling, bit by bit. The auxiliary loss keeps bits near uniform: with the entropy H(a) of the
    code in nats, relu(d ln 2 - H(a) - threshold).

    Args:
        bits: d.
        kl_loss_threshold: nats of divergence from uniform bits that cost nothing; by default one bit.
        deterministic_on_eval: in eval mode take each bit's likelier value.

    Raises:
        ValueError: bits is not in 1..62.
    """

    def __init__(self, bits: int = 1, kl_loss_threshold: float = log(2), deterministic_on_eval: bool = False) -> None:
        super().__init__()
        require(self, 1 <= bits <= 62, f"bits is {bits}, expected 1 to 62")
        self.bits = bits
        self.num_codes = 2**bits
        self.kl_loss_threshold = kl_loss_threshold
        self.deterministic_on_eval = deterministic_on_eval
        self.register_buffer("power_two", 2 ** torch.arange(bits), persistent=False)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    power_two: Tensor
    zero: Tensor

    @property
    def codes(self) -> Tensor:
        """The bits of every code, (2^d, d) bool, made when asked for."""
        return self._bits(torch.arange(self.num_codes, device=self.power_two.device))

    def binary_entropy(self, logits: Tensor) -> Tensor:
        """Entropy of independent bits, in nats: (..., d) -> (...)."""
        # beyond 1000 the entropy is 0, and inf * 0 would not be
        size = _widened(logits).clamp(-1000, 1000).abs()
        return (softplus(-size) + size * (-size).sigmoid()).sum(dim=-1)

    def calc_aux_loss(self, logits: Tensor, reduce_aux_kl_loss: bool = True) -> Tensor:
        """Divergence from uniform bits above the threshold, in nats: (..., d) -> its mean [], or (...)."""
        excess = (self.bits * log(2) - self.binary_entropy(logits) - self.kl_loss_threshold).relu()
        return excess.sum() / max(excess.numel(), 1) if reduce_aux_kl_loss else excess

    def log_prob(
        self, logits: Tensor, *, indices: Tensor | None = None, one_hot: Tensor | None = None, sum_bits: bool = True
    ) -> Tensor:
        """Log-probability of codes, in nats.

        Args:
            logits: (..., d).
            indices: (...), integers in [0, 2^d); or instead
            one_hot: (..., 2^d).
            sum_bits: of the code, (...); otherwise of each bit, (..., d).

        Raises:
            ValueError: neither or both of indices and one_hot are given, or an index is out of range.
        """
        require(self, (indices is None) != (one_hot is None), "expected either indices or one_hot")
        self._check_logits(logits)
        if indices is None:
            indices = torch.as_tensor(one_hot).argmax(dim=-1)
        check_indices(self, indices, self.num_codes)
        logits = _widened(logits)
        log_probs = logsigmoid(torch.where(self._bits(indices), logits, -logits))
        return log_probs.sum(dim=-1) if sum_bits else log_probs

    def forward(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
        deterministic: bool | None = None,
        return_indices: bool = False,
        reduce_aux_kl_loss: bool = True,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Draw a code for every vector of logits.

        Args:
            logits: (..., d), floating point.
            temperature: of the draw.
            straight_through: give the logits the gradient of G; by default in training.
            calc_aux_loss: by default in training.
            deterministic: take each bit's likelier value; by default as `deterministic_on_eval` says.
            return_indices: also return the codes as indices.
            reduce_aux_kl_loss: the mean of the auxiliary loss, otherwise one for each vector.

        Returns:
            one_hot (..., 2^d), float32 (float64 with the gradient of float64 logits); indices int64 (...) if asked
            for; the auxiliary loss, [] or (...), 0 where it is not computed.

        Raises:
            ValueError: logits has another shape.
            TypeError: logits is not floating point.
        """
        self._check_logits(logits)
        logits = _widened(logits)
        if deterministic is None:
            deterministic = self.deterministic_on_eval and not self.training
        # a NaN counts as a zero bit: there is nothing to draw from
        probs = (logits / temperature).sigmoid().nan_to_num(0.0).detach()
        sampled = probs > 0.5 if deterministic else probs.bernoulli().bool()
        indices = (self.power_two * sampled).sum(dim=-1)
        one_hot = torch.zeros(*indices.shape, self.num_codes, device=logits.device)
        one_hot = one_hot.scatter(-1, indices[..., None], 1.0)
        if self.training if straight_through is None else straight_through:
            soft = self._probabilities(logits)
            one_hot = one_hot + (soft - soft.detach())
        wants_loss = self.training if calc_aux_loss is None else calc_aux_loss
        loss = self.calc_aux_loss(logits, reduce_aux_kl_loss) if wants_loss else torch.zeros((), device=logits.device)
        return (one_hot, indices, loss) if return_indices else (one_hot, loss)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """(..., d) -> G, (..., 2^d): each bit doubles the table of those before it."""
        ones, zeros = logsigmoid(logits), logsigmoid(-logits)
        table = logits.new_zeros(*logits.shape[:-1], 1)
        for bit in range(self.bits):
            table = torch.cat([table + zeros[..., bit, None], table + ones[..., bit, None]], dim=-1)
        return table.exp()

    def _bits(self, indices: Tensor) -> Tensor:
        return indices[..., None].bitwise_and(self.power_two) != 0

    def _check_logits(self, logits: Tensor) -> None:
        fits = logits.ndim > 0 and logits.shape[-1] == self.bits
        require(self, fits, f"logits is {tuple(logits.shape)}, expected (..., {self.bits})")
        check_floating(self, "logits", logits)


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
