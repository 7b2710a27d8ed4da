"""`reparameterize_kl` with a learned prior: values and gradients of all four against torch.distributions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ferrovae import ops, use_backend
from ferrovae.ops import _reparameterize_kl
from ferrovae.ops.reparameterize_kl import _rows
from ops.reparameterize_kl_truth import TOLERANCE, graded, noise

NAMES = ("prior_mean", "prior_logvar")
Shapes = tuple[tuple[int, ...] | None, tuple[int, ...] | None]
# of prior_mean and prior_logvar, for mean (7, 3, 5): full, per column, scalar, per channel, per example, absent
PRIORS: list[Shapes] = [
    ((7, 3, 5), (7, 3, 5)),
    ((5,), (3, 5)),
    ((), (1, 3, 5)),
    ((3, 1), None),
    (None, (7, 1, 1)),
    ((7, 3, 5), (1,)),
]


def ours(m: Tensor, v: Tensor, *prior: Tensor, names: tuple[str, ...] = NAMES, **options) -> tuple[Tensor, Tensor]:
    return ops.reparameterize_kl(m, v, **dict(zip(names, prior, strict=True)), seed=8, **options)


def exact(
    m: Tensor, v: Tensor, *prior: Tensor, names: tuple[str, ...] = NAMES, kl_reduction: str = "example"
) -> tuple[Tensor, Tensor]:
    values = dict(zip(names, prior, strict=True))
    zero = torch.zeros((), dtype=torch.float64)
    p = Normal(values.get("prior_mean", zero), torch.exp(values.get("prior_logvar", zero) / 2))
    kl = kl_divergence(Normal(m, torch.exp(v / 2)), p)
    z = m + torch.exp(v / 2) * noise(8, torch.arange(m.shape[0]), 1, math.prod(m.shape[1:])).reshape(m.shape)
    return z, kl if kl_reduction == "element" else kl.flatten(1).sum(1)


def assert_exact(mine: list[Tensor], truth: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    for a, b in zip(mine, truth, strict=True):
        tolerance = TOLERANCE[torch.float32 if a.dtype == torch.float32 else dtype]
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=5 * tolerance, atol=5 * tolerance * float(b.abs().max()))


@pytest.mark.parametrize("backend", ["reference", "rust"])
@pytest.mark.parametrize("shapes", PRIORS)
@pytest.mark.parametrize("kl_reduction", ["example", "element"])
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.usefixtures("nan_filled_empty")
def test_values_and_gradients(shapes: Shapes, kl_reduction: str, moments: bool, backend: str) -> None:
    names = tuple(name for name, shape in zip(NAMES, shapes, strict=True) if shape is not None)
    inputs = [torch.randn(7, 3, 5), torch.randn(7, 3, 5), *(torch.randn(s) for s in shapes if s is not None)]

    def function(m: Tensor, v: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
        options = dict(zip(names, prior, strict=True)) | {"seed": 8, "kl_reduction": kl_reduction}
        if moments:
            return ops.reparameterize_kl_from_moments(torch.cat([m, v], 1), **options)
        return ops.reparameterize_kl(m, v, **options)

    with use_backend(backend):
        mine = graded(function, *inputs)
    truth = graded(lambda *x: exact(*x, names=names, kl_reduction=kl_reduction), *(x.double() for x in inputs))
    assert_exact(mine, truth)


# Rows of a unit, units of a job, several slabs, pieces of a row, and no examples or columns at all.
SIZES = [(1, 1), (300, 3), (5000, 4), (3, 2500), (40, 1030), (0, 5), (4, 0)]


@pytest.mark.parametrize("backend", ["reference", "rust"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_sizes_of_a_shared_prior(size: tuple[int, int], backend: str) -> None:
    inputs = [torch.randn(size), torch.randn(size), torch.randn(size[1]), torch.randn(1, size[1])]
    with use_backend(backend):
        mine = graded(ours, *inputs)
    truth = graded(exact, *(x.double() for x in inputs))
    for a, b in zip(mine, truth, strict=True):
        assert a.shape == b.shape
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("backend", ["reference", "rust"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_dtypes(dtype: torch.dtype, wide: bool, backend: str) -> None:
    """A prior of the moments' dtype, and one of float32, whose gradients are not rounded to it."""
    own = torch.float32 if wide else dtype
    inputs = [
        torch.randn(6, 9).to(dtype),
        torch.randn(6, 9).to(dtype),
        torch.randn(9).to(own),
        torch.randn(6, 9).to(own),
    ]
    with use_backend(backend):
        mine = graded(ours, *inputs)
    assert [x.dtype for x in mine[2:]] == [dtype, dtype, own, own]
    assert_exact(mine, graded(exact, *(x.double() for x in inputs)), dtype)


