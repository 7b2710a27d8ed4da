"""The distances of `nearest_code`: their values, their gradients, and how they register with torch."""

from __future__ import annotations

import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import nearest_code
from ferrovae.ops._registry import operations
from ferrovae.ops.nearest_code_distances import nearest_code_distances

METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")
BACKENDS = ("reference", "rust", "triton")


def metric_of(x: torch.Tensor, e: torch.Tensor, metric: str) -> torch.Tensor:
    if metric == "dot":
        return -(x * e).sum(-1)
    if metric == "cosine":
        return 1 - (x * e).sum(-1) / (x.norm(dim=-1) * e.norm(dim=-1))
    return (x - e).square().sum(-1) if metric == "sqeuclidean" else (x - e).norm(dim=-1)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_float32_of_the_metric_in_float64(metric, backend):
    x, codebook = torch.randn(4, 5, 33) + 100, torch.randn(7, 33) + 100
    with use_backend(backend):
        indices, distances = nearest_code(x, codebook, metric=metric, return_distances=True)
    assert distances.dtype == torch.float32
    expected = metric_of(x.double(), codebook.double()[indices], metric)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_both_orders(metric):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    indices = nearest_code(x, codebook, topk=2)

    def distances(x, codebook):
        return nearest_code_distances(x, codebook, indices, metric)

    assert torch.autograd.gradcheck(distances, (x, codebook))
    assert torch.autograd.gradgradcheck(distances, (x, codebook))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_gradient_is_zero_where_it_is_not_defined(metric):
    x = torch.randn(5, 3)
    codebook = x.clone()
    x[1], x[2, 0], codebook[3] = 0.0, float("nan"), 0.0
    x.requires_grad_(), codebook.requires_grad_()
    _, distances = nearest_code(x, codebook, metric=metric, return_distances=True)
    assert distances[2].isnan()
    distances.nansum().backward()
    assert x.grad.isfinite().all()
    assert codebook.grad.isfinite().all()
    if metric == "euclidean":
        assert (x.grad[[0, 2, 4]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_keep_the_dtype_and_reach_the_winners_only(dtype):
    x = torch.randn(6, 3).to(dtype).requires_grad_()
    codebook = torch.randn(9, 3, requires_grad=True)
    indices, distances = nearest_code(x, codebook, metric="sqeuclidean", return_distances=True)
    distances.sum().backward()
    expected = 2 * (x.detach().double() - codebook.detach().double()[indices])
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    losers = torch.ones(9, dtype=torch.bool)
    losers[indices] = False
    assert x.grad.dtype == dtype
    assert (codebook.grad[losers] == 0).all()


def test_codes_with_a_nan_are_infinitely_far():
    codebook = torch.tensor([[float("nan")], [1.0]])
    indices, distances = nearest_code(torch.tensor([[0.0], [float("nan")]]), codebook, return_distances=True, topk=2)
    assert indices.tolist() == [[1, 0], [0, 1]]
    assert distances[0].tolist() == [1.0, float("inf")]
    assert distances[1].isnan().all()


# opcheck reads .grad of non-leaf tensors and only hides the warning, which is an error here.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_opcheck(backend):
    x, codebook = torch.randn(2, 5, 3), torch.randn(2, 7, 3)
    torch.library.opcheck(operations["nearest_code"].overload, (x, codebook, "euclidean", 2, "exact", backend))
    indices = torch.randint(7, (2, 5, 2))
    for rows in (x, torch.randn(2, 3, 5).mT.detach()):
        arguments = (rows.requires_grad_(), codebook.clone().requires_grad_(), indices, "cosine", backend)
        torch.library.opcheck(operations["nearest_code_distances"].overload, arguments)


def test_compiles_in_one_graph():
    def loss(x, codebook):
        indices, distances = nearest_code(x, codebook, return_distances=True)
        return indices, distances.sum()

    leaves = [torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)]
    expected = loss(*leaves)
    indices, total = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(indices, expected[0])
    ours, truth = torch.autograd.grad(total, leaves), torch.autograd.grad(expected[1], leaves)
    torch.testing.assert_close(ours, truth)
