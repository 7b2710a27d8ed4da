"""`code_sums` against one-hot products in float64: values, gradients, what is skipped, and that no order shows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ferrovae import use_backend
from ferrovae.ops import code_sums

BACKENDS = ["reference", "rust", "triton"]
INF, NAN = math.inf, math.nan


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


def truth(x: Tensor, indices: Tensor, codes: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """one_hot(indices)^T (w x) and its column sums, in float64; a row of zeros for -1."""
    weight = torch.ones(indices.shape, dtype=torch.float64) if weights is None else weights.double()
    hot = (indices.unsqueeze(-1) == torch.arange(codes)).double() * weight.unsqueeze(-1)
    return hot.transpose(-1, -2) @ x.double(), hot.sum(-2)


def assert_sums(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for mine, exact in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-6, atol=1e-6)


# Every pair of values of two columns occurs.
@pytest.mark.parametrize(
    ("rows", "codes", "dims", "dtype", "weighted", "hot"),
    [
        (0, 5, 3, torch.float32, False, False),
        (1, 1, 1, torch.bfloat16, True, True),
        (3, 17, 8, torch.float16, True, False),
        (17, 1000, 63, torch.float32, True, False),
        (64, 3, 256, torch.bfloat16, False, True),
        (127, 64, 32, torch.float16, False, True),
        (1000, 127, 3, torch.float32, True, True),
        (17, 17, 768, torch.bfloat16, False, False),
        (1000, 1, 8, torch.float64, True, False),
        (64, 1000, 1, torch.float64, False, True),
        (17, 3, 0, torch.float32, False, False),
    ],
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_against_one_hot_products(
    backend: str, rows: int, codes: int, dims: int, dtype: torch.dtype, weighted: bool, hot: bool
) -> None:
    x, indices = (torch.randn(rows, dims) + 3).to(dtype), torch.randint(-1, codes, (rows,))
    if hot:
        indices[rows // 10 :] = codes - 1
    weights = torch.randn(rows) if weighted else None
    assert_sums(code_sums(x, indices, codes, weights), truth(x, indices, codes, weights))


def test_leading_dimensions_and_strides(backend: str) -> None:
    x, indices = torch.randn(6, 5, 4).transpose(0, 2), torch.randint(-1, 3, (5, 4)).T
    weights = torch.rand(8, 5)[::2]
    expected = truth(x.reshape(-1, 6), indices.reshape(-1), 3, weights.reshape(-1))
    assert_sums(code_sums(x, indices, 3, weights), expected)
    one = code_sums(torch.tensor([2.0, 3.0]), torch.tensor(1), 2)
    assert (one[0].tolist(), one[1].tolist()) == ([[0.0, 0.0], [2.0, 3.0]], [0.0, 1.0])


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 7), (2, 0), (3,), (0, 4)])
def test_every_head_has_its_codebook(backend: str, shape: tuple[int, ...]) -> None:
    x, indices, weights = torch.randn(*shape, 6), torch.randint(-1, 4, shape), torch.rand(shape)
    sums, counts = code_sums(x, indices, 4, weights, heads=True)
    assert (sums.shape, counts.shape) == ((shape[0], 4, 6), (shape[0], 4))
    for head in range(shape[0]):
        assert_sums((sums[head], counts[head]), code_sums(x[head], indices[head], 4, weights[head]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_weights_of_any_type(backend: str, dtype: torch.dtype) -> None:
    x, indices, weights = torch.randn(50, 3), torch.randint(0, 4, (50,)), torch.randint(0, 2, (50,)).to(dtype)
    assert_sums(code_sums(x, indices, 4, weights), truth(x, indices, 4, weights))


# The interpreter computes in NumPy, which warns of 0 times infinity.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_rows_that_are_not_finite_are_skipped(backend: str) -> None:
    x, indices, weights = torch.randn(200, 5), torch.randint(0, 3, (200,)), torch.rand(200)
    x[3, 4], x[50, 0], x[51, 0], x[199, 2], weights[7], weights[8] = NAN, INF, -INF, NAN, INF, NAN
    weights[50] = 0.0
    bad = [3, 50, 51, 199]
    for given, skipped in ((None, bad), (weights, [*bad, 7, 8])):
        kept = torch.tensor([row for row in range(200) if row not in skipped])
        expected = truth(x[kept], indices[kept], 3, None if given is None else given[kept])
        assert_sums(code_sums(x, indices, 3, given), expected)
        leaf = x.clone().requires_grad_()
        loads = None if given is None else given.clone().requires_grad_()
        sums, counts = code_sums(leaf, indices, 3, loads)
        (sums.sum() + counts.sum()).backward()
        assert leaf.grad[skipped].abs().max() == 0
        assert leaf.grad.isfinite().all()
        if loads is not None:
            assert loads.grad[skipped].abs().max() == 0
            assert loads.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_extreme_numbers_keep_their_own_scale(backend: str) -> None:
    x = torch.tensor([[3e38, 1e-38], [2e38, 1e-45], [1e-30, -1e-30], [3e-30, 0.0], [-2e38, 0.0]])
    indices = torch.tensor([0, 0, 1, 1, 2])
    sums, counts = code_sums(x, indices, 4)
    exact, _ = truth(x, indices, 4)
    assert counts.tolist() == [2, 2, 1, 0]
    assert sums[0, 0] == INF  # the sum is beyond float32
    torch.testing.assert_close(sums[1:].double(), exact[1:], rtol=1e-6, atol=0.0)


def test_rounding_does_not_grow_with_the_rows(cpu_backend: None) -> None:
    x, indices = torch.rand(300_000, 2) + 1000, torch.zeros(300_000, dtype=torch.int64)
    sums, counts = code_sums(x, indices, 1)
    torch.testing.assert_close(sums[0], x.double().sum(0).float(), rtol=6e-8, atol=0.0)
    assert counts.item() == 300_000


@pytest.mark.parametrize("codes", [1, 700])
def test_order_of_rows_and_threads_change_no_bit(cpu_backend: None, codes: int) -> None:
    x, indices = torch.randn(20_000, 37), torch.randint(-1, codes, (20_000,))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(code_sums(x, indices, codes))
    finally:
        torch.set_num_threads(threads)
    for ours in results[1:]:
        assert torch.equal(ours[0], results[0][0])
        assert torch.equal(ours[1], results[0][1])


def test_the_order_of_rows_changes_no_bit_on_a_gpu() -> None:
    pytest.importorskip("triton")
    x, indices = torch.randn(300, 5), torch.randint(0, 2, (300,))
    order = torch.randperm(300)
    with use_backend("triton"):
        for ours, shuffled in zip(code_sums(x, indices, 2), code_sums(x[order], indices[order], 2), strict=True):
            assert torch.equal(ours, shuffled)


def test_indices_out_of_range(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, indices = torch.ones(2, 3, 1), torch.tensor([[0, 1, 1], [1, 7, -2]])
    if backend == "triton":
        monkeypatch.delenv("FERROVAE_CHECKS", raising=False)
        assert code_sums(x, indices, 2, heads=True)[1].tolist() == [[1, 2], [0, 1]]
        monkeypatch.setenv("FERROVAE_CHECKS", "1")
    with pytest.raises(ValueError, match=r"^code_sums: indices hold 7 in row 1 of head 1, expected -1 to 1$"):
        code_sums(x, indices, 2, heads=True)
    with pytest.raises(ValueError, match=r"^code_sums: indices hold -5 in row 0, expected -1 to 1$"):
        code_sums(x[0], torch.tensor([-5, 0, 0]), 2)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_first_and_second_order(backend: str, weighted: bool) -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 6, dtype=torch.float64, requires_grad=True) if weighted else None
    indices = torch.tensor([[0, 2, -1, 1, 0, 0], [1, 1, 1, -1, 1, 1]])
    inputs = (x, weights) if weighted else (x,)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        weight = tensors[1] if weighted else None
        # The operation itself, since the function rounds to float32.
        return torch.ops.ferrovae.code_sums(tensors[0], indices, weight, 4, backend)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    if backend != "triton":  # what follows is plain torch on all, and the interpreter is slow
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradient_is_the_code_that_a_row_is_given(backend: str) -> None:
    x, weights = torch.randn(30, 4).bfloat16().requires_grad_(), torch.rand(30, requires_grad=True)
    indices, goal, heavy = torch.randint(-1, 5, (30,)), torch.randn(5, 4), torch.randn(5)
    sums, counts = code_sums(x, indices, 5, weights)
    ((sums * goal).sum() + (counts * heavy).sum()).backward()
    found = torch.where((indices >= 0)[:, None], goal[indices], 0.0)
    slope = (x * found).sum(1) + torch.where(indices >= 0, heavy[indices], 0.0)
    torch.testing.assert_close(x.grad, (weights[:, None] * found).bfloat16())
    torch.testing.assert_close(weights.grad, slope, rtol=1e-5, atol=1e-5)


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "case",
    ["plain", "weights", "strided", "expanded", "empty", "bfloat16", pytest.param("dynamic", marks=pytest.mark.slow)],
)
def test_opcheck(cpu_backend: None, case: str) -> None:
    x, indices, weights = torch.randn(2, 7, 3), torch.randint(-1, 4, (2, 7)), torch.rand(2, 7, requires_grad=True)
    if case == "strided":
        x, indices = x.permute(1, 0, 2).contiguous().permute(1, 0, 2), indices.T.contiguous().T
    elif case == "expanded":
        x, indices = x[:, :1].expand(2, 7, 3), indices[:1].expand(2, 7)
    elif case == "empty":
        x, indices = x[:, :0], indices[:, :0]
    elif case == "bfloat16":
        x = x.bfloat16()
    x = x.detach().requires_grad_()
    arguments = (x, indices, weights if case in ("weights", "dynamic") else None, 4, "auto")
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if case == "dynamic" else []
    torch.library.opcheck(torch.ops.ferrovae.code_sums.default, arguments, test_utils=checks)


def test_compiled_for_any_number_of_rows(cpu_backend: None) -> None:
    frames = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        sums, counts = code_sums(x * 2, indices, 5, weights)
        return (sums / (counts + 1).unsqueeze(-1)).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=frames)
    for rows in (3, 5, 8, 13, 21):
        x, indices, weights = torch.randn(rows, 4), torch.randint(-1, 5, (rows,)), torch.rand(rows)
        slopes = []
        for function in (step, compiled):
            leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
            function(leaves[0], indices, leaves[1]).backward()
            slopes.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(slopes[1], slopes[0])
    assert frames.frame_count == 1


class Statistics(torch.nn.Module):
    def forward(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return code_sums(x, indices, 4)


def test_exported(cpu_backend: None) -> None:
    rows = torch.export.Dim("rows", min=2)
    example = (torch.randn(6, 3), torch.randint(-1, 4, (6,)))
    program = torch.export.export(Statistics(), example, dynamic_shapes=({0: rows}, {0: rows}))
    other = torch.randn(9, 3), torch.randint(-1, 4, (9,))
    for ours, expected in zip(program.module()(*other), Statistics()(*other), strict=True):
        assert torch.equal(ours, expected)


def test_vmap_makes_heads(backend: str) -> None:
    x, indices, weights = torch.randn(3, 5, 2), torch.randint(-1, 4, (5, 3)), torch.rand(5)
    mapped = torch.vmap(lambda x, i, w: code_sums(x, i, 4, w), in_dims=(0, 1, None))(x, indices, weights)
    for k, pair in enumerate(zip(*mapped, strict=True)):
        assert_sums(pair, truth(x[k], indices[:, k], 4, weights))
    leaf = x.clone().requires_grad_()
    torch.vmap(lambda x, i: code_sums(x, i, 4)[0].square(), in_dims=(0, 1))(leaf, indices).sum().backward()
    for k in range(3):
        sums, _ = truth(x[k], indices[:, k], 4)
        slope = torch.where((indices[:, k] >= 0)[:, None], 2 * sums[indices[:, k]], 0.0)
        torch.testing.assert_close(leaf.grad[k].double(), slope, rtol=1e-5, atol=1e-6)


def test_checkpoint_and_autocast_change_nothing(cpu_backend: None) -> None:
    x, indices = torch.randn(20, 3), torch.randint(-1, 4, (20,))
    plain, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    step = lambda x: code_sums(x, indices, 4)[0].square().sum()  # noqa: E731
    step(plain).backward()
    with torch.autocast("cpu", torch.bfloat16):
        checkpoint(step, again, use_reentrant=False).backward()
    assert torch.equal(plain.grad, again.grad)


X, INDICES = torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], INDICES, 4), TypeError, r"x is a list, expected a tensor"),
        ((INDICES, INDICES, 4), TypeError, r"x is torch.int64, expected float32"),
        ((X, INDICES.int(), 4), TypeError, r"indices are torch.int32, expected int64"),
        ((X, [0, 0, 0], 4), TypeError, r"indices is a list, expected a tensor"),
        ((X, INDICES[:2], 4), ValueError, r"indices is \(2,\), expected \(3,\) to match x \(3, 2\)"),
        ((X, INDICES, 4, torch.rand(3, 1)), ValueError, r"weights is \(3, 1\), expected \(3,\) to match x \(3, 2\)"),
        ((X, INDICES, 4, torch.rand(3).cfloat()), TypeError, r"weights are torch.complex64"),
        ((X, INDICES.to("meta"), 4), ValueError, r"indices is on meta, expected cpu, where x is"),
        ((X, INDICES, 0), ValueError, r"num_codes is 0, expected at least 1"),
        ((X, INDICES, 4.0), TypeError, r"num_codes is a float, expected an int"),
        ((torch.tensor(1.0), INDICES, 4), ValueError, r"x is \(\), expected \(..., D\)"),
    ],
)
def test_errors_name_the_argument(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^code_sums: {message}"):
        code_sums(*arguments)


def test_heads_need_a_dimension() -> None:
    with pytest.raises(ValueError, match=r"^code_sums: x is \(2,\), expected \(H, ..., D\)"):
        code_sums(torch.randn(2), torch.tensor(0), 4, heads=True)
