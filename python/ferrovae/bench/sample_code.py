"""`sample_code` beside Gumbel-max and multinomial draws from the N x K matrix, and its own reference in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ferrovae import ops
from ferrovae.bench.case import Case, Work

SHAPES: list[dict[str, int]] = [
    {"N": 8192, "K": 1024, "D": 64},
    {"N": 65536, "K": 1024, "D": 8},
    {"N": 2048, "K": 16384, "D": 8},
    {"N": 2048, "K": 8192, "D": 256},
]
_MATRIX_LIMIT = 2**29  # bytes of N x K that a provider may hold
_CHECKED_ROWS = 512
_SEED = 5


def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]:
    """Standard normal rows and codes, at a temperature that leaves many codes possible and at a low one."""
    rows, codes, dims = shape["N"], shape["K"], shape["D"]
    generator = torch.Generator().manual_seed(rows + codes + dims)
    x = torch.randn(rows, dims, generator=generator).to(device)
    codebook = torch.randn(codes, dims, generator=generator).to(device)
    for temperature in (1.0, 0.02):
        providers = {"ferrovae": _provider(ours, x, codebook, temperature)}
        if 4 * rows * codes <= _MATRIX_LIMIT:
            providers["eager"] = _provider(eager, x, codebook, temperature)
            providers["multinomial"] = _provider(multinomial, x, codebook, temperature)
        providers["reference"] = _provider(reference, x, codebook, temperature)
        yield Case(
            operation="sample_code",
            shape=shape,
            providers=providers,
            check=_check(x, codebook, temperature),
            variant=f"temperature {temperature:g}",
            work=Work(bytes=4.0 * dims * (rows + codes) + 8 * rows, flops=2.0 * rows * codes * dims),
            targets={"reference": 1.0},
            memory_limit=2**26,
            heavy=float(rows) * codes * dims > 1e9,
        )


def ours(x: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """The operation."""
    return ops.sample_code(x, codebook, temperature, _SEED)


def eager(x: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Gumbel-max over all N x K scores at once."""
    scores = torch.cdist(x, codebook) / -temperature
    return (scores - torch.empty_like(scores).exponential_().log()).argmax(1)


def multinomial(x: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Probabilities, then torch's sampler."""
    return (torch.cdist(x, codebook) / -temperature).softmax(1).multinomial(1).squeeze(1)


def reference(x: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Ours, on plain torch."""
    with ops.use_backend("reference"):
        return ours(x, codebook, temperature)


def _provider(
    function: Callable[[Tensor, Tensor, float], Tensor], x: Tensor, codebook: Tensor, temperature: float
) -> Callable[[], object]:
    return lambda: function(x, codebook, temperature)


def _check(x: Tensor, codebook: Tensor, temperature: float) -> Callable[[str, object], bool]:
    """The mean over some rows of the score drawn, against its expectation: within 6 standard errors, in float64."""
    count = min(x.shape[0], _CHECKED_ROWS, 2**23 // codebook.shape[0])  # none twice: they must be independent
    some = torch.linspace(0, x.shape[0] - 1, count, device=x.device).long()
    far = torch.cdist(x[some].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    scores = far / -temperature
    p = scores.softmax(1)
    mean = (p * scores).sum(1)
    variance = (p * scores.square()).sum(1) - mean.square()
    allowed = 6 * variance.sum().clamp(min=0).sqrt() + 1e-3 * some.numel()

    def check(_: str, result: object) -> bool:
        if not isinstance(result, Tensor) or result.dtype != torch.int64:
            return False
        drawn = scores.gather(1, result[some].unsqueeze(1)).squeeze(1)
        return bool(((drawn - mean).sum().abs() <= allowed).item())

    return check
