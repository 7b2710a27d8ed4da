"""`sign_code_mean` against the softmax over all 2^d sign codes in float64; `test_sign_code_entropy` has the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ferrovae import use_backend
from ferrovae.ops import sign_code_mean


@pytest.fixture(params=["reference", "rust", "triton"])
def backend(request: pytest.FixtureRequest):
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield request.param


def distributions(x: Tensor, inv_temperature: float, scale: float) -> Tensor:
    """softmax over c in {-s, s}^d of 2 T <x, c>, the first bit most significant: [N, 2^d] in float64."""
    bits = x.shape[1]
    codes = (torch.arange(2**bits).unsqueeze(-1) >> torch.arange(bits - 1, -1, -1)) % 2 * 2 - 1
    return torch.softmax(2 * inv_temperature * scale * x.double() @ codes.double().T, -1)


@pytest.mark.parametrize("bits", [1, 6, 7])
def test_the_mean_distribution(backend: str, bits: int) -> None:
    x, mask = torch.randn(30, bits) / 10, torch.rand(30) < 0.5
    ours = sign_code_mean(x.view(5, 6, bits), 10.0, 0.5, mask=mask.view(5, 6))
    assert ours.shape == (2**bits,)
    torch.testing.assert_close(ours.double(), distributions(x, 10.0, 0.5)[mask].mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sign_code_mean(x, 10.0).sum(), torch.ones(()), rtol=1e-6, atol=1e-6)


def test_gradients_against_all_codes(backend: str) -> None:
    x, weights = torch.randn(9, 5) / 10, torch.randn(32)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    (sign_code_mean(ours, 10.0) * weights).sum().backward()
    (distributions(exact, 10.0, 1.0).mean(0) * weights).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_distribution_has_at_most_eighteen_bits() -> None:
    with pytest.raises(ValueError, match=r"^sign_code_mean: x is \(2, 19\), expected \(..., d\) with 1 <= d <= 18"):
        sign_code_mean(torch.zeros(2, 19))
