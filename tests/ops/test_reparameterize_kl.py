"""`reparameterize_kl` against closed forms in float64: values, gradients, shapes, randomness, arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ferrovae import ops, use_backend
from ferrovae.ops import _reparameterize_kl
from ferrovae.ops._registry import Kernel
from ops.reparameterize_kl_truth import TOLERANCE, graded, noise, truth

BACKENDS = ["reference", "rust"]
SHAPES = [(0, 4), (4, 0), (1, 1), (3, 2), (17, 63), (64, 8), (5, 3, 7), (2, 2500)]


def assert_near(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for mine, expected in zip(ours, exact, strict=True):
        assert mine.shape == expected.shape
        tolerance = TOLERANCE[dtype] if mine.dtype == dtype else TOLERANCE[torch.float32]
        torch.testing.assert_close(mine.double(), expected.double(), rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    mean, logvar = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    eps = noise(-9, torch.arange(shape[0]), 3, math.prod(shape[1:]), first=2).reshape(3, *shape)
    with use_backend(backend):
        ours = graded(lambda m, v: ops.reparameterize_kl(m, v, seed=-9, num_samples=3, first_sample=2), mean, logvar)
    assert [out.dtype for out in ours] == [
        dtype,
        torch.float64 if dtype == torch.float64 else torch.float32,
        dtype,
        dtype,
    ]
    assert_near(ours, graded(lambda m, v: truth(m, v, eps), mean.double(), logvar.double()), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("kl_reduction", ["example", "element"])
def test_batch_dims_and_reduction(batch_dims: int, kl_reduction: str, backend: str) -> None:
    mean, logvar = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    examples = math.prod(mean.shape[:batch_dims])
    eps = noise(1, torch.arange(examples), 1, 30 // examples).reshape(mean.shape)
    dims = 3 if kl_reduction == "element" else batch_dims
    with use_backend(backend):
        ours = graded(
            lambda m, v: ops.reparameterize_kl(m, v, seed=1, batch_dims=batch_dims, kl_reduction=kl_reduction),
            mean,
            logvar,
        )
    assert_near(ours, graded(lambda m, v: truth(m, v, eps, dims), mean.double(), logvar.double()), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "extreme"), [(torch.float32, 80.0), (torch.bfloat16, 80.0), (torch.float16, 10.0)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_variances(dtype: torch.dtype, extreme: float, sign: int, backend: str) -> None:
    extreme = sign * extreme
    mean, logvar = torch.randn(3, 5).to(dtype), torch.full((3, 5), extreme, dtype=dtype)
    eps = noise(4, torch.arange(3), 1, 5).squeeze(0)
    with use_backend(backend):
        ours = graded(lambda m, v: ops.reparameterize_kl(m, v, seed=4), mean, logvar)
    expected = graded(lambda m, v: truth(m, v, eps), mean.double(), logvar.double())
    for mine, exact in zip(ours, expected, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5 if mine.dtype == torch.float32 else 2**-8, atol=1e-6)


def test_small_kl_keeps_its_digits() -> None:
    logvar = torch.full((1, 1000), 1e-4)
    _, kl = ops.reparameterize_kl(torch.zeros_like(logvar), logvar, seed=0)
    assert kl.item() == pytest.approx(0.5 * 1000 * (math.expm1(1e-4) - 1e-4), abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_and_expanded_input_is_read_in_place(dtype: torch.dtype) -> None:
    mean, logvar = torch.randn(7, 24, dtype=dtype)[:, 3:12], torch.randn(9, dtype=dtype).expand(7, 9)
    transposed = torch.randn(9, 7, dtype=dtype).t()
    for first, second in ((mean, logvar), (transposed, mean), (mean[::2], mean[1::2].flip(1)[:4].repeat(2, 1)[:4])):
        ours = ops.reparameterize_kl(first, second, seed=2)
        plain = ops.reparameterize_kl(first.contiguous(), second.contiguous(), seed=2)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_moments_are_the_two_tensors_they_hold(dim: int, batch_dims: int, backend: str) -> None:
    moments = torch.randn(4, 6, 2, 10)
    options = {"seed": 3, "batch_dims": batch_dims, "num_samples": 2}
    with use_backend(backend):
        ours = graded(lambda m: ops.reparameterize_kl_from_moments(m, dim=dim, **options), moments)
        apart = graded(lambda m: ops.reparameterize_kl(*m.chunk(2, dim), **options), moments)
    for mine, theirs in zip(ours, apart, strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine, theirs)


def test_moments_are_not_copied() -> None:
    from ferrovae.ops.reparameterize_kl import _halves

    moments = torch.randn(4, 6, 2, 10)[1:]
    for dim, batch_dims in ((1, 1), (2, 1), (3, 1), (3, 2), (0, 1)):
        source = moments if dim else torch.randn(4, 6)
        assert _halves(source, dim, batch_dims).data_ptr() == source.data_ptr()


CASES = {
    "plain": {},
    "samples": {"num_samples": 2, "first_sample": 1},
    "element": {"kl_reduction": "element", "num_samples": 2},
    "prior": {
        "prior_mean": torch.randn(3, dtype=torch.float64),
        "prior_logvar": torch.randn(2, 1, dtype=torch.float64),
    },
}


@pytest.mark.parametrize(("case", "backend"), [(case, "rust") for case in CASES] + [("samples", "reference")])
@pytest.mark.parametrize("moments", [False, True])
def test_first_and_second_derivatives(case: str, moments: bool, backend: str) -> None:
    options = {"seed": 6} | CASES[case]

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        if moments:
            return ops.reparameterize_kl_from_moments(*inputs, dim=-1, **options)
        return ops.reparameterize_kl(*inputs, **options)

    shapes = [(2, 2, 6)] if moments else [(2, 2, 3)] * 2
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with use_backend(backend):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_each_output_alone_has_derivatives() -> None:
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for output in (0, 1):
        assert torch.autograd.gradcheck(lambda *x, o=output: ops.reparameterize_kl(*x, seed=1)[o], inputs)
        assert torch.autograd.gradgradcheck(lambda *x, o=output: ops.reparameterize_kl(*x, seed=1)[o], inputs)


def layouts() -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "plain": (torch.randn(3, 5), torch.randn(3, 5)),
        "strided": (torch.randn(3, 10)[:, 2:7], torch.randn(5, 3).t()),
        "expanded": (torch.randn(1, 5).expand(3, 5), torch.randn(3, 1).expand(3, 5)),
        "empty": (torch.randn(0, 5), torch.randn(0, 5)),
        "half": (torch.randn(3, 5).bfloat16(), torch.randn(3, 5).bfloat16()),
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize(
    ("layout", "learned"),
    [
        ("strided", False),
        ("empty", False),
        ("half", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("plain", False), ("expanded", False), ("plain", True))
        ),
    ],
)
def test_opcheck(layout: str, learned: bool) -> None:
    mean, logvar = (tensor.requires_grad_() for tensor in layouts()[layout])
    prior = (
        (torch.randn(1, 5, requires_grad=True), torch.randn_like(mean, requires_grad=True)) if learned else (None,) * 2
    )
    seed, ids = torch.tensor([5]), torch.arange(mean.shape[0]) * 2
    forward, backward = _reparameterize_kl.from_pair.overload, _reparameterize_kl._from_pair_backward.overload
    torch.library.opcheck(forward, (mean, logvar, *prior, seed, ids, 2, 0, False, "auto"))
    dz = torch.randn(2, *mean.shape, dtype=mean.dtype, requires_grad=True)
    dkl = torch.randn(mean.shape[0], requires_grad=True)
    torch.library.opcheck(backward, (mean, logvar, *prior, dz, dkl, seed, None, 2, 0, True, "auto"))
    moments = torch.stack([mean, logvar]).detach().movedim(0, 1).unsqueeze(1).requires_grad_()
    forward, backward = _reparameterize_kl.from_moments.overload, _reparameterize_kl._from_moments_backward.overload
    torch.library.opcheck(forward, (moments, *prior, seed, None, 2, 0, True, "auto"))
    torch.library.opcheck(backward, (moments, *prior, dz, dkl, seed, ids, 2, 0, True, "auto"))


@pytest.mark.parametrize("chosen", BACKENDS)
def test_backward_runs_where_forward_ran(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the other backend ran")

    mean = torch.randn(2, 3, requires_grad=True)
    for operation in (_reparameterize_kl._from_pair_backward, _reparameterize_kl.from_pair):
        if chosen == "reference":
            monkeypatch.setitem(operation.kernels, "rust", Kernel(forbidden, frozenset({torch.float32})))
        else:
            monkeypatch.setattr(operation, "_reference", forbidden)
    with use_backend(chosen):
        z, kl = ops.reparameterize_kl(mean, mean)
    with use_backend("rust" if chosen == "reference" else "reference"):
        (grad,) = torch.autograd.grad(z.sum() + kl.sum(), mean, create_graph=True)
        grad.sum().backward()
    assert mean.grad is not None


def test_large_results_are_those_of_their_rows() -> None:
    mean, logvar, dz = (torch.randn(2, 2**19 + 1005) for _ in range(3))  # over 4 MiB, no whole pages a row
    mean, logvar = mean.requires_grad_(), logvar.requires_grad_()
    z, kl = ops.reparameterize_kl(mean, logvar, seed=3)
    gradients = torch.autograd.grad([z, kl], [mean, logvar], [dz, torch.ones(2)])
    for row in range(2):
        part = mean[row, None], logvar[row, None]
        own = ops.reparameterize_kl(*part, seed=3, example_ids=torch.tensor([row]))
        due = torch.autograd.grad(own, part, [dz[row, None], torch.ones(1)])
        assert torch.equal(z[row], own[0][0])
        assert torch.equal(kl[row], own[1][0])
        assert all(torch.equal(whole[row], one[0]) for whole, one in zip(gradients, due, strict=True))


@pytest.mark.parametrize("columns", [64, 50])
def test_a_large_call_is_many_small_ones(columns: int) -> None:
    """Results beyond 8 MB are written past the caches where rows are whole lines, as those of 64 columns are."""
    rows = 9 * 2**20 // (4 * columns)
    mean, logvar, dz = (torch.randn(rows, columns) for _ in range(3))
    ids = torch.arange(rows)

    def results(part: slice) -> tuple[Tensor, ...]:
        leaves = mean[part].requires_grad_(), logvar[part].requires_grad_()
        z, kl = ops.reparameterize_kl(*leaves, seed=5, example_ids=ids[part])
        return z, kl, *torch.autograd.grad([z, kl], leaves, [dz[part], torch.ones_like(kl)])

    whole = results(slice(None))
    for start in range(0, rows, 20_000):
        part = slice(start, start + 20_000)
        for large, small in zip(whole, results(part), strict=True):
            assert torch.equal(large[part], small)
