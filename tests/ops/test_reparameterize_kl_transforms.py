"""`reparameterize_kl` under torch's machinery: compile, export, vmap, checkpointing, autocast, CUDA graphs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ferrovae import ops, use_backend
from ferrovae.ops import _triton
from ops.reparameterize_kl_truth import graded


def of_moments(mean: Tensor, logvar: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return ops.reparameterize_kl_from_moments(torch.cat([mean, logvar], 1), **options)


@pytest.mark.parametrize("function", [ops.reparameterize_kl, of_moments])
def test_one_graph_for_any_batch_size(function: Any) -> None:
    torch.compiler.reset()

    def step(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor, seed: Tensor) -> Any:
        options = {"prior_mean": prior_mean, "prior_logvar": prior_logvar, "seed": seed, "num_samples": 2}
        return function(mean, logvar, **options)

    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=frames)
    for batch in (4, 5, 9, 17, 33):
        inputs = [torch.randn(shape) for shape in ((batch, 6), (batch, 6), (6,), (batch, 6))]
        seed = torch.tensor([batch])
        ours = graded(lambda *x, seed=seed: compiled(*x, seed), *inputs)
        eager = graded(lambda *x, seed=seed: step(*x, seed), *inputs)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    assert frames.frame_count == 1


def test_compiled_calls_draw_new_seeds() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.reparameterize_kl(x, x)[0], fullgraph=True, backend="aot_eager")
    zeros = torch.zeros(2, 3)
    torch.manual_seed(1)
    first, second = compiled(zeros), compiled(zeros)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(zeros))
    assert not torch.equal(first, second)


class Latents(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prior_mean = torch.nn.Parameter(torch.randn(3, 1))

    def forward(self, moments: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        return ops.reparameterize_kl_from_moments(moments, seed=seed, prior_mean=self.prior_mean)


def test_export() -> None:
    module, seed = Latents(), torch.tensor([4])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (torch.randn(4, 6, 5), seed), dynamic_shapes=({0: batch}, None))
    for size in (4, 9):
        moments = torch.randn(size, 6, 5)
        for ours, eager in zip(program.module()(moments, seed), module(moments, seed), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_noise(use_reentrant: bool) -> None:
    mean, prior = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)

    def loss(mean: Tensor, prior: Tensor) -> Tensor:
        z, kl = ops.reparameterize_kl(mean, mean, prior_mean=prior)
        return z.square().sum() + kl.sum()

    grads = []
    for run in (loss, lambda *x: checkpoint(loss, *x, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        value = run(mean, prior)
        value.backward()
        grads.append([value.detach(), *(leaf.grad.clone() for leaf in (mean, prior))])
        mean.grad = prior.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_changes_nothing() -> None:
    mean, prior = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        value = mean.to(dtype)
        plain = ops.reparameterize_kl(value, value, prior_logvar=prior, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = ops.reparameterize_kl(value, value, prior_logvar=prior, seed=1)
            (grad,) = torch.autograd.grad(sum(x.float().sum() for x in ours), prior)
        assert [x.dtype for x in ours] == [dtype, torch.float32]
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        assert torch.equal(grad, torch.autograd.grad(sum(x.float().sum() for x in plain), prior)[0])


# --- vmap ----------------------------------------------------------------------------------------------------------


NAMES = ("prior_mean", "prior_logvar")
VMAPS = [  # shapes and mapped dimensions of mean, logvar, and prior
    ([(3, 2, 5), (3, 2, 5)], (0, 0)),
    ([(2, 3, 5), (2, 5)], (1, None)),
    ([(3, 2, 5), (3, 2, 5), (5,), (3, 5)], (0, 0, None, 0)),
    ([(3, 2, 5), (2, 5), (5,), (1, 5)], (0, None, None, None)),
    ([(3, 2, 5), (2, 5), (2, 5), (2, 5, 3)], (0, None, None, 2)),
]


@pytest.mark.parametrize(("shapes", "dims"), VMAPS)
@pytest.mark.parametrize("function", [ops.reparameterize_kl, of_moments])
@pytest.mark.parametrize("options", [{}, {"num_samples": 2, "kl_reduction": "element"}])
def test_vmap_is_a_loop(shapes: list, dims: tuple, function: Any, options: dict) -> None:
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    call = lambda m, v, *prior: function(m, v, **dict(zip(NAMES, prior, strict=False)), **options, seed=3)  # noqa: E731
    mapped = torch.vmap(call, in_dims=dims)(*inputs)
    loop = [
        call(*(x if dim is None else x.select(dim, at) for x, dim in zip(inputs, dims, strict=True))) for at in range(3)
    ]
    stacked = [torch.stack(outputs) for outputs in zip(*loop, strict=True)]
    weights = [torch.randn_like(output) for output in stacked]
    for ours, alone in zip(
        [*mapped, *torch.autograd.grad(mapped, inputs, weights)],
        [*stacked, *torch.autograd.grad(stacked, inputs, weights)],
        strict=True,
    ):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


BATCHED_GRADIENTS = [[(2, 5), (2, 5)], [(2, 5), (2, 5), (5,), (2, 5)], [(1, 5), (1, 5), (5,), (5,)]]


@pytest.mark.parametrize("shapes", BATCHED_GRADIENTS)
@pytest.mark.parametrize("function", [ops.reparameterize_kl, of_moments])
@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_many_gradients_of_one_call(shapes: list, function: Any, outputs: tuple[int, ...]) -> None:
    """As jacobians take them: the backward operation under vmap."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = function(*inputs[:2], **dict(zip(NAMES, inputs[2:], strict=False)), seed=3, num_samples=2)
    chosen = [results[at] for at in outputs]
    many = [torch.randn(4, *result.shape) for result in chosen]
    options = {"retain_graph": True, "allow_unused": True}
    batched = torch.autograd.grad(chosen, inputs, many, is_grads_batched=True, **options)
    for at in range(4):
        alone = torch.autograd.grad(chosen, inputs, [weights[at] for weights in many], **options)
        for ours, one in zip(batched, alone, strict=True):
            torch.testing.assert_close(ours[at], one)


