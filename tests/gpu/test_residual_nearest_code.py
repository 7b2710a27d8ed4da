"""The Triton kernels of `residual_nearest_code` on a real GPU against the float64 reference, to the bit."""

from __future__ import annotations

import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import _triton, residual_nearest_code

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("launches", ["staged", "fused"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize(("codes", "columns"), [(1, 1), (17, 3), (1000, 8), (300, 32), (300, 63), (64, 256)])
def test_equal_to_the_reference(codes, columns, metric, launches, monkeypatch):
    if launches == "staged":
        monkeypatch.setattr(_triton.kernels("residual_nearest_code_fused"), "ROWS", 0)
    x, books = torch.randn(2, 513, columns) + 3, torch.randn(2, 4, codes, columns)
    x[0, 7, 0] = float("nan")
    # Duplicates: such rows are never certified.
    books[:, :, codes // 2 :] = books[:, :, : codes - codes // 2].clone()
    stages = torch.randint(0, 5, (2, 513))
    found = []
    for device, backend in (("cuda", "triton"), ("cpu", "reference")):
        leaf = books.to(device).requires_grad_()
        with use_backend(backend):
            results = residual_nearest_code(
                x.to(device), leaf, metric=metric, stages=stages.to(device), return_stages=True
            )
            (slope,) = torch.autograd.grad(results[1].nan_to_num().square().sum(), leaf)
        found.append([result.detach().cpu() for result in results])
        found[-1].append(slope.cpu())
    for ours, truth in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(ours, truth)
    torch.testing.assert_close(found[0][3], found[1][3], rtol=1e-6, atol=1e-6)


def test_gradients_are_the_same_every_time():
    x, books = torch.randn(5000, 8, device="cuda"), torch.randn(3, 16, 8, device="cuda", requires_grad=True)
    slopes = []
    for _ in range(3):
        slopes.append(torch.autograd.grad(residual_nearest_code(x, books)[1].sin().sum(), books)[0])
    assert torch.equal(slopes[0], slopes[1])
    assert torch.equal(slopes[0], slopes[2])


def test_replayed_graph():
    x, books = torch.randn(100, 8, device="cuda"), torch.randn(3, 16, 8, device="cuda")
    residual_nearest_code(x, books)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, quantized = residual_nearest_code(x, books)
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = residual_nearest_code(x, books)
    assert torch.equal(indices, expected[0])
    assert torch.equal(quantized, expected[1])
