"""`categorical_log_prob` against float64 log-softmax: shapes, classes that cannot be, derivatives, bad classes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ferrovae import use_backend
from ferrovae.ops import categorical_log_prob

INF = math.inf
SHAPES = [(3, 1), (3, 10), (2, 300), (3, 2, 5), (2, 7, 15), (2, 3, 16), (2, 256, 3, 3), (2, 5, 4, 70)]


@pytest.fixture(params=["reference", "rust"])
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def draw(*shape: int, batch_dims: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    events = shape[:batch_dims] + shape[batch_dims + 1 :]
    return torch.randint(0, shape[batch_dims], events), 5 * torch.randn(shape)


def truth(x: torch.Tensor, logits: torch.Tensor, batch_dims: int = 1) -> torch.Tensor:
    table = logits.double().log_softmax(batch_dims)
    index = x.long().expand(logits.shape[:batch_dims] + logits.shape[batch_dims + 1 :]).unsqueeze(batch_dims)
    chosen = table.gather(batch_dims, index).squeeze(batch_dims)
    return chosen.sum(tuple(range(batch_dims, chosen.ndim))) if chosen.ndim > batch_dims else chosen


def gradient(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((value * torch.arange(1, len(value) + 1)).sum(), logits)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_against_float64(backend: str, shape: tuple[int, ...]) -> None:
    x, logits = draw(*shape)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        leaf = logits.to(dtype).requires_grad_()
        exact = leaf.detach().double().requires_grad_()
        value, expected = categorical_log_prob(x, leaf), truth(x, exact)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        relative = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(value.double(), expected, rtol=relative, atol=relative)
        step = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 2 * relative)
        mine, theirs = gradient(value, leaf), gradient(expected, exact)
        torch.testing.assert_close(mine.double(), theirs, rtol=step, atol=1e-7 if step > 1e-5 else 1e-9)


def test_a_confident_position_keeps_its_digits(backend: str) -> None:
    logits = torch.tensor([[20.0, 0.0, 1.0], [60.0, 0.0, 10.0]], requires_grad=True)
    value = categorical_log_prob(torch.tensor([0, 0]), logits)
    rest = [math.exp(-20) + math.exp(-19), math.exp(-60) + math.exp(-50)]
    assert value.tolist() == pytest.approx([-math.log1p(rest[0]), 0], rel=1e-6, abs=1e-20)
    value.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].item() == pytest.approx(rest[0], rel=1e-6)


def test_infinite_logits(backend: str) -> None:
    cases = [
        ([-INF, 1.0, 1.0], 1, -math.log(2), [0.0, 0.5, -0.5]),
        ([-INF, 1.0, 1.0], 0, -INF, [1.0, -0.5, -0.5]),
        ([INF, 1.0, 2.0], 0, 0.0, [0.0, 0.0, 0.0]),
        ([INF, 1.0, -INF], 1, -INF, [-1.0, 1.0, 0.0]),
        ([INF, INF, 0.0], 1, -math.log(2), [-0.5, 0.5, 0.0]),
    ]
    for row, x, expected, slopes in cases:
        logits = torch.tensor([row], requires_grad=True)
        value = categorical_log_prob(torch.tensor([x]), logits)
        assert value.item() == pytest.approx(expected)
        value.backward()
        assert logits.grad is not None
        assert logits.grad[0].tolist() == pytest.approx(slopes, abs=1e-6)


def test_nan_spoils_its_own_row_only(backend: str) -> None:
    for shape in ((4, 5), (4, 5, 30)):
        x, logits = draw(*shape)
        logits[1, 3] = math.nan
        logits[2] = -INF
        assert categorical_log_prob(x, logits).isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (3, 5, 0), (1, 1)])
def test_empty_and_single(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    logits = torch.randn(shape, requires_grad=True)
    value = categorical_log_prob(x, logits)
    assert value.tolist() == [0.0] * shape[0]
    value.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == shape


def test_samples_share_their_data_and_batches_of_any_rank(backend: str) -> None:
    x, logits = draw(5, 3, 4, 6, batch_dims=2)
    for data in (x[0], x[:1], x[:1].expand(5, 3, 6)):
        torch.testing.assert_close(
            categorical_log_prob(data, logits, batch_dims=2).double(), truth(x[0], logits, 2), rtol=1e-6, atol=1e-6
        )
    every = categorical_log_prob(x[0], logits.movedim(2, 3), batch_dims=3)
    torch.testing.assert_close(every.double(), truth(x[0], logits.movedim(2, 3), 3), rtol=1e-6, atol=1e-6)
    assert categorical_log_prob(torch.tensor(2), torch.zeros(3), batch_dims=0).item() == pytest.approx(-math.log(3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_other_classes_and_strides(backend: str, dtype: torch.dtype) -> None:
    x, logits = torch.randint(0, 2, (4, 6)), torch.randn(4, 2, 6)
    expected = categorical_log_prob(x, logits)
    strided = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(categorical_log_prob(x.T.contiguous().T.to(dtype), strided), expected)


def test_every_result_is_written(backend: str, nan_filled_empty: None) -> None:
    for shape in SHAPES:
        x, logits = draw(*shape)
        logits.requires_grad_()
        value = categorical_log_prob(x, logits)
        assert value.isfinite().all()
        assert gradient(value, logits).isfinite().all()


def test_derivatives_of_first_and_second_order(backend: str) -> None:
    for shape in ((3, 4), (2, 3, 5)):
        x, logits = draw(*shape)
        leaf = logits.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda leaf, x=x: categorical_log_prob(x, leaf), leaf)
        assert torch.autograd.gradgradcheck(lambda leaf, x=x: categorical_log_prob(x, leaf), leaf)


def test_threads_change_no_bit_and_autocast_nothing() -> None:
    x, logits = draw(40, 9, 200)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = logits.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                value = categorical_log_prob(x, leaf)
            results.append((value, gradient(value, leaf)))
    finally:
        torch.set_num_threads(threads)
    for value, slopes in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(slopes, results[0][1])
    assert torch.equal(categorical_log_prob(x, logits), results[0][0])


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "case",
    ["samples", *(pytest.param(case, marks=pytest.mark.slow) for case in ("plain", "strided", "empty", "bytes"))],
)
def test_opcheck(case: str) -> None:
    x, logits = draw(4, 3, 5)
    x, logits, batch_dims = {
        "plain": (x, logits, 1),
        "samples": (x, torch.randn(2, 4, 3, 5), 2),
        "strided": (x.T.contiguous().T, logits.transpose(0, 2).contiguous().transpose(0, 2), 1),
        "empty": (x[:0], logits[:0], 1),
        "bytes": (x.to(torch.uint8), logits, 1),
    }[case]
    grad = torch.randn(logits.shape[:batch_dims]).requires_grad_()
    logits = logits.detach().requires_grad_()
    operations = torch.ops.ferrovae
    torch.library.opcheck(operations.categorical_log_prob.default, (logits, x, batch_dims, "auto"))
    torch.library.opcheck(operations.categorical_log_prob_backward.default, (logits, x, grad, batch_dims, "auto"))


def test_one_dynamic_graph_for_all_batch_sizes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, logits: categorical_log_prob(x, logits).exp(), fullgraph=True, dynamic=True, backend=counter
    )
    for size in (2, 3, 5, 8, 13):
        x, logits = draw(size, 4, 6)
        leaf, eager = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        value, expected = compiled(x, leaf), categorical_log_prob(x, eager).exp()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient(value, leaf), gradient(expected, eager))
    assert counter.frame_count == 1


def test_exported_checkpointed_and_mapped() -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:
            return categorical_log_prob(*tensors)

    exported = torch.export.export(Module(), draw(3, 4, 5)).module()
    x, logits = draw(3, 4, 5)
    torch.testing.assert_close(exported(x, logits), categorical_log_prob(x, logits))
    leaf, again = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = torch.utils.checkpoint.checkpoint(categorical_log_prob, x, leaf, use_reentrant=False)
    assert torch.equal(gradient(value, leaf), gradient(categorical_log_prob(x, again), again))
    for shared in (True, False):
        classes, stack = draw(6, 3, 4, 5, batch_dims=2)
        classes, dim = (classes[0], None) if shared else (classes, 0)
        mapped = torch.vmap(categorical_log_prob, (dim, 1))(classes, stack.movedim(0, 1))
        torch.testing.assert_close(mapped, categorical_log_prob(classes, stack, batch_dims=2))


@pytest.mark.parametrize(
    ("x", "logits", "batch_dims", "error", "message"),
    [
        (torch.rand(3), torch.rand(3, 4), 1, TypeError, r"x is torch.float32, expected integer classes"),
        (torch.ones(3, 4, dtype=torch.int64), torch.rand(3, 4), 1, TypeError, r"x is \(3, 4\) like the logits"),
        (torch.ones(2).long(), torch.rand(3, 4), 1, ValueError, r"x is \(2,\), expected \(3,\) to match logits"),
        (torch.tensor([0, 4]), torch.rand(2, 4), 1, ValueError, r"x holds 4, expected classes from 0 to 3"),
        (torch.tensor([0, -1]), torch.rand(2, 4), 1, ValueError, r"x holds -1, expected classes from 0 to 3"),
        (torch.tensor([0]), torch.rand(1, 4), 2, ValueError, r"batch_dims is 2, expected 0 to 1"),
        (torch.tensor([0]), torch.rand(1, 0), 1, ValueError, r"logits are \(1, 0\), expected at least one class"),
        (torch.tensor([0]), torch.ones(1, 4).long(), 1, TypeError, r"logits is torch.int64"),
        ([0], torch.rand(1, 4), 1, TypeError, r"x is a list, expected a tensor"),
        (torch.tensor([0], device="meta"), torch.rand(1, 4), 1, ValueError, r"x is on meta, expected cpu"),
    ],
)
def test_errors_name_the_argument(
    backend: str, x: Any, logits: Any, batch_dims: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^categorical_log_prob: {message}"):
        categorical_log_prob(x, logits, batch_dims=batch_dims)
