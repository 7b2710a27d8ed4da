"""`residual_nearest_code` against its definition, stage by stage in float64, on every backend that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ferrovae import use_backend
from ferrovae.ops import residual_nearest_code

METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")
BACKENDS = ("reference", "rust")
SHAPES = [(0, 2, 3, 4), (1, 1, 1, 1), (3, 4, 17, 3), (64, 3, 127, 8), (17, 2, 1000, 63), (3, 2, 64, 768)]  # N, Q, K, D
INF, NAN = float("inf"), float("nan")


def nearest(rows: np.ndarray, codes: np.ndarray, metric: str) -> np.ndarray:
    """argmin over the codes: float64, one dimension after the other, the lowest of equals."""
    rows, codes = rows.astype(np.float64), codes.astype(np.float64)
    scores, squares = np.zeros((len(rows), len(codes))), np.zeros(len(codes))
    for d in range(rows.shape[1]):
        if metric in ("euclidean", "sqeuclidean"):
            scores += (rows[:, d, None] - codes[None, :, d]) ** 2
        else:
            scores -= rows[:, d, None] * codes[None, :, d]
            squares += codes[:, d] ** 2
    if metric == "cosine":
        scores /= np.where(squares == 0, 1.0, np.sqrt(squares))
    return np.where(np.isnan(scores), np.inf, scores).argmin(1)


def by_definition(x, codebooks, metric: str = "euclidean", stages=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indices [N, Q], quantized [N, D], codes [N, Q, D] of x [N, D] and Q codebooks [K_q, D], for one group."""
    wide = torch.float64 if torch.float64 in (x.dtype, codebooks[0].dtype) else torch.float32
    residual = x.to(wide).numpy()
    books = [book.detach().to(wide).numpy() for book in codebooks]
    limits = np.full(len(x), len(books)) if stages is None else stages.numpy()
    total, indices, codes = np.zeros_like(residual), [], []
    with np.errstate(all="ignore"):
        for stage, book in enumerate(books):
            reached = limits > stage
            found = np.where(reached, nearest(residual, book, metric), -1)
            code = np.where(reached[:, None], book[found], 0).astype(residual.dtype)
            residual, total = residual - code, total + code
            indices.append(found)
            codes.append(code)
    return np.stack(indices, 1), total, np.stack(codes, 1)


def assert_defined(x, codebooks, backend: str, metric: str = "euclidean", stages=None) -> None:
    with use_backend(backend):
        found = residual_nearest_code(x, codebooks, metric=metric, stages=stages, return_stages=True)
        shorter = residual_nearest_code(x, codebooks, metric=metric, stages=stages)
    expected = by_definition(x, codebooks, metric, stages)
    assert found[0].dtype == torch.int64
    for ours, truth in zip(found, expected, strict=True):
        # Equal to the bit, apart from which NaN it is.
        np.testing.assert_array_equal(ours.numpy(), truth, strict=True)
    for ours, truth in zip(shorter, expected[:2], strict=True):
        np.testing.assert_array_equal(ours.numpy(), truth)


