"""The Triton kernels on a real GPU against the float64 reference: what `make gpu-check` runs."""

from __future__ import annotations

import pytest
import torch

from ferrovae import ops, use_backend
from gpu.examples import compare, examples, results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPES = [(1, 1), (3, 17), (64, 63), (127, 256), (1000, 32)]
SEED = torch.tensor([11])


@pytest.mark.filterwarnings("ignore::ferrovae.ops.BackendWarning")  # without a kernel of its own yet
@pytest.mark.parametrize("name", sorted(examples()))
def test_float32_agrees_with_the_float64_reference(name: str) -> None:
    example = examples()[name]
    truth = results(example, "cpu", torch.float64, "reference")
    compare(example, results(example, "cuda", torch.float32, "auto"), truth)


@pytest.mark.parametrize("name", sorted(set(examples()) & {"code_sums", "nearest_code", "reparameterize_kl"}))
def test_is_the_same_twice(name: str) -> None:
    example = examples()[name]
    first, second = (results(example, "cuda", torch.float32, "auto") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reparameterize_kl(rows: int, columns: int, dtype: torch.dtype) -> None:
    values = [torch.randn(rows, columns).to(dtype) for _ in range(2)]
    results = []
    for device, work, backend in (("cuda", dtype, "triton"), ("cpu", torch.float64, "reference")):
        leaves = [value.to(device, work).requires_grad_() for value in values]
        with use_backend(backend):
            z, kl = ops.reparameterize_kl(*leaves, seed=SEED.to(device))
            (z.double().square().sum() + kl.double().sum()).backward()
        results.append([tensor.detach().cpu().double() for tensor in (z, kl, *(leaf.grad for leaf in leaves))])
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("columns", [1, 3, 8, 32, 63, 256, 768])
@pytest.mark.parametrize("codes", [1, 17, 1000])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_nearest_code_is_exact(codes: int, columns: int, metric: str) -> None:
    x, codebook = torch.randn(513, columns) + 3, torch.randn(codes, columns) + 3
    with use_backend("reference"):
        truth = ops.nearest_code(x, codebook, metric=metric)
    with use_backend("triton"):
        ours = ops.nearest_code(x.cuda(), codebook.cuda(), metric=metric)
    assert torch.equal(ours.cpu(), truth)


def test_nearest_code_with_duplicates_offsets_and_nan() -> None:
    codebook = torch.randn(64, 16).repeat(2, 1) * 1e-2 + 1000
    x = codebook[torch.randint(128, (2000,))] + torch.randn(2000, 16) * 1e-2
    x[5, 3] = float("nan")
    with use_backend("reference"):
        truth = ops.nearest_code(x, codebook)
    assert torch.equal(ops.nearest_code(x.cuda(), codebook.cuda()).cpu(), truth)
    assert int(truth.max()) < 64


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bernoulli_log_prob(rows: int, columns: int) -> None:
    x, logits = torch.rand(rows, columns), torch.randn(rows, columns) * 5
    ours = logits.cuda().requires_grad_()
    truth = logits.double().requires_grad_()
    value = ops.bernoulli_log_prob(x.cuda(), ours)
    with use_backend("reference"):
        expected = ops.bernoulli_log_prob(x.double(), truth)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.grad.cpu().double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_replayed_graph_draws_new_noise() -> None:
    mean = torch.zeros(8, 4, device="cuda")
    for _ in range(3):
        ops.reparameterize_kl(mean, mean)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, _ = ops.reparameterize_kl(mean, mean)
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(first, z)
