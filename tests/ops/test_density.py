"""What holds for every log-likelihood of independent dimensions, on the reference and on Rust."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ferrovae import use_backend
from ferrovae.ops import BackendWarning, _backend
from ferrovae.ops._registry import operations
from ops.densities import FAMILIES, Family


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(params=["reference", "rust"])
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def truth(family: Family, *tensors: torch.Tensor) -> torch.Tensor:
    """Per element, in float64."""
    return family.truth(*(tensor.double() for tensor in tensors))


def assert_close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-6) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=relative, atol=relative)


def gradients(value: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    weights = torch.arange(1, value.numel() + 1).view(value.shape)
    return torch.autograd.grad((value * weights).sum(), leaves)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("columns", [1, 16, 17, 255, 257, 790])
def test_rows_and_gradients_against_float64(family: Family, backend: str, columns: int) -> None:
    x, *parameters = family.draw(3, columns)
    ours, exact = leaves(*parameters), leaves(*(parameter.double() for parameter in parameters))
    value, expected = family.operation(x, *ours), truth(family, x, *exact).sum(1)
    assert (value.dtype, value.shape) == (torch.float32, (3,))
    assert_close(value, expected)
    for mine, theirs in zip(gradients(value, ours), gradients(expected, exact), strict=True):
        assert_close(mine, theirs, 2e-6)


def test_very_long_rows(family: Family) -> None:
    tensors = family.draw(2, 196_608)
    assert_close(family.operation(*tensors), truth(family, *tensors).sum(1), 1e-7)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (0,), (1, 1)])
def test_empty_and_single(family: Family, backend: str, shape: tuple[int, ...]) -> None:
    x, *parameters = family.draw(*shape)
    ours = leaves(*parameters)
    value = family.operation(x, *ours)
    expected = truth(family, x, *parameters)
    assert_close(value, expected.sum(tuple(range(1, len(shape)))) if len(shape) > 1 else expected)
    for leaf, gradient in zip(ours, gradients(value, ours), strict=True):
        assert gradient.shape == leaf.shape


def test_keeping_no_or_all_dimensions(family: Family, backend: str) -> None:
    tensors = family.draw(4, 3)
    assert_close(family.operation(*tensors, batch_dims=2), truth(family, *tensors))
    total = family.operation(*tensors, batch_dims=0)
    assert total.shape == ()
    assert_close(total, truth(family, *tensors).sum())


def test_samples_share_their_data(family: Family, backend: str) -> None:
    x, *_ = family.draw(3, 2, 7)
    _, *parameters = family.draw(5, 3, 2, 7)
    expected = truth(family, x, *parameters).sum((2, 3))
    for data in (x, x[None], x.expand(5, 3, 2, 7)):
        assert_close(family.operation(data, *parameters, batch_dims=2), expected)


@pytest.mark.parametrize(
    "shape", [(), (1,), (4,), (2, 1), (2, 4), (3, 1, 1), (3, 2, 4), (5, 1, 1, 1), (5, 1, 2, 4), (1, 3, 1, 4)]
)
def test_second_parameters_broadcast_and_their_gradients_are_summed(backend: str, shape: tuple[int, ...]) -> None:
    for family in (FAMILIES["gaussian"], FAMILIES["negative_binomial"]):
        x, *_ = family.draw(3, 2, 4)
        _, first, _ = family.draw(5, 3, 2, 4)
        ours, exact = leaves(first, torch.randn(shape)), leaves(first.double())
        exact.append(ours[1].detach().double().requires_grad_())
        value = family.operation(x, *ours, batch_dims=2)
        expected = truth(family, x.expand(5, 3, 2, 4), *exact).sum((2, 3))
        assert_close(value, expected)
        for mine, theirs in zip(gradients(value, ours), gradients(expected, exact), strict=True):
            assert mine.shape == theirs.shape
            assert_close(mine, theirs, 4e-6)


def test_gradients_in_the_data(backend: str) -> None:
    for name in ("gaussian", "continuous_bernoulli", "poisson", "negative_binomial"):
        family = FAMILIES[name]
        for shape in ((3, 7), (1, 3, 7)):
            x, *_ = family.draw(*shape, dtype=torch.float64)
            _, *parameters = family.draw(5, 3, 7, dtype=torch.float64)
            ours, exact = x.clone().requires_grad_(), x.clone().requires_grad_()
            value = family.operation(ours, *parameters, batch_dims=2)
            expected = family.truth(exact.expand(5, 3, 7), *parameters).sum(2)
            assert_close(gradients(value, [ours])[0], gradients(expected, [exact])[0], 1e-9)


def test_derivatives_of_first_and_second_order(family: Family, backend: str) -> None:
    x, *_ = family.draw(2, 3, dtype=torch.float64)
    if "binomial" in family.name or "poisson" in family.name:
        x += 0.3  # inside the support: below 0 the log-probability jumps
    _, *parameters = family.draw(2, 2, 3, dtype=torch.float64)
    if len(parameters) == 2:
        parameters[1] = torch.randn(2, 1, dtype=torch.float64)
    inputs = tuple(leaves(x, *parameters))
    function = lambda *tensors: family.operation(*tensors, batch_dims=2)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_parameters(family: Family, backend: str, dtype: torch.dtype) -> None:
    x, *parameters = family.draw(3, 101)
    ours = leaves(*(parameter.to(dtype) for parameter in parameters))
    exact = leaves(*(parameter.detach().double() for parameter in ours))
    value, expected = family.operation(x, *ours), truth(family, x, *exact).sum(1)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(value, expected, 1e-13 if dtype == torch.float64 else 1e-6)
    step = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-11}[dtype]
    for mine, theirs in zip(gradients(value, ours), gradients(expected, exact), strict=True):
        assert mine.dtype == dtype
        assert_close(mine, theirs, step)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float64])
def test_other_data(family: Family, backend: str, dtype: torch.dtype) -> None:
    x, *parameters = family.draw(3, 101)
    x = (x > x.mean()).float()
    assert torch.equal(family.operation(x.to(dtype), *parameters), family.operation(x, *parameters))


def test_parameters_of_two_dtypes(backend: str) -> None:
    family = FAMILIES["gaussian"]
    x, mean, log_sigma = family.draw(3, 11)
    ours = leaves(mean.bfloat16(), log_sigma[0].double())
    value = family.operation(x, *ours)
    assert value.dtype == torch.float32
    assert_close(value, truth(family, x, *ours).sum(1))
    assert [gradient.dtype for gradient in gradients(value, ours)] == [torch.bfloat16, torch.float64]


def test_autocast_changes_nothing(family: Family) -> None:
    tensors = family.draw(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        ours = family.operation(*tensors)
    assert torch.equal(ours, family.operation(*tensors))


def test_strides_do_not_matter(family: Family, backend: str) -> None:
    tensors = family.draw(6, 4, 10)
    strided = [tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0) for tensor in tensors]
    ours = leaves(*strided[1:])
    value = family.operation(strided[0], *ours)
    assert_close(value, truth(family, *tensors).sum((1, 2)))
    value.backward(torch.ones(()).expand(6))
    exact = leaves(*(tensor.double() for tensor in tensors[1:]))
    truth(family, tensors[0], *exact).sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert_close(mine.grad, theirs.grad, 2e-6)


def test_nan_spoils_its_own_row_only(family: Family, backend: str) -> None:
    tensors = family.draw(6, 37)
    for number, tensor in enumerate(tensors):
        tensor[number + 1, 36 - number] = math.nan
        tensor[0, 5] = tensor[0, 4]
    spoiled = family.operation(*tensors).isnan().tolist()
    assert spoiled == [0 < row <= len(tensors) for row in range(6)]


def test_every_result_is_written(family: Family, backend: str, nan_filled_empty: None) -> None:
    x, *parameters = family.draw(7, 33)
    for other in ([*parameters], [parameters[0], *(p[0, 0] for p in parameters[1:])]):
        ours = leaves(*other)
        value = family.operation(x, *ours)
        assert value.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(value, ours))


def test_an_unwanted_gradient_is_not_computed(backend: str) -> None:
    for name in ("gaussian", "negative_binomial"):
        family = FAMILIES[name]
        x, first, second = family.draw(3, 5)
        both = gradients(family.operation(x, *(ours := leaves(first, second))), ours)
        for number in (0, 1):
            alone = [first, second]
            alone[number] = leaves(alone[number])[0]
            assert torch.equal(gradients(family.operation(x, *alone), [alone[number]])[0], both[number])


def test_backward_stays_on_the_forward_backend(family: Family) -> None:
    x, *parameters = family.draw(2, 3)
    ours = leaves(*parameters)
    with use_backend("reference"):
        value = family.operation(x, *ours)
    with use_backend("triton"):
        value.sum().backward()
    assert all(leaf.grad is not None for leaf in ours)


def test_threads_change_no_bit(family: Family) -> None:
    x, *parameters = family.draw(60, 1500)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ours = leaves(*parameters)
            value = family.operation(x, *ours)
            results.append([value, *gradients(value, ours)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "case"),
    [("gaussian", "samples"), ("poisson", "strided"), ("negative_binomial", "empty")]
    + [
        pytest.param(name, case, marks=pytest.mark.slow)
        for name in FAMILIES
        for case in ("samples", "strided", "empty")
    ],
)
def test_opcheck(name: str, case: str) -> None:
    family = FAMILIES[name]
    x, *_ = family.draw(3, 5)
    _, *parameters = family.draw(4, 3, 5)
    batch_dims = 2
    if case == "strided":
        parameters = [parameter.transpose(0, 1).contiguous().transpose(0, 1) for parameter in parameters]
        x = x.T.contiguous().T.expand(4, 3, 5)
    elif case == "empty":
        x, parameters, batch_dims = x[:0], [parameter[:, :0] for parameter in parameters], 1
        x = x.expand(4, 0, 5)
    if len(parameters) == 2 and case == "samples":
        parameters[1] = parameters[1][0, :, :1]
    grad = torch.randn(parameters[0].shape[:batch_dims]).requires_grad_()
    tensors = (*(parameter.detach().requires_grad_() for parameter in parameters), x.detach().requires_grad_())
    forward, backward = (getattr(torch.ops.ferrovae, family.name + suffix).default for suffix in ("", "_backward"))
    torch.library.opcheck(forward, (*tensors, batch_dims, "auto"))
    wanted = (1 << len(parameters)) - 1
    torch.library.opcheck(backward, (*tensors, grad, batch_dims, wanted, "auto"))


def test_one_dynamic_graph_for_all_batch_sizes(family: Family) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *tensors: family.operation(*tensors).exp(), fullgraph=True, dynamic=True, backend=counter
    )
    for size in (2, 3, 5, 8, 13):
        x, *parameters = family.draw(size, 7)
        if len(parameters) == 2:
            parameters[1] = parameters[1][0]
        ours, eager = leaves(*parameters), leaves(*parameters)
        value, expected = compiled(x, *ours), family.operation(x, *eager).exp()
        torch.testing.assert_close(value, expected)
        for mine, theirs in zip(gradients(value, ours), gradients(expected, eager), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == 1


def test_exported(family: Family) -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:
            return family.operation(*tensors)

    tensors = family.draw(3, 5)
    exported = torch.export.export(Module(), tensors).module()
    other = family.draw(3, 5)
    torch.testing.assert_close(exported(*other), family.operation(*other))


@pytest.mark.parametrize("shared", [True, False])
def test_vmap(family: Family, shared: bool) -> None:
    x, *_ = family.draw(3, 5) if shared else family.draw(4, 3, 5)
    _, *parameters = family.draw(3, 4, 5)
    in_dims = (None if shared else 0, *(1 for _ in parameters))
    ours = torch.vmap(family.operation, in_dims)(x, *parameters)
    whole = [parameter.movedim(1, 0) for parameter in parameters]
    torch.testing.assert_close(ours, family.operation(x, *whole, batch_dims=2))
    leaf = leaves(*whole)
    value = family.operation(x, *leaf, batch_dims=2)
    weights = torch.randn(6, *value.shape)
    together = torch.autograd.grad(value, leaf, weights, retain_graph=True, is_grads_batched=True)
    for number, weight in enumerate(weights):
        for mine, theirs in zip(together, torch.autograd.grad(value, leaf, weight, retain_graph=True), strict=True):
            torch.testing.assert_close(mine[number], theirs)


def test_checkpointed(family: Family) -> None:
    x, *parameters = family.draw(3, 5)
    ours, again = leaves(*parameters), leaves(*parameters)
    value = torch.utils.checkpoint.checkpoint(family.operation, x, *ours, use_reentrant=False)
    expected = family.operation(x, *again)
    for mine, theirs in zip(gradients(value, ours), gradients(expected, again), strict=True):
        assert torch.equal(mine, theirs)


def test_errors_name_the_argument(family: Family) -> None:
    x, *parameters = family.draw(3, 5)
    first, name = family.parameters[0], family.name
    verb = "are" if first == "logits" else "is"
    cases: list[tuple[Any, list[Any], int, type[Exception], str]] = [
        (x[:, :4], parameters, 1, ValueError, rf"x is \(3, 4\), expected \(3, 5\) to match {first}"),
        (x[0], parameters, 1, ValueError, r"x is \(5,\), expected \(3, 5\)"),
        (x, parameters, 3, ValueError, rf"batch_dims is 3, expected 0 to 2 for {first} \(3, 5\)"),
        (x, [parameters[0].long(), *parameters[1:]], 1, TypeError, f"{first} {verb} torch.int64, expected float32"),
        (x.to(torch.complex64), parameters, 1, TypeError, "x is torch.complex64"),
        ([0.0], parameters, 1, TypeError, "x is a list, expected a tensor"),
        (x, [2.0, *parameters[1:]], 1, TypeError, f"{first} is a float, expected a tensor"),
        (x.to("meta"), parameters, 1, ValueError, f"x is on meta, expected cpu, where {first} {verb}"),
    ]
    if len(parameters) == 2:
        second = family.parameters[1]
        cases += [
            (x, [parameters[0], 1.0], 1, TypeError, f"{second} is a float, expected a tensor"),
            (x, [parameters[0], parameters[1].int()], 1, TypeError, f"{second} is torch.int32, expected float32"),
            (x, [parameters[0], parameters[1][:, :2]], 1, ValueError, rf"{second} is \(3, 2\), expected a shape that"),
            (x, [parameters[0], parameters[1].to("meta")], 1, ValueError, f"{second} is on meta, expected cpu"),
        ]
    for data, values, batch_dims, error, message in cases:
        with pytest.raises(error, match=f"^{name}: {message}"):
            family.operation(data, *values, batch_dims=batch_dims)


def test_a_device_without_a_kernel_of_its_own_runs_the_reference_without_a_warning(family: Family) -> None:
    operation = operations[family.name]
    assert operation.backend_for("cuda", torch.float32) == "reference"  # a warning would be an error
    assert operation.backend_for("cpu", torch.float32) == "rust"
    with pytest.raises(RuntimeError, match=f"^{family.name}: backend 'triton' .* it has no triton kernel"):
        operation.backend_for("cuda", torch.float32, "triton")
    with pytest.warns(BackendWarning, match="its rust kernel does not take torch.int8"):
        assert (
            _backend.resolve(f"beside {family.name}", "auto", "cpu", torch.int8, (("rust", frozenset()),))
            == "reference"
        )
