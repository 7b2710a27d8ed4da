"""Transforms against plain torch, their laws of probability, and their independence of everything but the key."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch

import ferrovae as fv
from ferrovae.data import Binarize, Dequantize, Loader, Scale


def epoch(data, transform, *, batch_size=64, fixed_epoch=None, **options):
    """One pass, sorted by index."""
    loader = Loader(fv.data.open(data), batch_size, transform=transform, fixed_epoch=fixed_epoch, **options)
    out = [(batch.index, batch.x.clone()) for batch in loader]
    index, x = torch.cat([part[0] for part in out]), torch.cat([part[1] for part in out])
    return x[index.argsort()]


BYTES = torch.arange(256, dtype=torch.uint8).repeat(9)[: 33 * 67].reshape(33, 67)


def test_bytes_scale_to_the_bits_of_a_division():
    assert torch.equal(epoch(BYTES, Scale()), BYTES.float() / 255)
    assert torch.equal(epoch(BYTES, None), BYTES)
    assert torch.equal(epoch(BYTES, []), BYTES)
    scaled = epoch(BYTES, Scale(-1.0, 1.0))
    torch.testing.assert_close(scaled.double(), BYTES.double() / 127.5 - 1, rtol=0, atol=2**-24)
    assert (scaled.min(), scaled.max()) == (-1, 1)
    torch.testing.assert_close(epoch(BYTES, [Scale(0, 2), Scale(1, 4)]).double(), 1 + 3 * BYTES.double() / 127.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats(dtype):
    data = torch.rand(20, 35, dtype=torch.float64).to(dtype)
    assert torch.equal(epoch(data, None), data)
    assert torch.equal(epoch(data, Scale()), data.float())
    torch.testing.assert_close(epoch(data, Scale(-1, 1)), data.float() * 2 - 1, rtol=0, atol=2**-23)
    binary = epoch(data, Binarize())
    assert set(binary.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("source", [torch.uint8, torch.float32])
@pytest.mark.parametrize("transform", [Scale(-0.3, 0.9), Binarize(), Dequantize()])
def test_same_bits_for_any_threads_batch_and_prefetch(source, transform):
    if source == torch.float32 and isinstance(transform, Dequantize):
        pytest.skip("bytes only")
    data = BYTES if source == torch.uint8 else BYTES.float() / 255
    expected = epoch(data, transform, threads=1, batch_size=33, seed=5)
    for options in (
        {"threads": 3, "batch_size": 1},
        {"threads": 2, "batch_size": 7, "prefetch": 5},
        {"threads": 1, "batch_size": 10, "prefetch": 0, "shuffle": False},
        {"threads": 2, "batch_size": 50, "reuse": True},
    ):
        assert torch.equal(epoch(data, transform, seed=5, **options), expected)
    if not isinstance(transform, Scale):
        assert not torch.equal(epoch(data, transform, seed=6), expected)
        assert not torch.equal(epoch(data, transform, seed=5, fixed_epoch=1), expected)
        assert torch.equal(epoch(data, transform, seed=5, fixed_epoch=0), expected)


def test_same_bits_on_another_instruction_set():
    """The portable kernels in another process, against this process's; the Rust tests compare all levels."""
    program = (
        "import torch, hashlib, ferrovae as fv\n"
        "x = torch.arange(3000).to(torch.uint8).reshape(30, 100)\n"
        "for t in (fv.data.Scale(-1, 3), fv.data.Binarize(), fv.data.Dequantize()):\n"
        "    loader = fv.data.Loader(fv.data.open(x), 8, transform=t)\n"
        "    print(hashlib.sha256(b''.join(b.x.numpy().tobytes() for b in loader)).hexdigest())\n"
    )
    environment = {**os.environ, "FERROVAE_SIMD": "portable"}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    data = torch.arange(3000).to(torch.uint8).reshape(30, 100)
    for line, transform in zip(printed.stdout.split(), (Scale(-1, 3), Binarize(), Dequantize()), strict=True):
        loader = Loader(fv.data.open(data), 8, transform=transform)
        assert hashlib.sha256(b"".join(batch.x.numpy().tobytes() for batch in loader)).hexdigest() == line


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_binarises_with_the_pixel_as_probability(dtype):
    """Every pixel value's frequency within 5.5 standard deviations, and chi-square of all within 5."""
    row = torch.arange(256, dtype=torch.uint8)
    data = row.expand(4000, 256).contiguous()
    ones = epoch(data if dtype == torch.uint8 else data.float() / 255, Binarize(), batch_size=500).sum(0).double()
    p = row.double() / 255
    assert ones[0] == 0
    assert ones[255] == 4000
    z = ((ones - 4000 * p) / (4000 * p * (1 - p)).sqrt())[1:255]
    assert z.abs().max() < 5.5
    assert abs(float((z**2).sum()) - 254) < 5 * 508**0.5


def test_draws_are_independent_between_pixels_images_epochs_and_seeds():
    data = torch.full((2000, 100), 128, dtype=torch.uint8)
    p = (128 * 257 + 1) / 65536

    def centred(**options):
        return (epoch(data, Binarize(), batch_size=500, **options) - p).double()

    first, next_epoch, next_seed = centred(), centred(fixed_epoch=1), centred(seed=1)
    for a, b in (
        (first[:, 1:], first[:, :-1]),
        (first[:, 16:], first[:, :-16]),
        (first[1:], first[:-1]),
        (first, next_epoch),
        (first, next_seed),
        (next_epoch, next_seed),
    ):
        z = float((a * b).sum()) / (p * (1 - p) * a.numel() ** 0.5)
        assert abs(z) < 5


def test_dequantised_noise_is_uniform():
    data = torch.arange(256, dtype=torch.uint8).expand(400, 256).contiguous()
    x = epoch(data, Dequantize()).double()
    noise = x * 256 - data
    assert noise.min() >= 0
    assert noise.max() < 1
    count = noise.numel()
    assert abs(float(noise.mean()) - 0.5 + 2**-17) < 5 * (1 / 12 / count) ** 0.5
    counts = torch.histc(noise, 64, 0, 1)
    assert abs(float(((counts - count / 64) ** 2 / (count / 64)).sum()) - 63) < 5 * 126**0.5
    symmetric = epoch(data, [Dequantize(), Scale(-1, 1)]).double()
    torch.testing.assert_close(symmetric, 2 * x - 1, rtol=0, atol=2**-23)


def test_binary_images_can_be_scaled():
    binary = epoch(BYTES, Binarize())
    assert torch.equal(epoch(BYTES, [Binarize(), Scale(-1, 1)]), 2 * binary - 1)
    assert torch.equal(epoch(BYTES, [Scale(), Binarize()]), binary)


def test_mnist_binarised_mean(mnist):
    """The share of ones is the mean intensity, within five standard deviations of the sum of Bernoullis."""
    dataset = fv.data.open(mnist, split="test")
    ones = sum(float(batch.x.sum()) for batch in Loader(dataset, 500, transform=Binarize()))
    p = dataset.data.double() / 255
    assert abs(ones - float(p.sum())) < 5 * float((p * (1 - p)).sum()) ** 0.5
