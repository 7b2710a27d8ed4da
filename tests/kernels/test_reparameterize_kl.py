"""The Triton kernels of `reparameterize_kl` in Triton's interpreter, against the float64 definition."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from ferrovae import ops, use_backend
from ferrovae.ops import _triton

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="Triton's interpreter runs where no GPU does"
)

# (rows, columns, dtype, samples, elementwise, strided): every pair of values of two of these occurs
CASES = [
    (0, 8, torch.float32, 1, False, False),
    (1, 1, torch.float32, 3, True, False),
    (3, 3, torch.bfloat16, 1, False, True),
    (17, 8, torch.float16, 2, True, True),
    (64, 32, torch.float32, 1, True, True),
    (127, 63, torch.float32, 2, False, False),
    (1000, 3, torch.float32, 1, False, True),
    (3, 256, torch.float16, 3, False, False),
    (1, 768, torch.bfloat16, 2, True, False),
    (2, 5000, torch.float32, 1, False, True),
    (2, 2049, torch.float32, 2, True, False),
    (5, 0, torch.float32, 1, False, False),
    (64, 1, torch.bfloat16, 1, True, True),
    (17, 63, torch.float32, 1, False, False),
]


def gradients(backend: str, inputs: list[Tensor], function) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with use_backend(backend):
        z, kl = function(*leaves)
    weights = [torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape) for out in (z, kl)]
    loss = (z.double() * weights[0]).sum() + (kl.double() * weights[1]).sum()
    return [z.detach(), kl.detach(), *torch.autograd.grad(loss, leaves)]


def compare(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for mine, expected in zip(ours, exact, strict=True):
        # The interpreter truncates where the hardware rounds: one unit in the last place of a half.
        tolerance = {torch.float16: 2**-9, torch.bfloat16: 2**-7}.get(mine.dtype, 1e-5)
        torch.testing.assert_close(mine.double(), expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize(("rows", "columns", "dtype", "samples", "elementwise", "strided"), CASES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_kernels(rows: int, columns: int, dtype: torch.dtype, samples: int, elementwise: bool, strided: bool) -> None:
    shape = (rows, 2 * columns + 3 if strided else columns)
    inputs = [torch.randn(shape).to(dtype)[:, shape[1] - columns :] for _ in range(2)]
    ids = torch.arange(rows) * (2**33 + 1) - 7
    options = {"seed": -(2**40) - 3, "num_samples": samples, "first_sample": 2**31, "example_ids": ids}
    options["kl_reduction"] = "element" if elementwise else "example"
    ours = gradients("triton", inputs, lambda m, v: ops.reparameterize_kl(m, v, **options))
    exact = gradients("reference", [x.double() for x in inputs], lambda m, v: ops.reparameterize_kl(m, v, **options))
    compare(ours, exact, dtype)


@pytest.mark.parametrize(("shape", "dim"), [((3, 4, 5), 1), ((3, 4, 6), 2), ((4, 3), 0), ((2, 3, 2, 700), 2)])
@pytest.mark.parametrize("kl_reduction", ["example", "element"])
def test_moments(shape: tuple[int, ...], dim: int, kl_reduction: str) -> None:
    moments = torch.randn(shape)

    def function(m: Tensor) -> tuple[Tensor, Tensor]:
        return ops.reparameterize_kl_from_moments(m, dim=dim, seed=1, kl_reduction=kl_reduction)

    compare(
        gradients("triton", [moments], function), gradients("reference", [moments.double()], function), torch.float32
    )


def test_each_gradient_alone_and_second_derivatives() -> None:
    inputs = [torch.randn(3, 5) for _ in range(2)]
    for output in (0, 1):
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            with use_backend(backend):
                out = ops.reparameterize_kl(*leaves, seed=1)[output]
            first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            results.append([x.detach().double() for x in (*first, *second)])
        for mine, exact in zip(*results, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


def test_noise_is_the_same_in_every_tile_and_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _triton.kernels("reparameterize_kl")
    zeros = torch.zeros(10, 130)
    draws = []
    for tile in ((4, 256), (8, 64), (2, 1024)):
        monkeypatch.setattr(kernels, "tile", lambda *_, tile=tile: tile)
        logvar = zeros.clone().requires_grad_()
        with use_backend("triton"):
            z, _ = ops.reparameterize_kl(zeros, logvar, seed=12)
        z.sum().backward()
        assert torch.equal(2 * logvar.grad, z.detach())
        draws.append(z.detach())
    with use_backend("rust"):
        draws.append(ops.reparameterize_kl(zeros, zeros, seed=12)[0])
    assert all(torch.equal(draw, draws[0]) for draw in draws[1:3])
    torch.testing.assert_close(draws[0], draws[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("extreme", [-80.0, 80.0])
def test_extreme_variances(extreme: float) -> None:
    inputs = [torch.randn(3, 5), torch.full((3, 5), extreme)]
    ours = gradients("triton", inputs, lambda m, v: ops.reparameterize_kl(m, v, seed=1))
    exact = gradients("reference", [x.double() for x in inputs], lambda m, v: ops.reparameterize_kl(m, v, seed=1))
    assert all(x.isfinite().all() for x in ours)
    compare(ours, exact, torch.float32)


def test_philox_known_answers() -> None:
    """Through the noise: the first normals of the all-zero key and counter, from the published words."""
    import math

    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    zeros = torch.zeros(1, 4)
    with use_backend("triton"):
        z, _ = ops.reparameterize_kl(zeros, zeros, seed=0)
    for pair in range(2):
        radius = math.sqrt(-2 * math.log(words[2 * pair] * 2.0**-32 + 2.0**-33))
        angle = 2 * math.pi * (words[2 * pair + 1] >> 8) * 2.0**-24
        assert z[0, 2 * pair].item() == pytest.approx(radius * math.cos(angle), abs=1e-6)
        assert z[0, 2 * pair + 1].item() == pytest.approx(radius * math.sin(angle), abs=1e-6)
