"""`code_cross_entropy` against -log softmax in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import code_cross_entropy
from ops.soft_codes import METRICS, assert_like_truth, scores, value_and_gradients

warned = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
BACKENDS = ["reference", "rust", pytest.param("triton", marks=warned)]


def truth(x, codebook, temperature, indices, metric):
    losses = -scores(x, codebook, temperature, metric).log_softmax(-1)
    chosen = losses.gather(-1, indices.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(indices < 0, 0.0, chosen)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", BACKENDS)
def test_values_and_gradients_against_float64(name: str, metric: str) -> None:
    x, codebook, indices = torch.randn(2, 9, 5), torch.randn(2, 40, 5), torch.randint(40, (2, 9))
    indices[0, 3], x[1, 2] = -1, codebook[1, indices[1, 2]]
    with use_backend(name):
        assert_like_truth(
            lambda x, codebook, temperature: code_cross_entropy(x, codebook, indices, temperature, metric),
            partial(truth, indices=indices, metric=metric),
            (x, codebook, torch.tensor(0.6)),
        )


def test_derivatives() -> None:
    indices = torch.tensor([0, -1, 2])
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4, 2), ())]
    function = lambda x, codebook, t: code_cross_entropy(x, codebook, indices, t.square() + 0.5)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)


def test_a_row_without_index_costs_nothing_and_moves_nothing() -> None:
    x, codebook, temperature = torch.randn(4, 3), torch.randn(6, 3), torch.tensor(1.0)
    x[2, 0] = float("nan")
    value, *gradients = value_and_gradients(
        lambda x, codebook, t: code_cross_entropy(x, codebook, torch.full((4,), -1), t), (x, codebook, temperature),
        torch.float32,
    )  # fmt: skip
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in (value, *gradients))


def test_what_is_not_finite_has_no_gradient() -> None:
    x, codebook = torch.randn(3, 2), torch.randn(5, 2)
    x[1, 0], codebook[4, 1] = float("nan"), float("inf")
    leaves = [tensor.requires_grad_() for tensor in (x, codebook, torch.tensor(0.7))]
    losses = code_cross_entropy(leaves[0], leaves[1], torch.tensor([0, 1, 4]), leaves[2])
    assert losses.isfinite().tolist() == [True, False, False]
    assert losses[1].isnan()
    assert losses[2] == torch.inf
    of_x, of_codes, of_temperature = torch.autograd.grad(losses.sum(), leaves)
    assert torch.equal(of_x[1:], torch.zeros(2, 2))
    assert of_codes.isfinite().all()
    assert of_temperature.isfinite()


@pytest.mark.slow
def test_compiled_once_for_all_batch_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, codebook = CompileCounterWithBackend("aot_eager"), torch.randn(9, 4)
    compiled = torch.compile(code_cross_entropy, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for size in (7, 3, 20, 11, 64):
        x, indices = torch.randn(size, 4), torch.randint(9, (size,))
        torch.testing.assert_close(compiled(x, codebook, indices), code_cross_entropy(x, codebook, indices))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_no_rows() -> None:
    indices = torch.empty(2, 0, dtype=torch.int64)
    assert code_cross_entropy(torch.empty(2, 0, 3), torch.randn(4, 3), indices).shape == (2, 0)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([0, 1, 4]), ValueError, "indices hold 4, expected -1 to 3"),
        (torch.tensor([0, -2, 1]), ValueError, "indices hold -2, expected -1 to 3"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"indices are \(2,\), expected \(3,\) to match x"),
        (torch.zeros(3), TypeError, "indices are torch.float32, expected int64"),
        ([0, 1, 2], TypeError, "indices is a list, expected a tensor"),
    ],
)
def test_errors_name_the_argument(indices, error, message) -> None:
    with pytest.raises(error, match=f"^code_cross_entropy: {message}"):
        code_cross_entropy(torch.zeros(3, 2), torch.zeros(4, 2), indices)
    with pytest.raises(ValueError, match=r"^code_cross_entropy: temperature is 0"):
        code_cross_entropy(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64), 0)
