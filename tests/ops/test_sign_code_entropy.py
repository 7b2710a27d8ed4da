"""`sign_code_entropy` against the softmax over all 2^d sign codes in float64, and against an upstream quantizer."""

from __future__ import annotations

import math
import warnings

import mpmath
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ferrovae import use_backend
from ferrovae.ops import sign_code_entropy, sign_code_mean

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


def all_codes(bits: int) -> Tensor:
    """The sign codes [2^bits, bits], the first bit most significant."""
    numbers = torch.arange(2**bits).unsqueeze(-1)
    return ((numbers >> torch.arange(bits - 1, -1, -1)) % 2 * 2 - 1).double()


def distributions(x: Tensor, inv_temperature: float, scale: float) -> Tensor:
    """softmax over c in {-s, s}^d of 2 T <x, c>: [N, 2^d] in float64."""
    return torch.softmax(2 * inv_temperature * scale * x.double() @ all_codes(x.shape[1]).T, -1)


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def truth(x: Tensor, inv_temperature: float = 100.0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    q = distributions(x, inv_temperature, scale)
    return entropy(q).mean(), entropy(q.mean(0))


def assert_close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), exact.double(), rtol=tolerance, atol=tolerance)


# Every pair of values of two columns occurs.
@pytest.mark.parametrize(
    ("rows", "bits", "dtype", "inv_temperature", "scale"),
    [
        (1, 1, torch.float32, 100.0, 1.0),
        (3, 2, torch.bfloat16, 1.0, 0.3),
        (17, 3, torch.float16, 10.0, 1.0),
        (64, 10, torch.float32, 1.0, 1.0),
        (127, 5, torch.float64, 100.0, 0.3),
        (1000, 3, torch.float32, 10.0, 0.3),
        (3, 9, torch.float64, 10.0, 1.0),
        (17, 8, torch.bfloat16, 100.0, 1.0),
        (64, 1, torch.float16, 100.0, 0.3),
    ],
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_values_and_gradients_against_all_codes(
    backend: str, rows: int, bits: int, dtype: torch.dtype, inv_temperature: float, scale: float
) -> None:
    x = (torch.randn(rows, bits) / inv_temperature).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    ours = sign_code_entropy(x, inv_temperature, scale)
    expected = truth(exact, inv_temperature, scale)
    for mine, value in zip(ours, expected, strict=True):
        assert mine.shape == ()
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(mine, value, 1e-12 if dtype == torch.float64 else 2e-6)
        (slope,) = torch.autograd.grad(mine, x, retain_graph=True)
        (due,) = torch.autograd.grad(value, exact, retain_graph=True)
        # The interpreter truncates where the hardware rounds: one unit in the last place of a half.
        step = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        # What one row can add: logarithms near 1 times 4 T s p (1 - p) / N. Their sum may cancel.
        torch.testing.assert_close(slope.double(), due, rtol=step, atol=step * inv_temperature * scale / rows)


def test_bits_against_mpmath(backend: str) -> None:
    x = torch.tensor([0.0, 1e-4, -0.03, 0.5, -2.0, 8.0, 40.0], dtype=torch.float64)
    with mpmath.workdps(200):
        probabilities = [1 / (1 + mpmath.exp(-4 * mpmath.mpf(value))) for value in x.tolist()]
        expected = [-p * mpmath.log(p) - (1 - p) * mpmath.log1p(-p) for p in probabilities]
    for value, due in zip(x, expected, strict=True):
        per_sample, batch = sign_code_entropy(value.view(1, 1), 1.0)
        torch.testing.assert_close(per_sample.item(), float(due), rtol=1e-13, atol=1e-300)
        torch.testing.assert_close(batch.item(), float(due), rtol=1e-13, atol=1e-15)


def test_no_clamp_holds_the_entropy_down(cpu_backend: None) -> None:
    per_sample, batch = sign_code_entropy(torch.zeros(3, 18))
    assert_close(per_sample, torch.tensor(18 * math.log(2)), 1e-6)
    assert_close(batch, torch.tensor(18 * math.log(2)), 1e-6)


def test_sixteen_bits_of_many_rows(cpu_backend: None) -> None:
    """All codes equally often: certain rows, and a uniform batch."""
    x = all_codes(16).float()[torch.randperm(2**16)]
    per_sample, batch = sign_code_entropy(x, 100.0)
    assert per_sample == 0
    assert_close(batch, torch.tensor(16 * math.log(2)), 1e-6)


@pytest.mark.parametrize(("bits", "groups"), [(5, 2), (6, 3), (7, 7), (8, 1)])
def test_groups_are_an_upper_bound(backend: str, bits: int, groups: int) -> None:
    x = (torch.randn(40, 1) + torch.randn(40, bits) / 4).requires_grad_()
    per_sample, batch = sign_code_entropy(x, 1.0, groups=groups)
    whole, exact = truth(x.detach(), 1.0)
    assert_close(per_sample, whole, 2e-6)
    parts = [truth(part, 1.0)[1] for part in x.detach().tensor_split(groups, 1)]
    assert_close(batch, torch.stack(parts).sum(), 2e-6)
    assert batch >= exact - 1e-6
    batch.backward()
    assert x.grad.isfinite().all()


def test_sixty_two_bits(backend: str) -> None:
    x = torch.randn(9, 62) / 100
    per_sample, batch = sign_code_entropy(x, groups=31)
    assert_close(per_sample, sum(truth(x[:, i : i + 1])[0] for i in range(62)), 1e-6)
    assert batch <= 62 * math.log(2) + 1e-4


@pytest.mark.parametrize("kept", ["some", "none"])
def test_masked_rows_may_hold_anything(backend: str, kept: str) -> None:
    x, mask = torch.randn(4, 5, 6) / 50, torch.rand(4, 5) < (0.6 if kept == "some" else 0.0)
    spoiled = torch.where(mask[..., None], x, NAN).requires_grad_()
    ours = sign_code_entropy(spoiled, mask=mask)
    clean = x[mask].requires_grad_()
    expected = sign_code_entropy(clean)
    for mine, value in zip(ours, expected, strict=True):
        assert_close(mine, value, 1e-6)
    sum(ours).backward()
    sum(expected).backward()
    assert spoiled.grad[~mask].abs().sum() == 0
    torch.testing.assert_close(spoiled.grad[mask], clean.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 2)])
