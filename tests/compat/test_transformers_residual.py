"""A residual stack's codes are those of `residual_nearest_code`."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ferrovae
from compat.models import check_stack, encodec, mimi
from ferrovae.compat.transformers.residual import residual_codes
from ferrovae.ops import residual_nearest_code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_codes_of_the_whole_stack(dtype: torch.dtype) -> None:
    codebooks = (torch.randn(5, 40, 8) * 0.6 ** torch.arange(5)[:, None, None]).to(dtype)
    x = torch.randn(2, 8, 50).to(dtype)
    stages = [SimpleNamespace(codebook=SimpleNamespace(embed=codebook)) for codebook in codebooks]
    expected, _ = residual_nearest_code(x.mT, codebooks)
    assert torch.equal(residual_codes(x, stages), expected.movedim(-1, 0))


def stacks() -> dict[str, Any]:
    """Residual stacks of eight stages of both models, with codebooks that grow finer."""
    return {
        "encodec": encodec(codebook_size=256, hidden_size=32, codebook_dim=32, target_bandwidths=[4.8]).quantizer,
        "mimi": mimi(
            codebook_size=256,
            codebook_dim=32,
            hidden_size=32,
            num_quantizers=9,
            upsample_groups=32,
            vector_quantization_hidden_dimension=32,
        ).quantizer.acoustic_residual_vector_quantizer,
    }


@pytest.mark.parametrize("name", ["encodec", "mimi"])
def test_codes_are_the_models_but_for_ties_of_float32(name: str) -> None:
    theirs = stacks()[name]
    books = []
    for stage, layer in enumerate(theirs.layers):
        if name == "encodec":
            layer.codebook.embed.normal_(std=0.7**stage)
        else:
            layer.codebook.embed_sum.normal_(std=0.7**stage)
        books.append(layer.codebook.embed)
    assert len(books) == 8
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(4, 32, 500)
    with torch.no_grad():
        before, after = theirs.encode(x), ours.encode(x)
        rows = x if name == "encodec" or theirs.input_proj is None else theirs.input_proj(x)
    assert after.shape == before.shape == (8, 4, 500)
    assert after.dtype == before.dtype
    parted = check_stack(after.flatten(1), before.flatten(1), rows.mT.flatten(0, 1), books)
    assert parted <= 0.001 * before.numel()


def test_a_frame_alone_gets_the_codes_it_has_among_others_and_stays_as_it_is() -> None:
    stack = ferrovae.accelerate(encodec().quantizer)
    x = torch.randn(2, 16, 7)
    frame = x[:1, :, :1].clone()
    assert torch.equal(stack.encode(frame), stack.encode(x)[:, :1, :1])
    assert torch.equal(frame, x[:1, :, :1])
