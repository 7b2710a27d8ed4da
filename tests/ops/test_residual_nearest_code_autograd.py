"""Gradients of `residual_nearest_code`, and how it goes through torch: opcheck, compile, export, vmap, checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ferrovae import use_backend
from ferrovae.ops import residual_nearest_code

BACKENDS = ("reference", "rust")


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["separate", "shared", "groups", "list"])
def test_gradients_go_to_the_chosen_codes(kind, backend):
    x, stages = torch.randn(2, 30, 4), torch.randint(0, 4, (30,))
    leaves = {
        "separate": [torch.randn(3, 9, 4)],
        "shared": [torch.randn(9, 4)],
        "groups": [torch.randn(2, 3, 9, 4)],
        "list": [torch.randn(k, 4) for k in (9, 5, 1)],
    }[kind]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    books = {"shared": lambda: leaves[0].expand(3, 9, 4), "list": lambda: leaves}.get(kind, lambda: leaves[0])()
    with use_backend(backend):
        indices, quantized, codes = residual_nearest_code(x, books, stages=stages, return_stages=True)
    of_quantized, of_codes = torch.randn(2, 30, 4), torch.randn(2, 30, 3, 4)
    found = torch.autograd.grad((quantized * of_quantized).sum() + (codes * of_codes).sum(), leaves)

    # The same function of the codebooks, written with plain gathers, in float64.
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    total = 0.0
    for group in range(2):
        for stage in range(3):
            book = {"shared": lambda: wide[0], "list": lambda stage=stage: wide[stage]}.get(
                kind, lambda group=group, stage=stage: wide[0][group, stage] if kind == "groups" else wide[0][stage]
            )()
            reached = indices[group, :, stage] >= 0
            code = book[indices[group, reached, stage]]
            total = total + (code * (of_quantized[group] + of_codes[group, :, stage])[reached].double()).sum()
    for ours, truth in zip(found, torch.autograd.grad(total, wide), strict=True):
        torch.testing.assert_close(ours, truth.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    x, stages = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 3, (8,))
    books = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def function(books):
        return residual_nearest_code(x, books, stages=stages, return_stages=True)[1:]

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, books)
        assert torch.autograd.gradgradcheck(function, books)


def test_no_gradient_in_x():
    x, books = torch.randn(6, 3, requires_grad=True), torch.randn(2, 5, 3)
    indices, quantized = residual_nearest_code(x, books)
    assert not quantized.requires_grad
    indices, quantized = residual_nearest_code(x, books.requires_grad_())
    assert not indices.requires_grad
    quantized.sum().backward()
    assert x.grad is None
    assert books.grad.sum(1).eq(6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_no_rows_are_zero(backend):
    books = torch.randn(2, 5, 3, requires_grad=True)
    with use_backend(backend):
        residual_nearest_code(torch.empty(0, 3), books)[1].sum().backward()
    assert books.grad.eq(0).all()


def test_half_precision_codebooks_get_their_own_gradients():
    books = torch.randn(2, 5, 3, dtype=torch.bfloat16, requires_grad=True)
    residual_nearest_code(torch.randn(7, 3), books)[1].sum().backward()
    assert books.grad.dtype == torch.bfloat16
    assert books.grad.sum(1).eq(7).all()


def test_backward_stays_on_the_forward_backend():
    books = torch.randn(2, 5, 3, requires_grad=True)
    with use_backend("reference"):
        quantized = residual_nearest_code(torch.randn(7, 3), books)[1]
    with use_backend("triton"):
        quantized.sum().backward()
    assert books.grad is not None


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "stages",
        "shared",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("strided", "empty", "double")),
    ],
)
def test_opcheck(case):
    x, books, stages, keep = torch.randn(2, 6, 3), torch.randn(2, 3, 5, 3), None, True
    if case == "stages":
        stages, keep = torch.randint(0, 4, (2, 6)), False
    elif case == "shared":
        books = books[:, :1].expand(2, 3, 5, 3)
    elif case == "strided":
        x, books = torch.randn(3, 6, 2).permute(2, 1, 0), torch.randn(3, 5, 3, 2).permute(3, 0, 1, 2)
    elif case == "empty":
        x = x[:, :0]
    elif case == "double":
        x, books = x.double(), books.double()
    books.requires_grad_()
    operations = torch.ops.ferrovae
    torch.library.opcheck(operations.residual_nearest_code.default, (x, books, stages, "euclidean", keep, "auto"))
    with torch.no_grad():
        quantized, codes, indices = operations.residual_nearest_code(x, books, stages, "cosine", keep, "auto")
    gradients = torch.randn_like(quantized).requires_grad_(), torch.randn_like(codes).requires_grad_()
    torch.library.opcheck(operations.residual_nearest_code_backward.default, (*gradients, indices, 5, "auto"))


def test_compiled_once_for_every_batch_size():
    counter = CompileCounterWithBackend("aot_eager")
    books = torch.randn(3, 11, 4, requires_grad=True)

    def function(x, stages):
        indices, quantized, codes = residual_nearest_code(x * 2, books, stages=stages, return_stages=True)
        return indices, quantized.exp() + codes.square().sum(1)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 8, 13, 21, 34):
        x, stages = torch.randn(rows, 4), torch.randint(0, 4, (rows,))
        results = []
        for run in (function, compiled):
            indices, values = run(x, stages)
            results.append((indices, values.detach(), torch.autograd.grad(values.sum(), books)[0]))
        assert torch.equal(results[0][0], results[1][0])
        for eager, ours in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1


class Quantizer(torch.nn.Module):
    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.books = torch.nn.ParameterList(torch.randn(size, 4) for size in sizes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return residual_nearest_code(x, list(self.books))


def test_exported_with_any_batch_size():
    module = Quantizer((7, 3))
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(module, (torch.randn(5, 6, 4),), dynamic_shapes=(batch,))
    x = torch.randn(9, 6, 4)
    assert all(torch.equal(*pair) for pair in zip(program.module()(x), module(x), strict=True))


@pytest.mark.parametrize(("of_x", "of_books", "of_stages"), [(0, None, None), (1, None, 0), (None, 0, None), (1, 1, 0)])
def test_vmap_is_a_loop(of_x, of_books, of_stages):
    x = torch.randn((3, 6, 4) if of_x == 0 else (6, 3, 4) if of_x == 1 else (6, 4))
    books = torch.randn((3, 2, 5, 4) if of_books == 0 else (2, 3, 5, 4) if of_books == 1 else (2, 5, 4))
    stages = torch.randint(0, 3, (3, 6) if of_stages == 0 else (6,))
    dims = (of_x, of_books, of_stages)

    def function(x, books, stages):
        return residual_nearest_code(x, books, stages=stages, return_stages=True)

    found = torch.vmap(function, dims)(x, books, stages)
    inputs = list(zip((x, books, stages), dims, strict=True))
    for at in range(3):
        own = [value if dim is None else value.select(dim, at) for value, dim in inputs]
        for part, alone in zip(found, function(*own), strict=True):
            assert torch.equal(part[at], alone)


def test_many_gradients_at_once():
    books = torch.randn(2, 5, 3, requires_grad=True)
    values = residual_nearest_code(torch.randn(7, 3), books, return_stages=True)[1:]
    weights = torch.randn(4, 7, 3), torch.randn(4, 7, 2, 3)
    (found,) = torch.autograd.grad(values, books, weights, is_grads_batched=True, retain_graph=True)
    for at in range(4):
        own = [weight[at] for weight in weights]
        assert torch.equal(found[at], torch.autograd.grad(values, books, own, retain_graph=True)[0])


def test_checkpoint_gives_the_same_gradient():
    x, books = torch.randn(20, 4), torch.randn(2, 9, 4, requires_grad=True)

    def function(books):
        return residual_nearest_code(x, books * 2)[1].square().sum()

    (expected,) = torch.autograd.grad(function(books), books)
    repeated = torch.utils.checkpoint.checkpoint(function, books, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(repeated, books)[0], expected)