def codebooks_of(depth: int, codes: int, dims: int) -> torch.Tensor:
    """Q codebooks, each about as wide as what the stages before leave."""
    return torch.randn(depth, codes, dims) * (0.7 ** torch.arange(depth))[:, None, None]


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "q", "k", "d"), SHAPES)
def test_agrees_with_the_definition(n, q, k, d, metric, backend):
    assert_defined(torch.randn(n, d), codebooks_of(q, k, d), backend, metric)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_rows_stop_where_they_are_told_to(metric, backend):
    stages = torch.arange(-1, 39) % 6
    stages[0] = -1
    assert_defined(torch.randn(40, 5), codebooks_of(4, 30, 5), backend, metric, stages)
    indices, quantized = residual_nearest_code(torch.randn(3, 5), codebooks_of(4, 30, 5), stages=torch.tensor(0))
    assert indices.eq(-1).all()
    assert quantized.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_codebooks_of_different_sizes(metric, backend):
    x, books = torch.randn(50, 6), [torch.randn(k, 6) for k in (20, 1, 7)]
    assert_defined(x, books, backend, metric)
    assert_defined(x, tuple(books), backend, metric, torch.arange(50) % 4)
    # Padding is not even chosen by rows and codes that are infinitely far or not a number.
    x[0, 0], x[1, 1], books[2][:, 3] = NAN, INF, NAN
    assert_defined(x, books, backend, metric)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_codebook_for_all_stages(backend):
    codebook = torch.randn(60, 6) * 0.5
    assert_defined(torch.randn(50, 6), codebook.expand(5, 60, 6), backend)
    x = torch.randn(50, 6)
    with use_backend(backend):
        shared = residual_nearest_code(x, codebook.expand(5, 60, 6))
        repeated = residual_nearest_code(x, codebook.repeat(5, 1, 1))
    assert all(torch.equal(*pair) for pair in zip(shared, repeated, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_separate(backend):
    x, books = torch.randn(3, 2, 7, 5), torch.randn(3, 4, 11, 5)
    stages = torch.randint(0, 5, (2, 7))
    with use_backend(backend):
        found = residual_nearest_code(x, books, stages=stages, return_stages=True)
        alone = [residual_nearest_code(*pair, stages=stages, return_stages=True) for pair in zip(x, books, strict=True)]
    assert [tuple(part.shape) for part in found] == [(3, 2, 7, 4), (3, 2, 7, 5), (3, 2, 7, 4, 5)]
    for part, parts in zip(found, zip(*alone, strict=True), strict=True):
        assert torch.equal(part, torch.stack(parts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_takes_every_dtype_as_given(dtype, backend):
    x, books = torch.randn(40, 9) / 3, codebooks_of(3, 50, 9)
    assert_defined(x.to(dtype), books, backend)
    assert_defined(x, books.to(dtype), backend)
    assert_defined(x.to(dtype), list(books.to(dtype)), backend)


def hard_case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, books = torch.randn(120, 8), codebooks_of(3, 70, 8)
    if name == "offset of 1000 sigma":
        books[0] += 1000
        return x + 1000, books
    if name == "scale 1e-5":
        return x * 1e-5, books * 1e-5
    if name == "duplicates":
        return x, books[:, :30].repeat(1, 3, 1)
    if name == "halfway on a grid":
        return (x * 2).round() + 0.5, (books * 2).round()
    if name == "strided":
        return torch.randn(8, 120).t(), torch.randn(70, 16, 3)[:, ::2].permute(2, 0, 1)
    if name == "nothing is left":
        return books[0, torch.randint(70, (120,))], books
    x[3, 5], x[9, 0], x[11, 2], x[20] = NAN, INF, -INF, 0.0
    books[0, 0, 3], books[1, 70 // 2, 1], books[2, 9] = NAN, INF, 0.0
    return x, books


CASES = (
    "offset of 1000 sigma", "scale 1e-5", "duplicates", "halfway on a grid", "strided", "nothing is left", "not finite",
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_hard_cases_are_exact(case, metric, backend):
    assert_defined(*hard_case(case), backend, metric)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_a_nan_gets_index_0_and_the_sum_of_its_codes(backend):
    x, books = torch.randn(5, 4), torch.randn(3, 10, 4)
    x[2, 1] = NAN
    with use_backend(backend):
        indices, quantized = residual_nearest_code(x, books)
    assert indices[2].tolist() == [0, 0, 0]
    decoded = sum(books[stage, indices[:, stage]] for stage in range(3))
    assert torch.equal(quantized, decoded)


def test_a_vector_alone_and_no_rows():
    books = torch.randn(2, 4, 3)
    indices, quantized = residual_nearest_code(books[0, 2] + books[1, 1], books)
    assert indices.shape == (2,)
    assert quantized.shape == (3,)
    indices, quantized, codes = residual_nearest_code(torch.empty(2, 0, 3), books, return_stages=True)
    assert (indices.shape, quantized.shape, codes.shape) == ((2, 0, 2), (2, 0, 3), (2, 0, 2, 3))
    indices, _ = residual_nearest_code(torch.empty(5, 0, 3), torch.randn(5, 2, 4, 3), stages=torch.ones(0).long())
    assert indices.shape == (5, 0, 2)


def test_autocast_changes_nothing():
    x, books = torch.randn(200, 16), codebooks_of(3, 64, 16)
    expected = residual_nearest_code(x, books)
    with torch.autocast("cpu", torch.bfloat16):
        found = residual_nearest_code(x, books)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_number_of_threads_changes_no_bit():
    x, books = torch.randn(2, 1500, 4), torch.randn(2, 3, 300, 4).round().requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            indices, quantized = residual_nearest_code(x, books)
            (slope,) = torch.autograd.grad(quantized.sin().sum(), books)
            found.append((indices, quantized, slope))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


ERRORS = [
    (((9, 64), (2, 5, 63)), {}, ValueError, r"codebooks is \(2, 5, 63\), expected \(Q, K, 64\) to match x \(9, 64\)"),
    (((2, 9, 4), (3, 2, 5, 4)), {}, ValueError, r"codebooks is \(3, 2, 5, 4\), expected \(2, Q, K, 4\) to match x"),
    (((9, 4), (5, 4)), {}, ValueError, r"codebooks is \(5, 4\), expected \(Q, K, D\)"),
    (((9, 4), (0, 5, 4)), {}, ValueError, "codebooks is .*, expected at least one stage and one code"),
    (((9, 4), (2, 0, 4)), {}, ValueError, "codebooks is .*, expected at least one stage and one code"),
    (((9, 4), [(5, 4), (6, 3)]), {}, ValueError, r"codebooks\[1\] is \(6, 3\), expected \(K, 4\) with K >= 1"),
    (((9, 4), [(0, 4)]), {}, ValueError, r"codebooks\[0\] is \(0, 4\), expected \(K, 4\) with K >= 1"),
    (((9, 4), []), {}, ValueError, "codebooks is an empty list, expected at least one codebook"),
    (((9, 0), (2, 5, 0)), {}, ValueError, r"x is \(9, 0\), expected \(..., D\) with D >= 1"),
    (((), (2, 5, 1)), {}, ValueError, r"x is \(\), expected \(..., D\)"),
    (((4,), (2, 2, 5, 4)), {}, ValueError, r"x is \(4,\), expected \(G, ..., D\)"),
    (((9, 4), (2, 5, 4)), {"metric": "l1"}, ValueError, "metric is 'l1', expected one of euclidean"),
    (((9, 4), (2, 5, 4)), {"stages": torch.ones(8).long()}, ValueError, r"stages is \(8,\), expected .* to \(9,\)"),
    (((9, 4), (2, 5, 4)), {"stages": torch.ones(1, 9).long()}, ValueError, r"stages is \(1, 9\)"),
    (((9, 4), (2, 5, 4)), {"stages": torch.ones(9)}, TypeError, r"stages is torch\.float32, expected int64"),
    (((9, 4), (2, 5, 4)), {"stages": 3}, TypeError, "stages is a int, expected a tensor"),
]


@pytest.mark.parametrize(("shapes", "options", "error", "message"), ERRORS)
def test_errors_name_the_argument(shapes, options, error, message):
    x, books = shapes
    books = [torch.zeros(shape) for shape in books] if isinstance(books, list) else torch.zeros(books)
    with pytest.raises(error, match=f"^residual_nearest_code: {message}"):
        residual_nearest_code(torch.zeros(x), books, **options)


def test_wrong_types_and_devices():
    x, books = torch.zeros(9, 4), torch.zeros(2, 5, 4)
    with pytest.raises(TypeError, match=r"codebooks is torch\.int64, expected float32"):
        residual_nearest_code(x, books.long())
    with pytest.raises(TypeError, match="x is a list, expected a tensor"):
        residual_nearest_code([0.0], books)
    with pytest.raises(ValueError, match="codebooks is on meta, expected cpu, where x is"):
        residual_nearest_code(x, books.to("meta"))
