"""EnCodec of transformers: the same codes and waveforms before and after, one stage and the whole stack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import ferrovae
from compat.models import check_codes, check_gradients, encodec


@pytest.mark.parametrize("bandwidth", [1.0, 4.0])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"audio_channels": 2}, {"codebook_size": 32}])
def test_codes_and_waveform(options: dict[str, Any], bandwidth: float) -> None:
    theirs = encodec(**options)
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, theirs.config.audio_channels, 5000)
    with torch.no_grad():
        before, after = theirs.encode(x, bandwidth=bandwidth), ours.encode(x, bandwidth=bandwidth)
        assert after.audio_codes.shape[2] == theirs.quantizer.get_num_quantizers_for_bandwidth(bandwidth)
        assert after.audio_codes.is_contiguous() == before.audio_codes.is_contiguous()
        assert torch.equal(after.audio_codes, before.audio_codes)
        assert torch.equal(ours(x, bandwidth=bandwidth).audio_values, theirs(x, bandwidth=bandwidth).audio_values)


def test_gradients_in_training() -> None:
    theirs = encodec().train()
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 1, 5000)
    for model in (ours, theirs):
        model(x).audio_values.square().sum().backward()
    assert check_gradients(ours, theirs) > 10


def test_one_codebook() -> None:
    codebook = encodec().quantizer.layers[0].codebook
    x = torch.randn(3, 501, 16)
    theirs = codebook.encode(x)
    ours = ferrovae.accelerate(codebook).encode(x)
    assert ours.shape == theirs.shape == (3, 501)
    assert check_codes(ours.flatten(), theirs.flatten(), x.view(-1, 16), codebook.embed) <= 2


def test_a_common_offset_does_not_blur_the_codes() -> None:
    stack = encodec().quantizer
    for layer in stack.layers:
        layer.codebook.embed.zero_()
    codes = torch.randn(64, 16)
    stack.layers[0].codebook.embed.copy_(codes + 10_000)
    chosen = torch.randint(64, (1, 400))
    x = (stack.layers[0].codebook.embed[chosen]).mT + 0.01 * torch.randn(1, 16, 400)
    wrong = (stack.encode(x)[0] != chosen).float().mean()
    assert torch.equal(ferrovae.accelerate(stack).encode(x)[0], chosen)
    assert wrong > 0.01


def test_a_changed_stage_is_not_hidden() -> None:
    model = encodec()
    codebook = model.quantizer.layers[1].codebook
    codebook.quantize = lambda x: torch.zeros(len(x), dtype=torch.int64)
    with pytest.warns(ferrovae.compat.AccelerateWarning, match="quantize was replaced"):
        ferrovae.accelerate(model)
    found = ferrovae.compat.report(model)
    assert [entry.path for entry in found.left] == ["quantizer", "quantizer.layers.1.codebook"]
    assert (model.encode(torch.randn(1, 1, 3000), bandwidth=4.0).audio_codes[0, 0, 1] == 0).all()


def test_compiled_whole() -> None:
    stack = ferrovae.accelerate(encodec()).quantizer
    x = torch.randn(2, 16, 40)
    compiled = torch.compile(lambda x: stack.encode(x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), stack.encode(x))


def test_bfloat16() -> None:
    stack = ferrovae.accelerate(encodec()).quantizer.bfloat16()
    x = torch.randn(2, 16, 40, dtype=torch.bfloat16)
    residual = x.mT.float()
    for layer, codes in zip(stack.layers, stack.encode(x), strict=True):
        embed = layer.codebook.embed.float()
        assert torch.equal(codes, (residual[..., None, :] - embed).double().square().sum(-1).argmin(-1))
        residual = residual - embed[codes]