def test_vmap_over_example_ids() -> None:
    mean, ids = torch.randn(2, 4), torch.arange(6).view(3, 2)
    z = torch.vmap(lambda i: ops.reparameterize_kl(mean, mean, seed=1, example_ids=i)[0])(ids)
    for call in range(3):
        assert torch.equal(z[call], ops.reparameterize_kl(mean, mean, seed=1, example_ids=ids[call])[0])


def test_vmap_randomness() -> None:
    zeros = torch.zeros(3, 2, 4)
    draw = lambda x: ops.reparameterize_kl(x, x)[0]  # noqa: E731
    same = torch.vmap(draw, randomness="same")(zeros)
    assert torch.equal(same[0], same[1])
    torch.manual_seed(2)
    different = torch.vmap(draw, randomness="different")(zeros)
    assert all(not torch.equal(different[a], different[b]) for a, b in itertools.combinations(range(3), 2))
    torch.manual_seed(2)
    assert torch.equal(different, torch.vmap(draw, randomness="different")(zeros))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(draw)(zeros)


# --- CUDA graphs ---------------------------------------------------------------------------------------------------


class Launches:
    """In place of a kernel: what it is launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *args, **_: None


def test_launches_read_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data the launchers still know their grids: from shapes only, the seed stays on the device."""
    if _triton.obstacle() is not None:
        pytest.skip("Triton is not installed")
    kernels = _triton.kernels("reparameterize_kl")
    forward, backward = Launches(), Launches()
    monkeypatch.setattr(kernels, "forward_kernel", forward)
    monkeypatch.setattr(kernels, "backward_kernel", backward)
    rows, seed = torch.empty(4000, 1, 64, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    shared = torch.empty(1, 64, device="meta")
    z, kl = kernels.forward(rows, rows, shared, None, seed, None, 2, 0, False)
    assert (z.shape, kl.shape) == ((2, 4000, 64), (4000,))
    kernels.backward(rows, rows, shared, None, z, kl, seed, None, 2, 0, rows, rows, shared, None)
    kernels.backward(rows, rows, None, None, z, kl, seed, None, 2, 0, rows, rows, None, None)
    assert forward.grids == [(125, 2)]
    assert backward.grids == [(250,), (125,)]


def test_seed_is_drawn_by_torch_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of torch's own random operations, which a captured graph draws anew in every replay."""
    drawn = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: (drawn.append(k["device"]), randint(*a, **k))[1])
    mean = torch.empty(2, 3, device="meta")
    with use_backend("reference"):
        z, kl = ops.reparameterize_kl(mean, mean)
    assert [device.type for device in drawn] == ["meta"]
    assert (z.shape, kl.shape) == ((2, 3), (2,))
