"""`discretized_logistic_log_prob` against mpmath and float64, at the ends of the range, and its gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ferrovae import use_backend
from ferrovae.ops import discretized_logistic_log_prob
from ops.logistic_truth import exact, log_masses, on_levels

INF = math.inf
BACKENDS = ["reference", "rust", "triton"]
COLUMNS = [0, 1, 15, 16, 17, 790, 3072]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def cpu_backend():
    """What a user of a CPU gets."""
    with use_backend("rust"):
        yield


def truth(x, mean, log_scale, levels=256):
    return log_masses(x, mean, log_scale, levels).flatten(1).sum(1)


def assert_close(ours, expected, relative=2e-6):
    torch.testing.assert_close(ours.double(), expected.double(), rtol=relative, atol=1e-6 if relative < 1e-5 else 1e-4)


def sample(*shape, levels=256):
    x = on_levels(*shape, levels=levels)
    return x, x + torch.randn(shape) * 0.1, torch.randn(shape) - 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 256])
def test_single_numbers_against_mpmath(backend: str, levels: int, dtype: torch.dtype) -> None:
    top = levels - 1
    level = sorted({0, 1, top // 2, top - 1, top})
    means, log_scales = [0, 0.1234, -0.99, 1, -1.01, 30.0], [-12, -7, -4.1, -2, 0, 3, 5]
    rows = list(itertools.product(level, means, log_scales))
    _, mean, log_scale = (torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True))
    x = torch.tensor([2 * row[0] / top - 1 for row in rows], dtype=dtype)
    expected = [
        float(exact(row[0], m, s, levels)) for row, m, s in zip(rows, mean.tolist(), log_scale.tolist(), strict=True)
    ]
    ours = discretized_logistic_log_prob(x[:, None], mean[:, None], log_scale[:, None], levels)
    error = (ours.double() - torch.tensor(expected, dtype=torch.float64)).abs()
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    assert (error <= bound * torch.tensor(expected, dtype=torch.float64).abs().clamp_min(1)).all()


@pytest.mark.parametrize("levels", [2, 7, 256])
@pytest.mark.parametrize("log_scale", [-12.0, -7.0, -2.0, 1.0, 5.0])
def test_probabilities_of_all_levels_sum_to_one(cpu_backend: None, levels: int, log_scale: float) -> None:
    x = torch.arange(levels)[:, None] * (2 / (levels - 1)) - 1
    for mean in (-2.0, -0.3, 0.0, 0.9999):
        like = torch.full_like(x, mean)
        log_prob = discretized_logistic_log_prob(x, like, torch.full_like(x, log_scale), levels)
        assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=3e-6)


@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_and_gradients_against_float64(backend: str, columns: int) -> None:
    if backend == "triton" and columns == 3072:
        columns = 2500  # more than a tile
    for shift in (-4.0, 3.0):
        x, mean, log_scale = sample(3, columns)
        leaves = mean.requires_grad_(), (log_scale + shift + 3).requires_grad_()
        ours = discretized_logistic_log_prob(x, *leaves)
        assert ours.shape == (3,)
        assert ours.dtype == torch.float32
        doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = truth(x, *doubles)
        assert_close(ours, expected)
        weights = torch.randn(3)
        slopes = torch.autograd.grad(ours, leaves, weights)
        expected = torch.autograd.grad(expected, doubles, weights.double())
        scales = (-doubles[1].detach()).exp(), torch.ones(())
        for slope, due, scale in zip(slopes, expected, scales, strict=True):
            assert ((slope - due).abs() <= 5e-6 * (due.abs() + scale)).all()


@pytest.mark.parametrize("log_scale", [-7.0, -4.844, 0.0, 5.0])
def test_very_long_rows_neither_overflow_nor_drift(cpu_backend: None, log_scale: float) -> None:
    x = on_levels(1, 196_608).expand(2, -1)
    mean = x + torch.tensor([[0.0], [0.01]])
    scales = torch.full_like(mean, log_scale)
    assert_close(discretized_logistic_log_prob(x, mean, scales), truth(x, mean, scales), 1e-6)


def test_padding_is_not_counted(backend: str) -> None:
    x, mean, log_scale = sample(3, 790)
    pieces = [[value[:, piece] for value in (x, mean, log_scale)] for piece in (slice(789), slice(789, None))]
    apart = sum(discretized_logistic_log_prob(*piece).double() for piece in pieces)
    assert_close(discretized_logistic_log_prob(x, mean, log_scale), apart, 5e-7)


# The interpreter computes in NumPy, which warns of infinities.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("value", "mean", "log_scale", "result"),
    [
        (-1.0, -INF, 0.0, 0.0),
        (1.0, INF, 0.0, 0.0),
        (-1.0, INF, 0.0, -INF),
        (1.0, -INF, 0.0, -INF),
        (1 / 255, INF, 0.0, -INF),
        (1 / 255, 1 / 255, -INF, 0.0),
        (-1.0, 0.5, INF, -math.log(2)),
        (1 / 255, 0.5, INF, -INF),
    ],
)
def test_infinite_parameters(backend: str, value: float, mean: float, log_scale: float, result: float) -> None:
    x, means, log_scales = sample(1, 33)
    for at in (0, 17, 32):
        values = [tensor.clone() for tensor in (x, means, log_scales)]
        for tensor, new in zip(values, (value, mean, log_scale), strict=True):
            tensor[0, at] = new
        rest = [tensor[:, [column for column in range(33) if column != at]] for tensor in (x, means, log_scales)]
        assert_close(discretized_logistic_log_prob(*values), truth(*rest) + result)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gradients_at_certainties_are_finite(backend: str) -> None:
    x = torch.tensor([[-1.0, 1.0, 0.5, -1.0]])
    mean = torch.tensor([[-INF, INF, 0.5, 300.0]], requires_grad=True)
    log_scale = torch.tensor([[0.0, 0.0, -30.0, -7.0]], requires_grad=True)
    discretized_logistic_log_prob(x, mean, log_scale).sum().backward()
    assert mean.grad is not None
    assert mean.grad[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert log_scale.grad[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert mean.grad[0, 3].item() == pytest.approx(-math.exp(7), rel=1e-5)
    assert log_scale.grad[0, 3].item() == pytest.approx((301 - 1 / 255) * math.exp(7), rel=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_spoils_its_own_row_only(backend: str) -> None:
    x, mean, log_scale = sample(5, 37)
    x[1, 36], mean[2, 5], log_scale[3, 0] = math.nan, math.nan, math.nan
    expected = [False, True, True, True, False]
    assert discretized_logistic_log_prob(x, mean, log_scale).isnan().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    x, mean, log_scale = (value.to(dtype) for value in sample(3, 101))
    mean.requires_grad_()
    ours = discretized_logistic_log_prob(x, mean, log_scale)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(ours, truth(x, mean, log_scale), 1e-12 if dtype == torch.float64 else 2e-6)
    ours.sum().backward()
    double = mean.detach().double().requires_grad_()
    truth(x, double, log_scale).sum().backward()
    step = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-9}[dtype]  # bf16: interpreters truncate
    torch.testing.assert_close(mean.grad.double(), double.grad, rtol=step, atol=step)
    mixed = discretized_logistic_log_prob(x.float(), mean, log_scale)
    torch.testing.assert_close(mixed, ours)


def test_samples_share_their_data_and_scales(backend: str) -> None:
    x, mean, _ = sample(3, 2, 7)
    mean, log_scale = mean + torch.randn(5, 3, 2, 7) * 0.1, torch.full((2, 1), -3.0, requires_grad=True)
    whole = torch.full(mean.shape, -3.0, dtype=torch.float64, requires_grad=True)
    expected = log_masses(x.expand(mean.shape), mean, whole).flatten(2).sum(2)
    expected.sum().backward()
    for data in (x, x[None], x.expand(5, 3, 2, 7)):
        log_scale.grad = None
        ours = discretized_logistic_log_prob(data, mean, log_scale, batch_dims=2)
        assert_close(ours, expected)
        ours.sum().backward()
        assert_close(log_scale.grad[:, 0], whole.grad.sum((0, 1, 3)), 1e-4)


def test_strides_and_unwritten_memory_do_not_matter(backend: str, nan_filled_empty: None) -> None:
    x, mean, log_scale = sample(6, 4, 10)
    strided = mean.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    ours = discretized_logistic_log_prob(x.permute(2, 0, 1).contiguous().permute(1, 2, 0), strided, log_scale)
    assert_close(ours, truth(x, mean, log_scale))
    ours.backward(torch.ones(()).expand(6))
    assert strided.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (0,)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    mean = torch.randn(shape, requires_grad=True)
    ours = discretized_logistic_log_prob(torch.rand(shape), mean, torch.zeros(shape))
    assert ours.tolist() == [0.0] * shape[0]
    ours.sum().backward()
    assert mean.grad.shape == shape


def test_keeping_no_or_all_dimensions(backend: str) -> None:
    values = sample(4, 3)
    each = discretized_logistic_log_prob(*values, batch_dims=2)
    assert_close(each, log_masses(*values))
    assert_close(discretized_logistic_log_prob(*values, batch_dims=0), log_masses(*values).sum())


def test_gradients_of_first_and_second_order(cpu_backend: None) -> None:
    x = on_levels(2, 5)
    mean = (x.double() + torch.randn(3, 2, 5) * 0.02).requires_grad_()
    log_scale = (torch.randn(3, 2, 5, dtype=torch.float64) - 3).requires_grad_()
    function = lambda mean, log_scale: discretized_logistic_log_prob(x, mean, log_scale, batch_dims=2)  # noqa: E731
    assert torch.autograd.gradcheck(function, (mean, log_scale))
    assert torch.autograd.gradgradcheck(function, (mean, log_scale))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(function, (mean, log_scale))


def test_threads_change_no_bit(cpu_backend: None) -> None:
    values = sample(50, 6000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(discretized_logistic_log_prob(*values))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "case", ["samples", *(pytest.param(c, marks=pytest.mark.slow) for c in ("plain", "strided", "expanded", "empty"))]
)
def test_opcheck(cpu_backend: None, case: str) -> None:
    x, mean, log_scale = sample(4, 3, 5)
    x, mean, log_scale, batch_dims = {
        "plain": (x, mean, log_scale, 1),
        "samples": (x[0], mean, log_scale, 2),
        "strided": (x.permute(0, 2, 1), mean.permute(0, 2, 1), log_scale.permute(0, 2, 1), 1),
        "expanded": (x[:1].expand(4, 3, 5), mean, log_scale[:1].expand(4, 3, 5), 1),
        "empty": (x[:0], mean[:0], log_scale[:0], 1),
    }[case]
    mean, log_scale = mean.detach().requires_grad_(), log_scale.detach().requires_grad_()
    grad = torch.randn(mean.shape[:batch_dims], requires_grad=True)
    operations = torch.ops.ferrovae
    arguments = (mean, log_scale, x, 256, batch_dims, "auto")
    torch.library.opcheck(operations.discretized_logistic_log_prob.default, arguments)
    arguments = (mean, log_scale, x, grad, 256, batch_dims, "auto")
    torch.library.opcheck(operations.discretized_logistic_log_prob_backward.default, arguments)


def test_compiled_in_one_graph_for_every_batch_size(cpu_backend: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = lambda x, mean, log_scale: discretized_logistic_log_prob(x, mean * 2, log_scale).exp()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 5, 2, 8, 13):
        x, mean, log_scale = sample(batch, 7)
        results = []
        for run in (function, compiled):
            leaves = mean.clone().requires_grad_(), log_scale.clone().requires_grad_()
            value = run(x, *leaves)
            value.sum().backward()
            results.append((value.detach(), *(leaf.grad for leaf in leaves)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1


def test_exported_vmapped_checkpointed_and_under_autocast(cpu_backend: None) -> None:
    class Module(torch.nn.Module):
        def forward(self, x, mean, log_scale):
            return discretized_logistic_log_prob(x, mean, log_scale)

    values = sample(4, 9)
    expected = discretized_logistic_log_prob(*values)
    assert torch.equal(torch.export.export(Module(), values).module()(*values), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(discretized_logistic_log_prob(*values), expected)
    stacked = torch.vmap(discretized_logistic_log_prob)(*(torch.stack((v, v.flip(0))) for v in values))
    assert torch.equal(stacked, torch.stack((expected, expected.flip(0))))
    x, mean, log_scale = values
    shared = torch.vmap(discretized_logistic_log_prob, (None, 1, None))(x, torch.stack((mean, mean), 1), log_scale)
    assert torch.equal(shared, torch.stack((expected, expected)))
    leaves = [mean.clone().requires_grad_() for _ in range(2)]
    checkpoint(discretized_logistic_log_prob, x, leaves[0], log_scale, use_reentrant=False).sum().backward()
    discretized_logistic_log_prob(x, leaves[1], log_scale).sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 5)}, ValueError, r"x is \(3, 5\), expected \(3, 4\) to match mean"),
        ({"x": torch.zeros(3, 4, dtype=torch.uint8)}, TypeError, r"x is torch.uint8, expected float32"),
        ({"x": [0.0]}, TypeError, r"x is a list, expected a tensor"),
        (
            {"mean": torch.zeros(3, 4, dtype=torch.float64)},
            TypeError,
            r"log_scale is torch.float32, expected torch.floa",
        ),
        ({"log_scale": torch.zeros(2, 4)}, ValueError, r"log_scale is \(2, 4\), expected a shape that broadcasts"),
        ({"x": torch.zeros(3, 4, device="meta")}, ValueError, r"x is on meta, expected cpu"),
        ({"levels": 1}, ValueError, r"levels is 1, expected 2 to 65536"),
        ({"levels": 65537}, ValueError, r"levels is 65537, expected 2 to 65536"),
        ({"batch_dims": 3}, ValueError, r"batch_dims is 3, expected 0 to 2"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(3, 4), "mean": torch.zeros(3, 4), "log_scale": torch.zeros(3, 4)} | change
    with pytest.raises(error, match=f"^discretized_logistic_log_prob: {message}"):
        discretized_logistic_log_prob(**arguments)
