"""`mean_code_entropy` against the entropy of the mean softmax in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import _code_softmax, mean_code_entropy
from ops.soft_codes import METRICS, assert_like_truth, scores

warned = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(params=["reference", "rust", pytest.param("triton", marks=warned)])
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def truth(x, codebook, temperature, metric="euclidean"):
    mean = (
        scores(x, codebook.unsqueeze(-3) if codebook.ndim == 3 else codebook, temperature, metric).softmax(-1).mean(-2)
    )
    return -torch.xlogy(mean, mean).sum(-1)


def compare(inputs: tuple[torch.Tensor, ...], metric: str, tolerance: float = 2e-5) -> None:
    assert_like_truth(partial(mean_code_entropy, metric=metric), partial(truth, metric=metric), inputs, tolerance)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("metric", METRICS)
def test_values_and_gradients_against_float64(backend: str, metric: str) -> None:
    compare((torch.randn(2, 3, 4, 5), torch.randn(2, 40, 5), torch.tensor(0.6)), metric)


@pytest.mark.parametrize(("groups", "rows", "codes"), [(1, 50, 37), (20, 3, 37), (7, 1, 5), (3, 9, 200)])
def test_many_blocks(monkeypatch: pytest.MonkeyPatch, groups: int, rows: int, codes: int) -> None:
    monkeypatch.setattr(_code_softmax, "BLOCK", 128)
    monkeypatch.setattr(_code_softmax, "_CODES", 16)
    for name in ("reference", "rust"):
        with use_backend(name):
            compare((torch.randn(groups, rows, 3), torch.randn(codes, 3), torch.tensor(0.6)), "euclidean", 1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_derivatives(metric: str) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 2), (4, 2))]
    inputs.append(torch.tensor(0.8, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(partial(mean_code_entropy, metric=metric), inputs)


def test_bounds() -> None:
    codebook = torch.randn(50, 3)
    assert mean_code_entropy(codebook, codebook, 1e-3).item() == pytest.approx(math.log(50), abs=1e-5)
    assert mean_code_entropy(codebook[7].expand(20, 3), codebook, 1e-3).item() == pytest.approx(0, abs=1e-5)
    assert mean_code_entropy(codebook, codebook, 1e6).item() == pytest.approx(math.log(50), abs=1e-5)


def test_a_group_of_one_row_has_the_entropy_of_its_softmax() -> None:
    x, codebook = torch.randn(6, 3), torch.randn(9, 3)
    p = scores(x, codebook, 0.5, "euclidean").softmax(-1)
    found = mean_code_entropy(x.unsqueeze(1), codebook, 0.5)
    torch.testing.assert_close(found.double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_left_out(backend: str) -> None:
    x, codebook = torch.randn(2, 5, 2), torch.randn(6, 2)
    x[0, 1, 0], x[0, 3, 1], codebook[3, 1] = float("nan"), float("inf"), float("inf")
    leaves = [tensor.requires_grad_() for tensor in (x, codebook, torch.tensor(0.7))]
    found = mean_code_entropy(*leaves)
    rest = torch.arange(6) != 3
    for group, kept in ((0, [0, 2, 4]), (1, [0, 1, 2, 3, 4])):
        due = truth(x.detach()[group, kept], codebook.detach()[rest], 0.7)
        assert found[group].item() == pytest.approx(due.item(), abs=1e-5)
    gradients = torch.autograd.grad(found.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(gradients[0][0, [1, 3]], torch.zeros(2, 2))


def test_no_rows_and_dtypes() -> None:
    codebook = torch.randn(6, 4, requires_grad=True)
    assert mean_code_entropy(torch.empty(3, 0, 4), codebook).tolist() == [0.0] * 3
    assert mean_code_entropy(torch.empty(0, 3, 4), codebook).shape == (0,)
    x = torch.randn(5, 4)
    assert mean_code_entropy(x, codebook).shape == ()
    assert mean_code_entropy(x.double(), codebook).dtype == torch.float64
    assert mean_code_entropy(x.half(), codebook).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        under = mean_code_entropy(x, codebook)
    assert torch.equal(under, mean_code_entropy(x, codebook))


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck() -> None:
    leaves = [torch.randn(shape).requires_grad_() for shape in ((2, 3, 5, 3), (2, 6, 3), ())]
    leaves[2] = leaves[2].detach().abs().requires_grad_()
    torch.library.opcheck(torch.ops.ferrovae.mean_code_entropy.default, (*leaves, "euclidean", "auto"))


@pytest.mark.slow
def test_compiled_once_for_all_batch_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, codebook = CompileCounterWithBackend("aot_eager"), torch.randn(9, 4)
    compiled = torch.compile(mean_code_entropy, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for size in (7, 3, 20, 11, 64):
        x = torch.randn(size, 4)
        torch.testing.assert_close(compiled(x, codebook), mean_code_entropy(x, codebook))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"^mean_code_entropy: x is \(2,\), expected \(..., M, D\)"):
        mean_code_entropy(torch.zeros(2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"^mean_code_entropy: x is \(3, 2\), expected \(H, ..., M, D\)"):
        mean_code_entropy(torch.zeros(3, 2), torch.zeros(3, 4, 2))
    with pytest.raises(ValueError, match=r"^mean_code_entropy: temperature is 0"):
        mean_code_entropy(torch.zeros(3, 2), torch.zeros(4, 2), 0)
