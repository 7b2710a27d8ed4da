"""`code_logsumexp` against float64: values, gradients of first and second order, and what is left out."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ferrovae import use_backend
from ferrovae.ops import code_logsumexp
from ops.soft_codes import METRICS, assert_like_truth, scores, value_and_gradients

SHAPES = [(1, 1, 1), (3, 17, 3), (40, 130, 8), (17, 1500, 5), (3, 64, 256)]
TRITON = [
    ((1, 1, 1), "dot"), ((3, 17, 3), "euclidean"), ((33, 65, 5), "euclidean"), ((40, 70, 2), "sqeuclidean"),
    ((5, 40, 70), "dot"), ((3, 9, 17), "cosine"),
]  # fmt: skip
warned = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(params=["reference", "rust"])
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def truth(x, codebook, temperature, metric="euclidean"):
    return scores(x, codebook, temperature, metric).logsumexp(-1)


def compare(inputs: tuple[torch.Tensor, ...], metric: str, tolerance: float = 2e-5) -> None:
    assert_like_truth(partial(code_logsumexp, metric=metric), partial(truth, metric=metric), inputs, tolerance)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), SHAPES)
def test_values_and_gradients_against_float64(backend: str, n: int, k: int, d: int, metric: str) -> None:
    compare((torch.randn(n, d), torch.randn(k, d), torch.tensor(0.7)), metric)


@warned
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("shape", "metric"), TRITON)
def test_triton_values_and_gradients_against_float64(shape: tuple[int, int, int], metric: str) -> None:
    n, k, d = shape
    with use_backend("triton"):
        compare((torch.randn(n, d), torch.randn(k, d), torch.tensor(0.7)), metric)


def hard(metric: str) -> tuple[torch.Tensor, ...]:
    """An offset of 100 standard deviations, rows on codes, codes twice."""
    offset = 100.0 if metric in ("euclidean", "sqeuclidean") else 0.0
    x, codebook = torch.randn(20, 6) + offset, torch.randn(40, 6) + offset
    codebook[9] = codebook[4]
    x[2], x[3] = codebook[7], codebook[9]
    return x, codebook, torch.tensor([0.5])


@pytest.mark.parametrize("metric", METRICS)
def test_offsets_rows_on_codes_and_duplicates(backend: str, metric: str) -> None:
    compare(hard(metric), metric, 5e-5)


@warned
def test_triton_offsets_rows_on_codes_and_duplicates() -> None:
    with use_backend("triton"):
        compare(hard("euclidean"), "euclidean", 5e-5)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 30.0])
def test_temperatures(backend: str, temperature: float) -> None:
    # At 1e-3 the result is of the order of 1e4, and so is its rounding.
    compare((torch.randn(20, 6), torch.randn(40, 6), torch.tensor(temperature)), "euclidean", 3e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_derivatives_of_first_and_second_order(metric: str) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 1, 2), (2, 3, 2))]
    inputs.append(torch.tensor(0.8, dtype=torch.float64, requires_grad=True))
    function = partial(code_logsumexp, metric=metric)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", ["reference", "rust", pytest.param("triton", marks=warned)])
def test_what_is_not_finite_is_left_out(name: str) -> None:
    x, codebook = torch.randn(7, 3), torch.randn(9, 3)
    good, known = x[[0, 2, 4, 6]].clone(), codebook[1:8].clone()
    x[1, 0], x[3, 2], x[5, 1] = float("nan"), float("inf"), -float("inf")
    codebook[0, 1], codebook[8, 0] = float("inf"), float("nan")
    with use_backend(name):
        value, of_x, of_codes, of_temperature = value_and_gradients(
            lambda *args: code_logsumexp(*args).masked_fill(torch.arange(7) % 2 == 1, 0.0),
            (x, codebook, torch.tensor(1.0)), torch.float32,
        )  # fmt: skip
        raw = code_logsumexp(x.requires_grad_(), codebook)
        (poisoned,) = torch.autograd.grad(raw.sum(), x)
    assert raw.isnan().tolist() == [False, True] * 3 + [False]
    torch.testing.assert_close(value[::2], truth(good, known, 1.0), rtol=1e-5, atol=1e-5)
    for gradient in (of_x[1::2], of_codes[[0, 8]], poisoned[1::2]):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert of_temperature.isfinite()
    assert of_codes.isfinite().all()
    with use_backend(name):
        assert code_logsumexp(x.detach(), torch.full((2, 3), torch.nan))[::2].tolist() == [-torch.inf] * 4


def test_heads_are_separate(backend: str) -> None:
    x, codebooks = torch.randn(3, 2, 5, 4), torch.randn(3, 7, 4)
    found = code_logsumexp(x, codebooks, 0.5)
    assert found.shape == (3, 2, 5)
    for head in range(3):
        assert torch.equal(found[head], code_logsumexp(x[head], codebooks[head], 0.5))


def test_no_rows_a_single_row_and_views(backend: str) -> None:
    codebook = torch.randn(6, 4, requires_grad=True)
    empty = torch.empty(2, 0, 4, requires_grad=True)
    code_logsumexp(empty, codebook).sum().backward()
    assert empty.grad.shape == (2, 0, 4)
    assert torch.equal(codebook.grad, torch.zeros(6, 4))
    assert code_logsumexp(torch.randn(4), codebook).shape == ()
    x, wide = torch.randn(4, 5), torch.randn(6, 8)
    strided = code_logsumexp(x.t(), wide[:, ::2])
    assert torch.equal(strided, code_logsumexp(x.t().contiguous(), wide[:, ::2].contiguous()))


def test_dtypes_and_autocast(backend: str) -> None:
    x, codebook = torch.randn(5, 4), torch.randn(6, 4)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype).requires_grad_()
        found = code_logsumexp(half, codebook)
        assert found.dtype == torch.float32
        assert torch.equal(found, code_logsumexp(half.float(), codebook))
        found.sum().backward()
        assert half.grad.dtype == dtype
    exact = code_logsumexp(x.double(), codebook)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, truth(x, codebook, 1.0), rtol=1e-14, atol=1e-14)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(code_logsumexp(x, codebook), code_logsumexp(x, codebook))
        assert code_logsumexp(x, codebook).dtype == torch.float32
    torch.testing.assert_close(code_logsumexp(x, codebook), exact.float(), rtol=1e-5, atol=1e-6)


def test_threads_change_no_bit() -> None:
    x, codebook = torch.randn(1000, 5), torch.randn(700, 5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(code_logsumexp(x, codebook))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", ["strided", "empty"])
def test_opcheck(case: str) -> None:
    x = torch.randn(2, 4, 5).transpose(1, 2) if case == "strided" else torch.randn(2, 0, 4)
    inputs = [tensor.detach().requires_grad_() for tensor in (x, torch.randn(2, 6, 4), torch.tensor(0.9))]
    torch.library.opcheck(torch.ops.ferrovae.code_logsumexp.default, (*inputs, "euclidean", "auto"))
    lse = code_logsumexp(*inputs).detach()
    arguments = (*(tensor.detach() for tensor in inputs), lse, torch.randn(lse.shape), "dot", "auto")
    torch.library.opcheck(torch.ops.ferrovae.code_logsumexp_backward.default, arguments)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codebook = torch.nn.Parameter(torch.randn(9, 4))
        self.temperature = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return code_logsumexp(x, self.codebook, self.temperature).mean()


def test_compiled_once_for_all_batch_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer, counter = Layer(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for size in (7, 3, 20, 11, 64):
        x = torch.randn(size, 4)
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            value = function(x)
            value.backward()
            results.append((value.detach(), layer.codebook.grad.clone(), layer.temperature.grad.clone()))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1


def test_exported() -> None:
    layer, x = Layer(), torch.randn(6, 4)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    other = torch.randn(11, 4)
    torch.testing.assert_close(program.module()(other), layer(other))


def test_vmap() -> None:
    x, codebook, temperatures = torch.randn(3, 5, 4), torch.randn(3, 6, 4), torch.tensor([0.5, 1.0, 2.0])
    rows = torch.vmap(lambda rows: code_logsumexp(rows, codebook[0]))(x)
    torch.testing.assert_close(rows, code_logsumexp(x, codebook[0]))
    heads = torch.vmap(code_logsumexp, in_dims=(1, 0))(x.transpose(0, 1), codebook)
    torch.testing.assert_close(heads, code_logsumexp(x, codebook))
    codes = torch.vmap(code_logsumexp, in_dims=(None, 0))(x[0], codebook)
    torch.testing.assert_close(codes, code_logsumexp(x[:1].expand(3, 5, 4), codebook))
    scaled = torch.vmap(lambda t: code_logsumexp(x[0], codebook[0], t))(temperatures)
    torch.testing.assert_close(scaled, torch.stack([code_logsumexp(x[0], codebook[0], t) for t in temperatures]))


def test_checkpointed() -> None:
    x, codebook = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
    plain = torch.autograd.grad(code_logsumexp(x, codebook).sum(), x)[0]
    again = checkpoint(code_logsumexp, x, codebook, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], plain)


@pytest.mark.parametrize("name", ["reference", "rust"])
def test_backward_stays_on_the_forward_backend(name: str) -> None:
    x = torch.randn(3, 2, requires_grad=True)
    with use_backend(name):
        value = code_logsumexp(x, torch.randn(4, 2))
    with use_backend("triton"):
        value.sum().backward()
    assert x.grad.isfinite().all()


MEMORY = """
import resource, torch
from ferrovae.ops import code_logsumexp, expected_code, mean_code_entropy, sample_code
torch.set_num_threads(1)
x, codebook = torch.randn(8192, 4, requires_grad=True), torch.randn(16384, 4, requires_grad=True)
def run(x):
    code_logsumexp(x, codebook).sum().backward()
    expected_code(x, codebook).sum().backward()
    mean_code_entropy(x, codebook).backward()
    sample_code(x, codebook, seed=1)
