"""`sample_code` against the exact probabilities (chi-square), and its noise against an oracle in Python integers."""

from __future__ import annotations

import mpmath
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import _philox, nearest_code, sample_code
from ops.soft_codes import METRICS, scores

warned = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
BACKENDS = ["reference", "rust", pytest.param("triton", marks=warned)]
WORD = 0xFFFFFFFF


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def survival(statistic: float, freedom: int) -> float:
    """P(chi-square of so many degrees of freedom >= statistic)."""
    return float(mpmath.gammainc(freedom / 2, statistic / 2, mpmath.inf, regularized=True))


def assert_law(draws: torch.Tensor, probabilities: torch.Tensor) -> None:
    """The draws [N] follow probabilities [K]; codes expected less than 5 times are counted together."""
    counts = torch.bincount(draws, minlength=probabilities.numel()).double()
    expected = probabilities * draws.numel()
    rare = expected < 5
    counts, expected = (torch.cat([v[~rare], v[rare].sum()[None]]) for v in (counts, expected))
    if expected[-1] < 5:
        assert counts[-1] < 30
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected).square() / expected).sum().item()
    assert survival(statistic, expected.numel() - 1) > 1e-6, statistic


LAWS = [(name, metric, temperature) for name in BACKENDS[:2] for metric in METRICS for temperature in (0.3, 2.0)]
# The interpreter is slow: one root and one product.
LAWS += [pytest.param("triton", *law, marks=warned) for law in (("euclidean", 0.3), ("dot", 2.0))]


@pytest.mark.parametrize(("name", "metric", "temperature"), LAWS)
def test_follows_the_exact_probabilities(name: str, metric: str, temperature: float) -> None:
    rows = 700 if name == "triton" else 20_000
    x, codebook = torch.randn(2), torch.randn(23, 2)
    with use_backend(name):
        draws = sample_code(x.expand(rows, 2), codebook, temperature, 12, metric=metric)
    assert_law(draws, scores(x[None], codebook, temperature, metric)[0].softmax(0))


def test_many_codes_and_arbitrary_row_ids() -> None:
    x, codebook = torch.randn(3), torch.randn(500, 3)
    ids = torch.arange(40_000) * 987_654_321 - 2**40
    for name in ("reference", "rust"):
        with use_backend(name):
            draws = sample_code(x.expand(40_000, 3), codebook, 1.0, -5, row_ids=ids)
        assert_law(draws, scores(x[None], codebook, 1.0, "euclidean")[0].softmax(0))


def test_heads_and_seeds_are_independent() -> None:
    x, codebook = torch.randn(2), torch.randn(6, 2)
    rows = x.expand(2, 20_000, 2)
    both = sample_code(rows, codebook.expand(2, 6, 2), 1.0, 3)
    other = sample_code(rows[0], codebook, 1.0, 4)
    alone = scores(x[None], codebook, 1.0, "euclidean")[0].softmax(0)
    pairs = (alone[:, None] * alone).flatten()
    assert_law(both[0] * 6 + both[1], pairs)
    assert_law(both[0] * 6 + other, pairs)
    assert_law(both[0, :-1] * 6 + both[0, 1:], pairs)