def test_no_rows_have_no_entropy(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    per_sample, batch = sign_code_entropy(x)
    assert (per_sample.item(), batch.item()) == (0.0, 0.0)
    (per_sample + batch).backward()
    assert x.grad.shape == shape


def test_one_row_and_strides(backend: str) -> None:
    x = torch.randn(7, 3, 2).permute(1, 2, 0) / 50
    for mine, value in zip(sign_code_entropy(x), truth(x.reshape(6, 7)), strict=True):
        assert_close(mine, value, 2e-6)
    for mine, value in zip(sign_code_entropy(x[0, 0]), truth(x[:1, 0]), strict=True):
        assert_close(mine, value, 2e-6)


# The interpreter computes in NumPy, which warns of 0 times infinity.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinite_numbers_are_certain_bits(backend: str) -> None:
    x = torch.tensor([[INF, -INF, 0.001], [INF, INF, -0.002], [-INF, INF, 0.0]], requires_grad=True)
    per_sample, batch = sign_code_entropy(x)
    exact = truth(x.detach().clamp(-1e4, 1e4))
    assert_close(per_sample, exact[0], 2e-6)
    assert_close(batch, exact[1], 2e-6)
    (per_sample + batch).backward()
    assert x.grad[:, :2].abs().max() == 0
    assert x.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_is_not_hidden(backend: str) -> None:
    x = torch.randn(5, 4)
    x[3, 1] = NAN
    assert all(value.isnan() for value in sign_code_entropy(x))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_first_and_second_order(backend: str, masked: bool) -> None:
    x = (torch.randn(3, 3, dtype=torch.float64) / 4).requires_grad_()
    mask = torch.tensor([True, False, True]) if masked else None
    function = lambda x: sign_code_entropy(x, 1.0, 0.7, mask=mask)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
    if backend != "triton":  # what follows is plain torch on all, and the interpreter is slow
        assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


def test_second_derivatives_against_all_codes(backend: str) -> None:
    x = (torch.randn(6, 5, dtype=torch.float64) / 4).requires_grad_()
    goal, results = torch.randn(6, 5, dtype=torch.float64), []
    for function in (sign_code_entropy, truth):
        for value in function(x, 1.0):
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            results.append(torch.autograd.grad((slope * goal).sum(), x, retain_graph=True)[0])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


def test_threads_change_no_bit(cpu_backend: None) -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = (torch.linspace(-1, 1, 3000 * 12).view(3000, 12).sin() / 20).requires_grad_()
            m = sign_code_mean(x)
            bits, _ = sign_code_entropy(x)
            (m[::7].sum() + bits).backward()
            results.append((m.detach(), bits.detach(), x.grad))
    finally:
        torch.set_num_threads(threads)
    for ours in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(ours, results[0], strict=True))


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "case",
    ["plain", "mask", "strided", "expanded", "empty", "bfloat16", pytest.param("dynamic", marks=pytest.mark.slow)],
)
def test_opcheck(cpu_backend: None, case: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if case == "dynamic" else []
    x, mask = torch.randn(6, 4), torch.rand(6) < 0.5 if case in ("mask", "dynamic") else None
    x = {"strided": x.T.contiguous().T, "expanded": x[:1].expand(6, 4), "empty": x[:0], "bfloat16": x.bfloat16()}.get(
        case, x
    )
    x = x.detach().requires_grad_()
    grad, weights = torch.randn((), requires_grad=True), torch.randn(16, requires_grad=True)
    operations = torch.ops.ferrovae
    torch.library.opcheck(operations.sign_code_entropy.default, (x, mask, 0.7, "auto"), test_utils=checks)
    torch.library.opcheck(
        operations.sign_code_entropy_backward.default, (x, mask, grad, 0.7, "auto"), test_utils=checks
    )
    torch.library.opcheck(operations.sign_code_mean.default, (x, mask, 0.7, "auto"), test_utils=checks)
    torch.library.opcheck(
        operations.sign_code_mean_backward.default, (x, mask, weights, 0.7, "auto"), test_utils=checks
    )


def test_compiled_for_any_number_of_rows(cpu_backend: None) -> None:
    frames = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, mask: Tensor) -> Tensor:
        per_sample, batch = sign_code_entropy(x * 2, groups=2, mask=mask)
        return per_sample - 0.5 * batch

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=frames)
    seen = []
    for rows in (3, 5, 8, 13, 21):
        x, mask, slopes = torch.randn(rows, 6) / 50, torch.rand(rows) < 0.7, []
        for function in (step, compiled):
            leaf = x.clone().requires_grad_()
            function(leaf, mask).backward()
            slopes.append(leaf.grad)
        torch.testing.assert_close(slopes[1], slopes[0])
        seen.append(frames.frame_count)
    # The first compilation starts again when it finds the floats to be constants.
    assert seen == seen[:1] * 5


