"""VQModel of diffusers: every option of its quantizer, values and gradients before and after."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ferrovae
from compat.models import check_codes, check_gradients, vq_model

OPTIONS = [
    {"legacy": legacy, "sane_index_shape": sane, "unknown_index": unknown}
    for legacy in (True, False)
    for sane in (True, False)
    for unknown in (None, "random", "extra", 3)
]


def quantizer(options: dict[str, Any], folder: Path) -> Any:
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    options = dict(options)
    if options["unknown_index"] is None:
        del options["unknown_index"]
    else:
        np.save(folder / "used.npy", np.arange(0, 64, 3))
        options["remap"] = str(folder / "used.npy")
    layer = vae.VectorQuantizer(64, 4, 0.25, **options)
    torch.nn.init.normal_(layer.embedding.weight)
    return layer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = quantizer(options, tmp_path)
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 4, 6, 5)
    outputs = []
    for layer in (ours, theirs):
        torch.manual_seed(7)
        z = x.clone().requires_grad_()
        quantized, loss, (perplexity, encodings, indices) = layer(z)
        (quantized.square().sum() + loss).backward()
        assert perplexity is None
        assert encodings is None
        outputs.append((quantized, loss, indices, z.grad, layer.get_codebook_entry(indices, (2, 6, 5, 4))))
    assert outputs[0][2].shape == outputs[1][2].shape
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)
    assert check_gradients(ours, theirs) == 1


def test_the_whole_model() -> None:
    theirs = vq_model()
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 16, 16)
    for model in (ours, theirs):
        model(x).sample.square().sum().backward()
    assert torch.equal(ours(x).sample, theirs(x).sample)
    assert torch.equal(ours.encode(x).latents, theirs.encode(x).latents)
    assert check_gradients(ours, theirs) > 10


def test_codes_are_equal_but_for_ties_of_float32() -> None:
    theirs = vq_model(num_vq_embeddings=1024).quantize
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(4, 4, 32, 32) / 1024
    rows = x.movedim(1, -1).reshape(-1, 4)
    differ = check_codes(ours(x)[2][2], theirs(x)[2][2], rows, theirs.embedding.weight.detach())
    assert differ <= 0.001 * len(rows)
