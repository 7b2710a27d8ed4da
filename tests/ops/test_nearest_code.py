"""`nearest_code` against brute force in float64, on every backend that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import nearest_code

METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")
BACKENDS = ("reference", "rust")
SHAPES = [(0, 3, 4), (1, 1, 1), (3, 17, 3), (64, 127, 8), (127, 64, 32), (17, 1000, 63), (3, 64, 768)]


def brute_force(x: torch.Tensor, codebook: torch.Tensor, metric: str, k: int = 1) -> np.ndarray:
    """The k nearest codes of every row, [N, k]: float64, one dimension after the other, stable order."""
    rows, codes = x.double().numpy(), codebook.double().numpy()
    scores = np.zeros((len(rows), len(codes)))
    squares = np.zeros(len(codes))
    with np.errstate(all="ignore"):
        for d in range(rows.shape[1]):
            if metric in ("euclidean", "sqeuclidean"):
                difference = rows[:, d, None] - codes[None, :, d]
                scores += difference * difference
            else:
                scores -= rows[:, d, None] * codes[None, :, d]
                squares += codes[:, d] * codes[:, d]
        if metric == "cosine":
            scores /= np.where(squares == 0, 1.0, np.sqrt(squares))
    return np.argsort(np.where(np.isnan(scores), np.inf, scores), axis=1, kind="stable")[:, :k]


def assert_nearest(x: torch.Tensor, codebook: torch.Tensor, metric: str, backend: str) -> None:
    with use_backend(backend):
        found = nearest_code(x, codebook, metric=metric)
    assert found.dtype == torch.int64
    assert found.shape == x.shape[:-1]
    np.testing.assert_array_equal(found.numpy(), brute_force(x, codebook, metric)[:, 0])


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), SHAPES)
def test_agrees_with_brute_force(n, k, d, metric, backend):
    assert_nearest(torch.randn(n, d), torch.randn(k, d), metric, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_takes_every_dtype_as_given(dtype, metric, backend):
    x = torch.randn(40, 9).to(dtype)
    assert_nearest(x, torch.randn(50, 9), metric, backend)
    assert_nearest(x.float(), torch.randn(50, 9).to(dtype), metric, backend)


def hard_case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, codebook = torch.randn(200, 16), torch.randn(150, 16)
    if name == "offset of 1000 sigma":
        return x + 1000, codebook + 1000
    if name == "scale 1e-5":
        return x * 1e-5, codebook * 1e-5
    if name == "two clusters":
        sign = torch.randint(2, (200, 1)) * 2000.0 - 1000
        return x + sign, codebook + torch.randint(2, (150, 1)) * 2000.0 - 1000
    if name == "duplicates":
        return x, codebook[:40].repeat(4, 1)
    if name == "halfway on a grid":
        return (x * 2).round() + 0.5, (codebook * 2).round()
    if name == "strided":
        return torch.randn(16, 200).t(), torch.randn(150, 32)[:, ::2]
    if name == "equal codes":
        return x, torch.ones(150, 16)
    x[3, 5], x[9, 0], x[11, 2], x[20] = float("nan"), float("inf"), -float("inf"), 0.0
    codebook[0, 3], codebook[70, 1], codebook[90] = float("nan"), float("inf"), 0.0
    return x, codebook


CASES = (
    "offset of 1000 sigma", "scale 1e-5", "two clusters", "duplicates", "halfway on a grid", "strided",
    "equal codes", "not finite",
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_hard_cases_are_exact(case, metric, backend):
    assert_nearest(*hard_case(case), metric, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_several_nearest_in_order(metric, backend):
    x, codebook = torch.randn(30, 5), torch.randn(40, 5).round()
    for k in (1, 3, 32):
        with use_backend(backend):
            found = nearest_code(x, codebook, metric=metric, topk=k)
        np.testing.assert_array_equal(found.numpy(), brute_force(x, codebook, metric, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_separate_searches(backend):
    x, codebooks = torch.randn(3, 2, 7, 5), torch.randn(3, 11, 5)
    with use_backend(backend):
        found, distances = nearest_code(x, codebooks, return_distances=True, topk=2)
        for head in range(3):
            alone, far = nearest_code(x[head], codebooks[head], return_distances=True, topk=2)
            assert torch.equal(found[head], alone)
            assert torch.equal(distances[head], far)
    assert found.shape == (3, 2, 7, 2)


def test_a_vector_alone_and_no_rows():
    codebook = torch.randn(4, 3)
    assert nearest_code(codebook[2], codebook).item() == 2
    assert nearest_code(torch.empty(2, 0, 3), codebook).shape == (2, 0)
    indices, distances = nearest_code(torch.empty(2, 0, 3), torch.randn(2, 4, 3), topk=3, return_distances=True)
    assert indices.shape == distances.shape == (2, 0, 3)


def test_autocast_changes_nothing():
    x, codebook = torch.randn(500, 64), torch.randn(256, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(x, codebook), torch.from_numpy(brute_force(x, codebook, "euclidean")[:, 0]))


def test_number_of_threads_changes_nothing():
    x, codebook = torch.randn(3000, 8), torch.randn(700, 8).round()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(nearest_code(x, codebook))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("x", "codebook", "options", "error", "message"),
    [
        ((1024, 64), (512, 63), {}, ValueError, r"codebook is \(512, 63\), expected \(K, 64\) to match x \(1024, 64\)"),
        ((2, 5, 4), (3, 9, 4), {}, ValueError, r"codebook is \(3, 9, 4\), expected \(2, K, 4\) to match x \(2, 5, 4\)"),
        ((5, 4), (0, 4), {}, ValueError, "expected at least one code"),
        ((5, 0), (3, 0), {}, ValueError, "D >= 1"),
        ((), (3, 2), {}, ValueError, r"x is \(\), expected \(..., D\)"),
        ((5, 4), (4,), {}, ValueError, r"codebook is \(4,\), expected \(K, D\)"),
        ((5, 4), (3, 4), {"topk": 4}, ValueError, "topk is 4, expected 1 to K = 3"),
        ((5, 4), (3, 4), {"topk": 0}, ValueError, "topk is 0"),
        ((5, 4), (50, 4), {"topk": 33}, ValueError, "topk is 33, expected 1 to 32"),
        ((5, 4), (3, 4), {"metric": "l1"}, ValueError, "metric is 'l1', expected one of euclidean"),
        ((5, 4), (3, 4), {"precision": "fp8"}, ValueError, "precision is 'fp8', expected one of exact, tf32, bf16"),
    ],
)
def test_errors_name_the_argument(x, codebook, options, error, message):
    with pytest.raises(error, match=message):
        nearest_code(torch.zeros(x), torch.zeros(codebook), **options)


def test_integers_are_a_type_error():
    with pytest.raises(TypeError, match=r"codebook is torch\.int64"):
        nearest_code(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize(
    ("n", "k", "d", "metric", "dtype"),
    [
        (0, 3, 8, "euclidean", torch.float32),
        (1, 1, 1, "dot", torch.float32),
        (3, 17, 3, "cosine", torch.bfloat16),
        (64, 64, 8, "euclidean", torch.float16),
        (17, 127, 32, "sqeuclidean", torch.float32),
        (65, 33, 63, "dot", torch.bfloat16),
        (5, 40, 128, "cosine", torch.float32),
        (3, 70, 256, "euclidean", torch.bfloat16),
        (2, 17, 200, "dot", torch.float32),
    ],
)
def test_triton_agrees_with_brute_force(n, k, d, metric, dtype):
    assert_nearest((torch.randn(n, d) + 3).to(dtype), torch.randn(k, d) + 3, metric, "triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize(("case", "metric"), [*((case, "euclidean") for case in CASES), ("not finite", "cosine")])
def test_triton_hard_cases_are_exact(case, metric):
    x, codebook = hard_case(case)
    assert_nearest(x[:24, :4], codebook[:100, :4], metric, "triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_triton_is_the_same_however_the_codes_are_shared_out(metric, monkeypatch):
    from ferrovae.kernels import nearest_code as kernels

    x, codebook = torch.randn(70, 6), torch.randn(300, 6).round()
    for enough, parts in ((1, 1), (4, 3), (1000, 5)):
        monkeypatch.setattr(kernels, "ENOUGH", enough)
        assert kernels.shares(1, 320, 64)[1] == parts
        assert_nearest(x, codebook, metric, "triton")


def test_shares_cover_all_codes_once():
    from ferrovae.kernels.nearest_code import shares

    for programs in (1, 7, 64, 263, 264, 5000):
        for blocks in (1, 2, 37, 4096):
            span, parts = shares(programs, blocks * 64, 64)
            assert span % 64 == 0
            assert (parts - 1) * span < blocks * 64 <= parts * span


def test_triton_heads():
    x, codebooks = torch.randn(2, 9, 5), torch.randn(2, 11, 5)
    with use_backend("triton"):
        found = nearest_code(x, codebooks)
    for head in range(2):
        np.testing.assert_array_equal(found[head].numpy(), brute_force(x[head], codebooks[head], "euclidean")[:, 0])