class Entropies(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return sign_code_entropy(x)


def test_exported(cpu_backend: None) -> None:
    program = torch.export.export(
        Entropies(), (torch.randn(6, 4),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},)
    )
    other = torch.randn(9, 4) / 50
    for ours, expected in zip(program.module()(other), Entropies()(other), strict=True):
        assert torch.equal(ours, expected)


def test_checkpoint_and_autocast_change_nothing(cpu_backend: None) -> None:
    x = torch.randn(20, 5) / 50
    plain, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    step = lambda x: sum(sign_code_entropy(x))  # noqa: E731
    step(plain).backward()
    with torch.autocast("cpu", torch.bfloat16):
        checkpoint(step, again, use_reentrant=False).backward()
    assert torch.equal(plain.grad, again.grad)


@pytest.mark.parametrize("spherical", [False, True])
def test_upstream_agrees(cpu_backend: None, spherical: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upstream = pytest.importorskip("vector_quantize_pytorch")
    # Its clamp of probabilities at 1e-5 does not matter when 2^7 codes are used alike.
    layer = upstream.LFQ(dim=7, codebook_size=2**7, spherical=spherical, codebook_scale=1.0).train()
    x = torch.randn(1, 2000, 7) / 30
    _, breakdown = layer(x, inv_temperature=100.0, return_loss_breakdown=True)
    scale = 7**-0.5 if spherical else 1.0
    rows = torch.nn.functional.normalize(x, dim=-1) if spherical else x
    per_sample, batch = sign_code_entropy(rows, 100.0, scale)
    torch.testing.assert_close(breakdown.per_sample_entropy, per_sample, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(breakdown.batch_entropy, batch, rtol=1e-4, atol=1e-5)


X = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0],), {}, TypeError, r"x is a list, expected a tensor"),
        ((X.int(),), {}, TypeError, r"x is torch.int32, expected float32"),
        ((torch.tensor(1.0),), {}, ValueError, r"x is \(\), expected \(..., d\)"),
        ((X[:, :0],), {}, ValueError, r"x is \(3, 0\), expected \(..., d\) with 1 <= d <= 62"),
        ((torch.zeros(2, 63),), {}, ValueError, r"x is \(2, 63\), expected \(..., d\) with 1 <= d <= 62"),
        ((X, 0.0), {}, ValueError, r"inv_temperature is 0.0, expected a positive, finite number"),
        ((X, 1.0, INF), {}, ValueError, r"codebook_scale is inf, expected a positive, finite number"),
        ((X, "1"), {}, TypeError, r"inv_temperature is a str, expected a number"),
        ((X, 1.0, 1.0, 5), {}, ValueError, r"groups is 5, expected 1 to d = 4"),
        ((X, 1.0, 1.0, 1.5), {}, TypeError, r"groups is a float, expected an int"),
        (
            (torch.zeros(2, 36),),
            {},
            ValueError,
            r"groups is 1, expected at least 2 for 36 bits, 18 a group; the batch entropy is then an upper bound",
        ),
        ((X,), {"mask": torch.ones(3)}, TypeError, r"mask is torch.float32, expected bool"),
        ((X,), {"mask": torch.ones(2).bool()}, ValueError, r"mask is \(2,\), expected \(3,\) to match x \(3, 4\)"),
        ((X,), {"mask": torch.ones(3, device="meta").bool()}, ValueError, r"mask is on meta, expected cpu"),
    ],
)
def test_errors_name_the_argument(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^sign_code_entropy: {message}"):
        sign_code_entropy(*arguments, **options)