def test_threads_change_no_bit() -> None:
    inputs = [torch.randn(2000, 33), torch.randn(2000, 33), torch.randn(33), torch.randn(33)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with use_backend("rust"):
                results.append(graded(ours, *inputs))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_shared_prior_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = torch.randn(6, 3, 4)
    for shape in ((), (4,), (3, 1), (1, 3, 4)):
        assert _rows(torch.zeros(shape), mean, 1).shape == (1, 12)
    assert _rows(torch.zeros(6, 1, 1), mean, 1).shape == (6, 12)
    prior = torch.randn(6, 3, 8).chunk(2, 2)[1].reshape(6, 12)
    assert _rows(prior, mean.flatten(1), 1).data_ptr() == prior.data_ptr()
    # what reaches the kernel, and what comes back from it
    seen = []
    kernel = _reparameterize_kl._rust.core.reparameterize_kl_backward
    monkeypatch.setattr(
        _reparameterize_kl._rust.core,
        "reparameterize_kl_backward",
        lambda *args: (seen.append((args[4], args[11])), kernel(*args))[1],
    )
    shared = torch.zeros(4, requires_grad=True)
    with use_backend("rust"):
        ops.reparameterize_kl(mean, mean, prior_mean=shared)[1].sum().backward()
    ((((span, stride, _), absent), ((gradient, _), missing)),) = seen
    assert (span[1], stride, gradient[1]) == (12, 0, 12)
    assert absent is missing is None


def test_a_fixed_prior_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, seen = torch.randn(3, 4, requires_grad=True), []
    kernel = _reparameterize_kl._rust.core.reparameterize_kl_backward
    monkeypatch.setattr(
        _reparameterize_kl._rust.core,
        "reparameterize_kl_backward",
        lambda *args: (seen.append(args[11]), kernel(*args))[1],
    )
    with use_backend("rust"):
        ops.reparameterize_kl(mean, mean, prior_mean=torch.randn(4))[1].sum().backward()
    assert seen == [[None, None]]


@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_strided_prior(backend: str) -> None:
    """The halves of what a prior network gives, a transposed and an expanded one, as they would be in a copy."""
    mean, logvar = torch.randn(6, 5), torch.randn(6, 5)
    with use_backend(backend):
        for first, second in (torch.randn(6, 10).chunk(2, 1), (torch.randn(5, 6).t(), torch.randn(6, 1).expand(6, 5))):
            views = graded(ours, mean, logvar, first, second)
            copies = graded(ours, mean, logvar, first.contiguous(), second.contiguous())
            assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))


@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_equal_distributions_have_no_divergence(backend: str) -> None:
    mean, logvar = torch.randn(4, 9) * 100, torch.randn(4, 9) * 20
    with use_backend(backend):
        _, kl = ops.reparameterize_kl(mean, logvar, prior_mean=mean, prior_logvar=logvar)
        _, near = ops.reparameterize_kl(mean, logvar + 1e-3, prior_mean=mean, prior_logvar=logvar)
    assert kl.tolist() == [0.0] * 4
    ratio = (logvar + 1e-3).double() - logvar.double()  # as it is rounded
    torch.testing.assert_close(near.double(), 0.5 * (torch.expm1(ratio) - ratio).sum(1), rtol=0, atol=2e-8)


@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_nan_and_infinity_stay_in_their_rows(backend: str) -> None:
    mean, logvar, prior = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5)
    mean[1, 2], mean[2, 0], prior[3, 1] = math.nan, math.inf, math.nan
    inputs = [x.requires_grad_() for x in (mean, logvar, prior)]
    with use_backend(backend):
        z, kl = ops.reparameterize_kl(mean, logvar, prior_mean=prior, seed=1)
    assert kl.isnan().tolist() == [False, True, False, True]
    assert kl[2] == math.inf
    grads = torch.autograd.grad(z.sum() + kl.sum(), inputs)
    assert all(grad[0].isfinite().all() for grad in grads)
    assert grads[2].isnan().nonzero().tolist() == [[1, 2], [3, 1]]


@pytest.mark.parametrize(("which", "backend"), [(0, "rust"), (1, "rust"), (1, "reference")])
def test_second_derivatives_of_each_output_alone(which: int, backend: str) -> None:
    shapes = [(3, 4), (3, 4), (4,), (3, 4)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with use_backend(backend):
        function = lambda *x: ours(*x, num_samples=2)[which]  # noqa: E731
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
