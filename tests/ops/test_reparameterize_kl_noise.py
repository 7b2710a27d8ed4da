"""The noise of `reparameterize_kl`: a function of its key and counter only, standard normal; and refused arguments."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ferrovae import ops, use_backend
from ferrovae.ops import _philox

KNOWN = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (-1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (123456789012345, (7, 0, 0, 0), (0xF427116B, 0x1967C062, 0x398968C8, 0x18739B1B)),
]


def eps(shape: tuple[int, ...], backend: str = "rust", **options) -> Tensor:
    zeros = torch.zeros(shape)
    with use_backend(backend):
        return ops.reparameterize_kl(zeros, zeros, **options)[0]


@pytest.mark.parametrize(("seed", "counter", "words"), KNOWN)
def test_philox_known_answers(seed: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    got = _philox.philox(torch.tensor([seed]), *(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in got) == words


def philox_oracle(seed: int, counter: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        low, high = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (high >> 32) ^ counter[1] ^ key[0],
            high & 0xFFFFFFFF,
            (low >> 32) ^ counter[3] ^ key[1],
            low & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_counter_is_column_sample_and_example(backend: str) -> None:
    ids, seed, first = [5, -3, 2**40 + 1], -(2**50) + 17, 2**31 - 1
    got = eps((3, 6), backend, seed=seed, example_ids=torch.tensor(ids), num_samples=2, first_sample=first)
    for sample in range(2):
        for row, example in enumerate(ids):
            for column in range(6):
                counter = [column // 4, first + sample, example & 0xFFFFFFFF, (example >> 32) & 0xFFFFFFFF]
                words = philox_oracle(seed, counter)[column % 4 // 2 * 2 :]
                radius = math.sqrt(-2 * math.log(words[0] * 2.0**-32 + 2.0**-33))
                angle = 2 * math.pi * (words[1] >> 8) * 2.0**-24
                exact = radius * (math.sin(angle) if column % 2 else math.cos(angle))
                assert got[sample, row, column].item() == pytest.approx(exact, abs=1e-6)


def test_reference_and_rust_agree_in_every_bit() -> None:
    options = {"seed": 99, "num_samples": 3}
    assert torch.equal(eps((50, 1003), "rust", **options), eps((50, 1003), "reference", **options))


def test_every_precision_sees_the_same_noise() -> None:
    zeros = torch.zeros(5, 9, dtype=torch.float64)
    assert torch.equal(ops.reparameterize_kl(zeros, zeros, seed=1)[0].float(), eps((5, 9), seed=1))
    for dtype in (torch.bfloat16, torch.float16):
        half = zeros.to(dtype)
        assert torch.equal(ops.reparameterize_kl(half, half, seed=1)[0], eps((5, 9), seed=1).to(dtype))


def test_threads_change_no_bit() -> None:
    inputs = [torch.randn(300, 1000, requires_grad=True) for _ in range(2)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            z, kl = ops.reparameterize_kl(*inputs, seed=1)
            results.append([z, kl, *torch.autograd.grad(z.square().sum() + kl.square().sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


PORTABLE = """
import sys, torch
from ferrovae import _core, ops
torch.manual_seed(0)
leaf = torch.randn(40, 2 * 333).requires_grad_()
z, kl = ops.reparameterize_kl_from_moments(leaf, seed=3)
(z.square().sum() + kl.sum()).backward()
import hashlib
digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in (z, kl, leaf.grad))).hexdigest()
print(_core.simd_level(), digest)
"""


@pytest.mark.slow
def test_instruction_sets_change_no_bit() -> None:
    levels, digests = set(), set()
    for level in ("portable", "avx2", "avx512"):
        environment = os.environ | {"FERROVAE_SIMD": level, "FERROVAE_BACKEND": "rust"}
        command = [sys.executable, "-c", PORTABLE]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        levels.add(printed[0])
        digests.add(printed[1])
    assert "portable" in levels
    assert len(digests) == 1


@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_samples_and_examples_can_be_drawn_in_parts(backend: str) -> None:
    whole = eps((6, 11), backend, seed=7, num_samples=5)
    parts = [eps((6, 11), backend, seed=7, num_samples=n, first_sample=at) for at, n in ((0, 1), (1, 3), (4, 1))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(eps((6, 11), backend, seed=7), whole[0])
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(eps((3, 11), backend, seed=7, example_ids=rows), whole[0, rows])


def test_seeds() -> None:
    assert torch.equal(eps((2, 3), seed=5), eps((2, 3), seed=torch.tensor([5])))
    assert not torch.equal(eps((2, 3), seed=5), eps((2, 3), seed=5 + 2**32))
    torch.manual_seed(3)
    first, second = eps((2, 3)), eps((2, 3))
    torch.manual_seed(3)
    assert torch.equal(first, eps((2, 3)))
    assert not torch.equal(first, second)
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    state = torch.get_rng_state()
    assert torch.equal(*(eps((2, 3), generator=generator) for generator in generators))
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_standard_normal() -> None:
    draws = eps((1000, 250), seed=2024, num_samples=4).double()
    count = draws.numel()
    # Six standard errors: moments of a normal are 0, 1, 0, 3 with variances 1, 2, 15, 96 of x, x^2, x^3, x^4.
    for power, (expected, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96)), start=1):
        assert abs(draws.pow(power).mean().item() - expected) < 6 * math.sqrt(variance / count)
    cdf = torch.special.ndtr(draws.flatten().sort().values)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = max((steps - cdf).max().item(), (cdf - steps + 1 / count).max().item())
    assert distance * math.sqrt(count) < 1.95  # Kolmogorov-Smirnov, p = 0.001
    for one, other in ((draws[..., 1:], draws[..., :-1]), (draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        for f in (lambda x: x, torch.square):
            a, b = f(one).flatten(), f(other).flatten()
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 6 / math.sqrt(a.numel())


def test_pair_halves_are_not_tied() -> None:
    """Cosine and sine of a pair share a radius: their signs, and their order, must be independent."""
    draws = eps((50_000, 4), seed=1)
    for a in range(4):
        for b in range(a):
            agree = (draws[:, a].sign() == draws[:, b].sign()).double().mean().item()
            assert abs(agree - 0.5) < 6 * 0.5 / math.sqrt(50_000)


X, HALF = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.float16)
BAD = [
    ((X, torch.zeros(3, 5)), {}, ValueError, r"logvar is \(3, 5\), expected \(3, 4\), the shape of mean"),
    ((X, HALF), {}, TypeError, r"logvar is torch.float16, expected torch.float32 to match mean"),
    ((X, X.to("meta")), {}, ValueError, r"logvar is on meta, expected cpu, where mean is"),
    ((X.long(), X), {}, TypeError, r"mean is torch.int64, expected float32"),
    (([0.0], X), {}, TypeError, r"mean is a list, expected a tensor"),
    ((X, X), {"batch_dims": 3}, ValueError, r"batch_dims is 3, expected 0 to 2 for mean \(3, 4\)"),
    ((X, X), {"num_samples": 0}, ValueError, r"num_samples is 0, expected at least 1"),
    ((X, X), {"first_sample": -1}, ValueError, r"first_sample is -1, expected 0 to 2\^32"),
    ((X, X), {"first_sample": 2**32}, ValueError, r"first_sample is 4294967296"),
    ((X, X), {"prior_mean": torch.zeros(3)}, ValueError, r"prior_mean is \(3,\), expected .* mean \(3, 4\)"),
    ((X, X), {"prior_logvar": 1.0}, TypeError, r"prior_logvar is a float, expected a tensor"),
    ((X, X), {"kl_reduction": "sum"}, ValueError, r"kl_reduction is 'sum', expected one of example, element"),
    ((X, X), {"seed": 1.5}, TypeError, r"seed is a float, expected an int64 tensor"),
    ((X, X), {"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed is \(2,\), expected \(1,\)"),
    ((X, X), {"seed": torch.zeros(1)}, TypeError, r"seed is torch.float32, expected int64"),
    ((X, X), {"seed": 2**63}, ValueError, r"seed is 9223372036854775808, expected a signed 64-bit integer"),
    ((X, X), {"seed": 1, "generator": torch.Generator()}, ValueError, r"seed and generator are both given"),
    ((X, X), {"example_ids": torch.arange(4)}, ValueError, r"example_ids are \(4,\), expected \(3,\)"),
    ((X, X), {"example_ids": torch.zeros(3)}, TypeError, r"example_ids are torch.float32, expected int64"),
]


@pytest.mark.parametrize(("inputs", "options", "error", "message"), BAD)
def test_bad_arguments(inputs: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^reparameterize_kl: " + message):
        ops.reparameterize_kl(*inputs, **options)


@pytest.mark.parametrize(
    ("moments", "options", "message"),
    [
        (torch.zeros(2, 3), {}, r"moments are \(2, 3\), expected an even size \(mean and logvar\) in dim 1"),
        (torch.zeros(2, 4), {"dim": 2}, r"dim is 2, expected a dimension of moments \(2, 4\)"),
        (torch.zeros(2, 4), {"batch_dims": 3}, r"batch_dims is 3, expected 0 to 2 for mean \(2, 2\)"),
    ],
)
def test_bad_moments(moments: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="^reparameterize_kl_from_moments: " + message):
        ops.reparameterize_kl_from_moments(moments, **options)