run(x[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_rows_times_codes() -> None:
    finished = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(finished.stdout) < 64  # MiB; the matrix of scores would be 512


@pytest.mark.parametrize(
    ("x", "codebook", "options", "error", "message"),
    [
        ((9, 4), (5, 3), {}, ValueError, r"codebook is \(5, 3\), expected \(K, 4\) to match x \(9, 4\)"),
        ((2, 9, 4), (3, 5, 4), {}, ValueError, r"codebook is \(3, 5, 4\), expected \(2, K, 4\)"),
        ((9, 4), (0, 4), {}, ValueError, "expected at least one code"),
        ((9, 0), (3, 0), {}, ValueError, "D >= 1"),
        ((9, 4), (4,), {}, ValueError, r"codebook is \(4,\), expected \(K, D\)"),
        ((9, 4), (5, 4), {"metric": "l1"}, ValueError, "metric is 'l1', expected one of euclidean"),
        ((9, 4), (5, 4), {"temperature": 0.0}, ValueError, "temperature is 0.0, expected a positive number"),
        ((9, 4), (5, 4), {"temperature": float("nan")}, ValueError, "temperature is nan"),
        ((9, 4), (5, 4), {"temperature": torch.tensor(-1.0)}, ValueError, "temperature is -1.0, expected a positive"),
        ((9, 4), (5, 4), {"temperature": torch.ones(2)}, ValueError, r"temperature is \(2,\), expected one number"),
        ((9, 4), (5, 4), {"temperature": "cold"}, TypeError, "temperature is a str, expected a number or a tensor"),
        ((9, 4), (5, 4), {"temperature": torch.tensor(1)}, TypeError, "temperature is torch.int64"),
    ],
)
def test_errors_name_the_argument(x, codebook, options, error, message) -> None:
    with pytest.raises(error, match=f"^code_logsumexp: .*{message}"):
        code_logsumexp(torch.zeros(x), torch.zeros(codebook), **options)


def test_types_and_devices() -> None:
    with pytest.raises(TypeError, match=r"codebook is torch\.int64, expected float32"):
        code_logsumexp(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="x is a list, expected a tensor"):
        code_logsumexp([1.0], torch.zeros(4, 1))
    with pytest.raises(ValueError, match="codebook is on meta, expected cpu, where x is"):
        code_logsumexp(torch.zeros(2, 3), torch.zeros(4, 3, device="meta"))
