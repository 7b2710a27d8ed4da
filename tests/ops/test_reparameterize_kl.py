"""`reparameterize_kl` against closed forms in float64: values, gradients, shapes, randomness, arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ferrovae import ops, use_backend
from ferrovae.ops import _philox, _reparameterize_kl
from ferrovae.ops._registry import Kernel

BACKENDS = ["reference", "rust"]
SHAPES = [(0, 4), (4, 0), (1, 1), (3, 2), (17, 63), (64, 8), (5, 3, 7), (2, 2500)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def noise(seed: int, ids: Tensor, samples: int, columns: int, first: int = 0) -> Tensor:
    """eps [S, N, D] in float64."""
    return _philox.normals(torch.tensor([seed]), ids, torch.arange(first, first + samples), columns).double()


def truth(mean: Tensor, logvar: Tensor, eps: Tensor, batch_dims: int = 1) -> tuple[Tensor, Tensor]:
    """The definition, in float64; eps [S, ...] or [...]."""
    kl = 0.5 * (mean.square() + torch.expm1(logvar) - logvar)
    return mean + torch.exp(logvar / 2) * eps, kl.flatten(batch_dims).sum(-1) if kl.ndim > batch_dims else kl


def graded(function, *inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients of a fixed linear form of them."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    weights = [(torch.arange(out.numel()) % 7 - 2.0).reshape(out.shape) for out in outputs]  # exact in every dtype
    loss = sum((out.double() * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return [out.detach() for out in outputs] + list(torch.autograd.grad(loss, leaves))


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extreme", [-80.0, 80.0])
def test_extreme_variances(extreme: float, dtype: torch.dtype, backend: str) -> None:
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


PRIORS = [((5,), (5,)), ((), (3, 5)), ((3, 1), None), (None, (7, 1, 1)), ((7, 3, 5), (1,))]


@pytest.mark.parametrize("shapes", PRIORS)
@pytest.mark.parametrize("kl_reduction", ["example", "element"])
@pytest.mark.parametrize("moments", [False, True])
def test_learned_prior(shapes: tuple[tuple[int, ...] | None, ...], kl_reduction: str, moments: bool) -> None:
    mean, logvar = torch.randn(7, 3, 5), torch.randn(7, 3, 5)
    given = [torch.randn(shape) for shape in shapes if shape is not None]
    names = [name for name, shape in zip(("prior_mean", "prior_logvar"), shapes, strict=True) if shape is not None]

    def ours(m: Tensor, v: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
        options = dict(zip(names, prior, strict=True)) | {"seed": 8, "kl_reduction": kl_reduction}
        if moments:
            return ops.reparameterize_kl_from_moments(torch.cat([m, v], 1), **options)
        return ops.reparameterize_kl(m, v, **options)

    def exact(m: Tensor, v: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
        values = dict(zip(names, prior, strict=True))
        zero = torch.zeros((), dtype=torch.float64)
        p = torch.distributions.Normal(values.get("prior_mean", zero), torch.exp(values.get("prior_logvar", zero) / 2))
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(m, torch.exp(v / 2)), p)
        z = truth(m, v, noise(8, torch.arange(7), 1, 15).reshape(m.shape))[0]
        return z, kl if kl_reduction == "element" else kl.flatten(1).sum(1)

    inputs = (mean, logvar, *given)
    for mine, expected in zip(graded(ours, *inputs), graded(exact, *(x.double() for x in inputs)), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-4)


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
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("learned", [False, True])
def test_opcheck(layout: str, learned: bool) -> None:
    mean, logvar = (tensor.requires_grad_() for tensor in layouts()[layout])
    prior = (torch.randn(1, 5, requires_grad=True), torch.randn_like(mean, requires_grad=True)) if learned else (None,) * 2
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


@pytest.mark.parametrize("moments", [False, True])
def test_compiles_without_graph_breaks_for_any_batch_size(moments: bool) -> None:
    torch.compiler.reset()

    def step(mean: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        if moments:
            return ops.reparameterize_kl_from_moments(torch.cat([mean, logvar], 1), seed=seed, num_samples=2)
        return ops.reparameterize_kl(mean, logvar, seed=seed, num_samples=2)

    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=frames)
    for batch in (4, 5, 9, 17):
        inputs = [torch.randn(batch, 6), torch.randn(batch, 6)]
        seed = torch.tensor([batch])
        ours = graded(lambda m, v, seed=seed: compiled(m, v, seed), *inputs)
        eager = graded(lambda m, v, seed=seed: step(m, v, seed), *inputs)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    assert frames.frame_count <= 2


def test_compiled_calls_draw_new_seeds() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.reparameterize_kl(x, x)[0], fullgraph=True, backend="aot_eager")
    zeros = torch.zeros(2, 3)
    torch.manual_seed(1)
    first, second = compiled(zeros), compiled(zeros)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(zeros))
    assert not torch.equal(first, second)


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


def test_checkpointing_draws_the_same_noise() -> None:
    from torch.utils.checkpoint import checkpoint

    mean = torch.randn(4, 3, requires_grad=True)
    grads = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(5)
        z = run(lambda x: ops.reparameterize_kl(x, x)[0].square(), mean)
        grads.append(torch.autograd.grad(z.sum(), mean)[0])
    assert torch.equal(*grads)
