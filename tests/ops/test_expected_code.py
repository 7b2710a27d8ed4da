"""`expected_code` against softmax times codebook in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import _code_softmax, expected_code
from ops.soft_codes import METRICS, assert_like_truth, scores

warned = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(params=["reference", "rust", pytest.param("triton", marks=warned)])
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def truth(x, codebook, temperature, metric="euclidean"):
    return scores(x, codebook, temperature, metric).softmax(-1) @ codebook.to(torch.float64)


def compare(inputs: tuple[torch.Tensor, ...], metric: str, tolerance: float = 2e-5) -> None:
    assert_like_truth(partial(expected_code, metric=metric), partial(truth, metric=metric), inputs, tolerance)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("metric", METRICS)
def test_values_and_gradients_against_float64(backend: str, metric: str) -> None:
    x, codebook = torch.randn(2, 9, 5), torch.randn(2, 40, 5)
    x[1, 2] = codebook[1, 7]
    compare((x, codebook, torch.tensor(0.6)), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_many_blocks(monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    monkeypatch.setattr(_code_softmax, "BLOCK", 64)
    monkeypatch.setattr(_code_softmax, "_CODES", 16)
    for name in ("reference", "rust"):
        with use_backend(name):
            compare((torch.randn(13, 3), torch.randn(37, 3), torch.tensor(0.6)), metric)


def test_offset_of_100_standard_deviations() -> None:
    compare((torch.randn(20, 4) + 100, torch.randn(50, 4) + 100, torch.tensor(0.7)), "euclidean", 1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_derivatives(metric: str) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4, 2))]
    inputs.append(torch.tensor(0.8, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(partial(expected_code, metric=metric), inputs)


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(expected_code(x, torch.randn(4, 2)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected_code: differentiable once"):
        slope.sum().backward()


def test_limits_of_temperature() -> None:
    x, codebook = torch.randn(6, 3), torch.randn(20, 3)
    cold, hot = expected_code(x, codebook, 1e-4), expected_code(x, codebook, 1e6)
    torch.testing.assert_close(cold, codebook[torch.cdist(x, codebook).argmin(1)])
    torch.testing.assert_close(hot, codebook.mean(0).expand(6, 3), rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_is_left_out(backend: str) -> None:
    x, codebook = torch.randn(4, 2), torch.randn(6, 2)
    x[1, 0], codebook[3, 1] = float("nan"), float("inf")
    leaves = [tensor.requires_grad_() for tensor in (x, codebook, torch.tensor(0.7))]
    found = expected_code(*leaves)
    assert found.isnan().all(1).tolist() == [False, True, False, False]
    rest = torch.arange(6) != 3
    due = truth(x.detach()[[0, 2, 3]], codebook.detach()[rest], 0.7)
    torch.testing.assert_close(found.detach()[[0, 2, 3]].double(), due, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(gradients[0][1], torch.zeros(2))
    assert torch.equal(gradients[1][3], torch.zeros(2))


def test_shapes_and_dtypes() -> None:
    codebook = torch.randn(6, 4)
    assert expected_code(torch.empty(2, 0, 4), codebook).shape == (2, 0, 4)
    assert expected_code(torch.randn(4), codebook).shape == (4,)
    half = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    expected_code(half, codebook).sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert expected_code(half.double(), codebook).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        under = expected_code(half.float(), codebook)
    assert torch.equal(under, expected_code(half.float(), codebook))


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck() -> None:
    leaves = [torch.randn(shape).requires_grad_() for shape in ((2, 5, 3), (2, 6, 3), (2, 6, 3))]
    temperature = torch.tensor(0.5, requires_grad=True)
    torch.library.opcheck(torch.ops.ferrovae.expected_code.default, (*leaves, temperature, "euclidean", "auto"))


@pytest.mark.slow
def test_compiled_once_for_all_batch_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, codebook = CompileCounterWithBackend("aot_eager"), torch.randn(9, 4)
    compiled = torch.compile(expected_code, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for size in (7, 3, 20, 11, 64):
        x = torch.randn(size, 4, requires_grad=True)
        found, due = compiled(x, codebook), expected_code(x, codebook)
        torch.testing.assert_close(found, due)
        slopes = [torch.autograd.grad(value.square().sum(), x)[0] for value in (found, due)]
        torch.testing.assert_close(*slopes)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"^expected_code: codebook is \(4, 3\), expected \(K, 2\)"):
        expected_code(torch.zeros(3, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"^expected_code: temperature is -1.0"):
        expected_code(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor(-1.0))