def oracle(seed: int, counter: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers."""
    key = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(10):
        low, high = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(high >> 32) ^ counter[1] ^ key[0], high & WORD, (low >> 32) ^ counter[3] ^ key[1], low & WORD]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter


def test_counter_is_code_head_and_row_id(backend: str) -> None:
    """With all scores equal the largest word wins."""
    seed, ids = -(2**50) + 17, [5, -3, 2**40 + 1]
    found = sample_code(torch.zeros(2, 3, 2), torch.zeros(2, 90, 2), 1.0, seed, row_ids=torch.tensor(ids))
    for head in range(2):
        for row, number in enumerate(ids):
            words = [
                word
                for group in range(23)
                for word in oracle(seed, [group, head, number & WORD, (number >> 32) & WORD])
            ]
            assert found[head, row].item() == max(range(90), key=lambda k, words=words: words[k])


def test_gumbel_numbers_keep_their_digits_in_both_tails() -> None:
    words = [
        0,
        1,
        2,
        1000,
        2**31 - 1,
        2**31,
        2**31 + 1,
        2**32 - 1000,
        2**32 - 2,
        2**32 - 1,
        *range(7, 2**32, 2**32 // 99),
    ]
    found = _philox._gumbel(torch.tensor(words))
    with mpmath.workdps(40):
        exact = [float(-mpmath.log(-mpmath.log((mpmath.mpf(word) + 0.5) / 2**32))) for word in words]
    torch.testing.assert_close(found.double(), torch.tensor(exact).double(), rtol=4e-7, atol=4e-7)
    assert found.max() < 22.9


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["rust", pytest.param("triton", marks=warned)])
def test_backends_draw_the_same_codes(name: str, metric: str) -> None:
    rows = 40 if name == "triton" else 2000
    offset = 50.0 if metric in ("euclidean", "sqeuclidean") else 0.0
    x, codebook, temperature = torch.randn(2, rows, 5) + offset, torch.randn(2, 77, 5) + offset, 0.4
    with use_backend(name):
        found = sample_code(x, codebook, temperature, 8, metric=metric)
    noise = torch.stack([_philox.gumbels(torch.tensor([8]), torch.arange(rows), head, 77) for head in range(2)])
    best, second = (scores(x, codebook, temperature, metric) + noise).topk(2).values.unbind(-1)
    clear = best - second > 1e-4
    assert clear.float().mean() > 0.99
    with use_backend("reference"):
        reference = sample_code(x, codebook, temperature, 8, metric=metric)
    assert torch.equal(reference, (scores(x, codebook, temperature, metric) + noise).argmax(-1))
    assert torch.equal(found[clear], reference[clear])


@pytest.mark.parametrize("metric", METRICS)
def test_without_temperature_it_is_the_nearest_code(backend: str, metric: str) -> None:
    x, codebook = torch.randn(40, 3), torch.randn(30, 3)
    nearest = nearest_code(x, codebook, metric=metric)
    assert torch.equal(sample_code(x, codebook, 0.0, 1, metric=metric), nearest)
    assert torch.equal(sample_code(x, codebook, torch.tensor(0.0), 1, metric=metric), nearest)
    assert torch.equal(sample_code(x, codebook, 1e-7, 1, metric=metric), nearest)


def test_a_row_draws_the_same_wherever_it_stands(backend: str) -> None:
    x, codebook, order = torch.randn(30, 4), torch.randn(50, 4), torch.randperm(30)
    whole = sample_code(x, codebook, 1.0, 5)
    assert torch.equal(sample_code(x[order], codebook, 1.0, 5, row_ids=order), whole[order])
    assert torch.equal(sample_code(x[7], codebook, 1.0, 5, row_ids=torch.tensor(7)), whole[7])
    assert torch.equal(sample_code(x.view(5, 6, 4), codebook, 1.0, 5), whole.view(5, 6))
    strided = torch.empty(4, 30).copy_(x.t()).t()
    assert torch.equal(sample_code(strided, codebook, 1.0, 5), whole)


@pytest.mark.usefixtures("nan_filled_empty")
def test_what_is_not_finite_is_never_drawn(backend: str) -> None:
    x, codebook = torch.randn(6, 2), torch.randn(5, 2)
    x[1, 0], x[4, 1] = float("nan"), float("inf")
    codebook[0, 0], codebook[3, 1] = float("nan"), float("inf")
    found = sample_code(x.repeat(30, 1), codebook, 5.0, 2).view(30, 6)
    assert (found[:, [1, 4]] == 0).all()
    assert set(found[:, [0, 2, 3, 5]].flatten().tolist()) == {1, 2, 4}
    assert sample_code(x, torch.full((3, 2), torch.nan), 1.0, 2).tolist() == [0] * 6
    assert sample_code(torch.empty(2, 0, 2), codebook, 1.0, 2).shape == (2, 0)
    assert sample_code(torch.randn(3, 2), torch.zeros(1, 2), 1.0, 2).tolist() == [0] * 3


def test_seeds_and_generators() -> None:
    x, codebook = torch.randn(200, 2), torch.randn(20, 2)
    torch.manual_seed(4)
    first, second = sample_code(x, codebook), sample_code(x, codebook)
    torch.manual_seed(4)
    assert torch.equal(sample_code(x, codebook), first)
    assert not torch.equal(first, second)
    drawn = [sample_code(x, codebook, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.equal(sample_code(x, codebook, seed=7), sample_code(x, codebook, seed=torch.tensor([7])))


def test_dtypes_threads_and_autocast() -> None:
    x, codebook = torch.randn(900, 4), torch.randn(300, 4)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sample_code(x, codebook, 1.0, 1))
    finally:
        torch.set_num_threads(before)
    with torch.autocast("cpu", torch.bfloat16):
        found.append(sample_code(x, codebook, 1.0, 1))
    assert all(torch.equal(other, found[0]) for other in found[1:])
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(sample_code(half, codebook, 1.0, 1), sample_code(half.float(), codebook, 1.0, 1))
    exact = sample_code(x.double(), codebook, 1.0, 1)
    assert (exact == found[0]).float().mean() > 0.99
    assert not sample_code(x.requires_grad_(), codebook, 1.0, 1).requires_grad


def test_opcheck() -> None:
    arguments = (torch.randn(2, 5, 3), torch.randn(2, 7, 3), torch.tensor(0.5), torch.tensor([1]), torch.arange(5))
    torch.library.opcheck(torch.ops.ferrovae.sample_code.default, (*arguments, "euclidean", "auto"))


def test_compiled_once_for_all_batch_sizes_and_exported() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
            return sample_code(x, codebook, 0.7, 3) + 1

    torch._dynamo.reset()
    counter, codebook = CompileCounterWithBackend("aot_eager"), torch.randn(9, 4)
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend=counter)
    for size in (7, 3, 20, 11, 64):
        x = torch.randn(size, 4)
        assert torch.equal(compiled(x, codebook), Layer()(x, codebook))
    assert counter.frame_count == 1
    program = torch.export.export(Layer(), (x, codebook), dynamic_shapes=({0: torch.export.Dim("rows")}, None))
    assert torch.equal(program.module()(x[:9], codebook), Layer()(x[:9], codebook))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, "temperature is -0.5, expected 0 or a positive number"),
        ({"temperature": torch.tensor(-0.5)}, ValueError, "temperature is -0.5, expected 0 or a positive number"),
        ({"metric": "l1"}, ValueError, "metric is 'l1', expected one of euclidean"),
        ({"row_ids": torch.arange(4)}, ValueError, r"row_ids are \(4,\), expected \(5,\), one a row of x"),
        ({"row_ids": torch.zeros(5)}, TypeError, "row_ids are torch.float32, expected int64"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator are both given"),
        ({"seed": 1.5}, TypeError, "seed is a float"),
        ({"codebook": torch.zeros(3, 1)}, ValueError, r"codebook is \(3, 1\), expected \(K, 2\) to match x \(5, 2\)"),
        ({"codebook": torch.zeros(0, 2)}, ValueError, "expected at least one code"),
    ],
)
def test_errors_name_the_argument(options, error, message) -> None:
    arguments = {"x": torch.zeros(5, 2), "codebook": torch.zeros(3, 2)} | options
    with pytest.raises(error, match=f"^sample_code: .*{message}"):
        sample_code(**arguments)
