"""`bernoulli_log_prob` against mpmath and float64, at the ends of the range, and its gradients of any order."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import bernoulli_log_prob

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


def truth(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """log sigmoid(l) x + log sigmoid(-l) (1 - x), summed over the last dimension in float64."""
    x, logits = x.double(), logits.double()
    on = torch.where(x == 0, 0.0, x * torch.nn.functional.logsigmoid(logits))
    off = torch.where(x == 1, 0.0, (1 - x) * torch.nn.functional.logsigmoid(-logits))
    return (on + off).sum(-1)


def assert_close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 2e-6) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=relative, atol=1e-36)


def test_single_logits_against_mpmath(backend: str) -> None:
    logits = torch.tensor([0.0, -0.0, 1e-30, 1e-3, 0.5, -1.0, 3.0, -17.0, 20.0, 50.0, -85.0]).repeat_interleave(4)
    x = torch.tensor([0.0, 1.0, 0.25, 0.999]).repeat(11)
    with mpmath.workdps(60):
        expected = [
            float(-v * mpmath.log1p(mpmath.exp(-mpmath.mpf(ell))) - (1 - v) * mpmath.log1p(mpmath.exp(mpmath.mpf(ell))))
            for v, ell in zip(map(mpmath.mpf, x.tolist()), logits.tolist(), strict=True)
        ]
    assert_close(bernoulli_log_prob(x[:, None], logits[:, None]), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_against_float64(backend: str, columns: int) -> None:
    logits = torch.randn(5, columns) * torch.tensor([[1e-3], [1.0], [5.0], [20.0], [60.0]])
    confident = (logits > 0).float()
    for x in (torch.rand(5, columns), torch.rand(5, columns).round(), confident):
        ours = bernoulli_log_prob(x, logits)
        assert ours.shape == (5,)
        assert ours.dtype == torch.float32
        assert_close(ours, truth(x, logits))


def test_very_long_rows(cpu_backend: None) -> None:
    logits, x = torch.randn(2, 196_608) * 4, torch.rand(2, 196_608).round()
    assert_close(bernoulli_log_prob(x, logits), truth(x, logits), 2e-7)


@pytest.mark.parametrize("columns", [784, 3072, 196_608])
def test_the_product_of_all_factors_does_not_overflow(cpu_backend: None, columns: int) -> None:
    ours = bernoulli_log_prob(torch.zeros(2, columns), torch.zeros(2, columns))
    assert_close(ours, torch.full((2,), -columns * math.log(2)), 2e-7)


def test_padding_is_not_counted(backend: str) -> None:
    x, logits = torch.rand(3, 790), torch.randn(3, 790)
    shorter = bernoulli_log_prob(x[:, :789], logits[:, :789])
    last = bernoulli_log_prob(x[:, 789:], logits[:, 789:])
    assert_close(bernoulli_log_prob(x, logits), shorter.double() + last.double(), 5e-7)


# The interpreter computes in NumPy, which warns of 0 times infinity.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("columns", [1, 17, 1000])
def test_infinite_logits_are_certainties(backend: str, columns: int) -> None:
    for at in {0, columns // 2, columns - 1}:
        x = torch.rand(6, columns).round()
        logits = torch.where(x == 1, 30.0, -30.0) + torch.randn(6, columns)
        logits[:, at] = torch.tensor([-INF, INF, INF, -INF, INF, -INF])
        x[:, at] = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5, 0.5])
        expected = truth(x, logits.clamp(-1e4, 1e4))
        expected[torch.tensor([1, 3, 4, 5])] = -INF
        assert_close(bernoulli_log_prob(x, logits), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_gradients_at_infinite_logits(backend: str) -> None:
    logits = torch.tensor([[-INF, INF, INF, -INF, 0.0]], requires_grad=True)
    bernoulli_log_prob(torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]), logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, -1.0, 0.0, 1.0, 0.5]]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_spoils_its_own_row_only(backend: str) -> None:
    x, logits = torch.zeros(4, 37), torch.randn(4, 37)
    logits[1, 36], x[2, 5] = math.nan, math.nan
    logits[3, 0], logits[1, 0] = INF, INF
    assert bernoulli_log_prob(x, logits).isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_logits(backend: str, dtype: torch.dtype) -> None:
    logits, x = (torch.randn(3, 101) * 6).to(dtype).requires_grad_(), torch.rand(3, 101).to(dtype)
    ours = bernoulli_log_prob(x, logits)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(ours, truth(x, logits), 1e-14 if dtype == torch.float64 else 2e-6)
    ours.sum().backward()
    slope = x.double() - torch.sigmoid(logits.detach().double())
    step = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]  # bf16: interpreters truncate
    torch.testing.assert_close(logits.grad.double(), slope, rtol=step, atol=1e-7 if dtype == torch.float16 else 1e-15)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_other_data(backend: str, dtype: torch.dtype) -> None:
    x, logits = torch.rand(3, 101).round(), torch.randn(3, 101)
    assert torch.equal(bernoulli_log_prob(x.to(dtype), logits), bernoulli_log_prob(x, logits))


def test_samples_share_their_data(backend: str) -> None:
    x, logits = torch.rand(3, 2, 7), torch.randn(5, 3, 2, 7)
    expected = truth(x.expand(5, 3, 2, 7).reshape(5, 3, 14), logits.reshape(5, 3, 14))
    for data in (x, x[None], x.expand(5, 3, 2, 7)):
        assert_close(bernoulli_log_prob(data, logits, batch_dims=2), expected)


def test_gradient_in_shared_data_is_summed(backend: str) -> None:
    for shape in ((3, 7), (1, 3, 7)):
        x, logits = torch.rand(shape, requires_grad=True), torch.randn(5, 3, 7)
        weights = torch.randn(5, 3)
        (bernoulli_log_prob(x, logits, batch_dims=2) * weights).sum().backward()
        assert_close(x.grad, (weights[..., None] * logits).sum(0).view(shape), 1e-5)


def test_strides_do_not_matter(backend: str) -> None:
    x, logits = torch.rand(6, 4, 10), torch.randn(6, 4, 10)
    expected = truth(x.flatten(1), logits.flatten(1))
    strided = logits.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    ours = bernoulli_log_prob(x.permute(2, 0, 1).contiguous().permute(1, 2, 0), strided)
    assert_close(ours, expected)
    ours.backward(torch.ones(()).expand(6))
    slope = x.double() - torch.sigmoid(logits.double())
    torch.testing.assert_close(strided.grad.double(), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (0,)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    ours = bernoulli_log_prob(torch.rand(shape), logits)
    assert ours.tolist() == [0.0] * shape[0]
    ours.sum().backward()
    assert logits.grad.shape == shape


def test_keeping_no_or_all_dimensions(backend: str) -> None:
    x, logits = torch.rand(4, 3), torch.randn(4, 3)
    assert_close(bernoulli_log_prob(x, logits, batch_dims=2), truth(x[..., None], logits[..., None]))
    total = bernoulli_log_prob(x, logits, batch_dims=0)
    assert total.shape == ()
    assert_close(total, truth(x.flatten(), logits.flatten()))


def test_every_result_is_written(backend: str, nan_filled_empty: None) -> None:
    logits = torch.randn(7, 33, requires_grad=True)
    ours = bernoulli_log_prob(torch.rand(7, 33), logits)
    (slope,) = torch.autograd.grad(ours.sum(), logits)
    assert ours.isfinite().all()
    assert slope.isfinite().all()


def test_gradients_of_first_and_second_order() -> None:
    x = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "rust"):
        with use_backend(backend):
            function = lambda x, logits: bernoulli_log_prob(x, logits, batch_dims=2)  # noqa: E731
            assert torch.autograd.gradcheck(function, (x, logits))
            assert torch.autograd.gradgradcheck(function, (x, logits))


def test_gradients_keep_their_relative_accuracy(backend: str) -> None:
    logits = torch.tensor([[20.0, -20.0, 40.0, -40.0, 80.0, 5.0]], requires_grad=True)
    bernoulli_log_prob((logits > 0).float(), logits).sum().backward()
    exact = logits.detach().double()
    assert_close(logits.grad, torch.sigmoid(-exact.abs()) * exact.sign(), 1e-6)


def test_backward_stays_on_the_forward_backend() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    with use_backend("reference"):
        ours = bernoulli_log_prob(torch.rand(2, 3), logits)
    with use_backend("triton"):
        ours.sum().backward()
    assert logits.grad is not None


def test_threads_change_no_bit(cpu_backend: None) -> None:
    x, logits = torch.rand(300, 1500), torch.randn(300, 1500)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(bernoulli_log_prob(x, logits))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", ["plain", "samples", "strided", "expanded", "empty", "bytes"])
def test_opcheck(cpu_backend: None, case: str) -> None:
    logits, x = torch.randn(4, 3, 5), torch.rand(4, 3, 5)
    logits, x, batch_dims = {
        "plain": (logits, x, 1),
        "samples": (logits, x[0], 2),
        "strided": (logits.transpose(1, 2).contiguous().transpose(1, 2), x.permute(2, 1, 0), 1),
        "expanded": (logits[:1].expand(4, 3, 5), x[:1].expand(4, 3, 5), 1),
        "empty": (logits[:0], x[:0], 1),
        "bytes": (logits, x.round().to(torch.uint8), 2),
    }[case]
    if case == "strided":
        logits, x = logits, x.reshape(4, 3, 5)
    grad = torch.randn(logits.shape[:batch_dims])
    logits, grad = logits.detach().requires_grad_(), grad.requires_grad_()
    x = x.detach().requires_grad_(x.is_floating_point())
    operations = torch.ops.ferrovae
    torch.library.opcheck(operations.bernoulli_log_prob.default, (logits, x, batch_dims, "auto"))
    torch.library.opcheck(operations.bernoulli_log_prob_backward.default, (logits, x, grad, batch_dims, "auto"))


def test_compiled_in_one_graph(cpu_backend: None) -> None:
    x, logits = torch.rand(3, 7), torch.randn(2, 3, 7)
    function = lambda x, logits: bernoulli_log_prob(x, logits * 2, batch_dims=2).exp()  # noqa: E731
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = x.clone().requires_grad_(), logits.clone().requires_grad_()
        value = run(*leaves)
        value.sum().backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.rand(3, 4), torch.rand(3, 5)), ValueError, r"x is \(3, 4\), expected \(3, 5\) to match logits"),
        ((torch.rand(3, 5), torch.rand(2, 3, 5)), ValueError, r"x is \(3, 5\), expected \(2, 3, 5\)"),
        ((torch.rand(2, 3, 5), torch.rand(3, 5)), ValueError, r"x is \(2, 3, 5\), expected \(3, 5\)"),
        ((torch.rand(3, 4), torch.rand(3, 4), 3), ValueError, r"batch_dims is 3, expected 0 to 2"),
        ((torch.rand(3, 4), torch.rand(3, 4), -1), ValueError, r"batch_dims is -1, expected 0 to 2"),
        ((torch.rand(3), torch.zeros(3, dtype=torch.int64)), TypeError, r"logits are torch.int64, expected float32"),
        ((torch.zeros(3, dtype=torch.complex64), torch.rand(3)), TypeError, r"x is torch.complex64"),
        (([0.0], torch.rand(1)), TypeError, r"x is a list, expected a tensor"),
        ((torch.rand(1), 2.0), TypeError, r"logits is a float, expected a tensor"),
        ((torch.rand(3, device="meta"), torch.rand(3)), ValueError, r"x is on meta, expected cpu"),
    ],
)
def test_errors_name_the_argument(arguments: tuple, error: type[Exception], message: str) -> None:
    x, logits, batch_dims = arguments if len(arguments) == 3 else (*arguments, 1)
    with pytest.raises(error, match=f"^bernoulli_log_prob: {message}"):
        bernoulli_log_prob(x, logits, batch_dims=batch_dims)


def test_vmap_is_one_more_batch_dimension() -> None:
    x, logits = torch.rand(3, 4, 5), torch.randn(3, 4, 5)
    for in_dims, data in (((0, 0), x), ((None, 0), x[0])):
        mapped = torch.vmap(bernoulli_log_prob, in_dims)(data, logits)
        each = [bernoulli_log_prob(x[i] if in_dims[0] == 0 else data, logits[i]) for i in range(3)]
        assert torch.equal(mapped, torch.stack(each))
