"""The Triton kernels of `reparameterize_kl` with a learned prior, and their offsets, in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from ferrovae import ops, use_backend
from ferrovae.ops import _triton
from kernels.test_reparameterize_kl import compare, gradients

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="Triton's interpreter runs where no GPU does"
)

F, B, H = torch.float32, torch.bfloat16, torch.float16
# rows, columns, dtype, the prior's dtype, whether prior_mean and prior_logvar are shared (None: absent), element KL:
# every pair of values of two of these occurs, as far as it can
CASES = [
    (1, 3, F, F, True, True, False),
    (17, 8, H, F, True, True, True),
    (300, 5, F, F, True, True, False),  # several runs of tiles
    (3, 600, B, B, True, None, True),
    (64, 63, F, F, False, False, True),
    (3, 256, B, F, False, False, False),
    (5, 32, H, H, False, True, False),
    (17, 3, F, F, None, True, True),
    (2, 2100, F, F, True, False, False),
    (0, 8, F, F, True, False, True),
]


@pytest.mark.parametrize(("rows", "columns", "dtype", "own", "mean_shared", "logvar_shared", "elementwise"), CASES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_prior(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    own: torch.dtype,
    mean_shared: bool | None,
    logvar_shared: bool | None,
    elementwise: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_triton.kernels("reparameterize_kl"), "RUNS", 2)
    given = {"prior_mean": mean_shared, "prior_logvar": logvar_shared}
    shapes = {name: (1 if shared else rows, columns) for name, shared in given.items() if shared is not None}
    inputs = [torch.randn(rows, columns).to(dtype) for _ in range(2)]
    inputs += [torch.randn(shape).to(own) for shape in shapes.values()]
    options = {"seed": 5, "num_samples": 2, "kl_reduction": "element" if elementwise else "example"}

    def function(m: Tensor, v: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
        return ops.reparameterize_kl(m, v, **dict(zip(shapes, prior, strict=True)), **options)

    ours = gradients("triton", inputs, function)
    exact = gradients("reference", [x.double() for x in inputs], function)
    compare(ours[:4], exact[:4], dtype)
    for mine, due in zip(ours[4:], exact[4:], strict=True):  # sums over the rows: beside the largest of them
        assert mine.dtype == own
        scale = (float(due.abs().max()) if due.numel() else 0.0) or 1.0
        compare([mine / scale], [due / scale], own)


def test_moments_with_a_prior_of_channels() -> None:
    inputs = [torch.randn(3, 4, 5), torch.randn(2, 1), torch.randn(2, 1)]

    def function(m: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return ops.reparameterize_kl_from_moments(m, seed=1, prior_mean=mean, prior_logvar=logvar)

    ours = gradients("triton", inputs, function)
    compare(ours, gradients("reference", [x.double() for x in inputs], function), torch.float32)


def test_small_kl_keeps_its_digits() -> None:
    logvar = torch.full((1, 200), 1e-3)
    prior = torch.full((1, 200), 0.5)
    exact = 100 * (torch.expm1(logvar[0, 0].double()) - logvar[0, 0].double())
    with use_backend("triton"):
        _, standard = ops.reparameterize_kl(torch.zeros_like(logvar), logvar, seed=0)
        _, learned = ops.reparameterize_kl(prior, logvar + prior, seed=0, prior_mean=prior, prior_logvar=prior)
    assert standard.item() == pytest.approx(exact.item(), abs=1e-8)
    assert learned.item() == pytest.approx(exact.item(), abs=5e-8)  # logvar + prior is rounded


def test_offsets_beyond_2_31_elements() -> None:
    """The rows, and the addresses computed from them, of tiles far down tensors that no test could hold."""
    from kernels.reparameterize_kl_offsets import probe

    module = _triton.kernels("reparameterize_kl")
    for columns, inner, row_stride, segment_stride, tile in (
        (3000, 3000, 6000, 0, 2_900_000),
        (64, 16, 128, 32, 2_000_000),
        (8, 8, 2_000_000_000, 0, 77),
        (4096, 1, 8192, 2_000_000, 1001),
    ):
        block_n, block_d = module.tile(columns)
        out, out_rows = (torch.zeros(block_n, block_d, dtype=torch.int64) for _ in range(2))
        probe[(1,)](
            out,
            out_rows,
            tile,
            columns,
            inner,
            row_stride,
            segment_stride,
            SEGMENTED=inner != columns,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
        blocks = -(-columns // block_d)
        rows = tile // blocks * block_n + torch.arange(block_n)[:, None]
        cols = tile % blocks * block_d + torch.arange(block_d)[None, :]
        due = rows * row_stride + cols // inner * segment_stride + cols % inner
        assert int(due.max()) > 2**31
        assert torch.equal(out, due)
        assert torch.equal(out_rows, rows * columns + cols)
