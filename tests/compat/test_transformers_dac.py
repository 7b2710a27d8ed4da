"""DAC of transformers: codes, latents, losses, dropout and gradients before and after."""

from __future__ import annotations

import copy

import pytest
import torch

import ferrovae
from compat.models import check_codes, check_gradients, dac


@pytest.mark.parametrize("stages", [None, 2])
def test_codes_and_waveform(stages: int | None) -> None:
    theirs = dac()
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 1, 8000)
    with torch.no_grad():
        before, after = theirs(x, n_quantizers=stages), ours(x, n_quantizers=stages)
    assert after.audio_codes.shape[1] == (stages or 4)
    assert list(after) == list(before)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(after.audio_codes, before.audio_codes)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_losses_and_gradients_in_training(dropout: float) -> None:
    theirs = dac(quantizer_dropout=dropout).train()
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(4, 1, 4000)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        result = model(x)
        (result.loss.sum() + result.audio_values.square().mean()).backward()
        results.append(result)
    torch.testing.assert_close(results[0].loss, results[1].loss)
    assert check_gradients(ours, theirs) > 10
    assert ours.quantizer.quantizers[0].codebook.weight.grad.abs().sum() > 0


def test_from_latents() -> None:
    theirs = dac().quantizer
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    latents = torch.randn(2, 4 * 8, 30)
    for a, b in zip(ours.from_latents(latents), theirs.from_latents(latents), strict=True):
        torch.testing.assert_close(a, b)


def test_one_stage_searches_by_angle() -> None:
    stage = dac().quantizer.quantizers[0]
    x = torch.randn(2, 8, 1500)
    _, theirs = stage.decode_latents(x)
    quantized, ours = ferrovae.accelerate(stage).decode_latents(x)
    rows = x.mT.reshape(-1, 8)
    assert check_codes(ours.flatten(), theirs.flatten(), rows, stage.codebook.weight, cosine=True) <= 3
    assert torch.equal(quantized, stage.codebook.weight[ours].mT)


def test_fetches_a_codebook_kept_elsewhere() -> None:
    stage = ferrovae.accelerate(dac().quantizer.quantizers[0])
    calls = []

    class Hook:
        def pre_forward(self, module: torch.nn.Module, *args: object) -> None:
            calls.append("fetched")

        def post_forward(self, module: torch.nn.Module, output: object) -> object:
            calls.append("let go")
            return output

    stage.codebook._hf_hook = Hook()
    stage.decode_latents(torch.randn(1, 8, 3))
    assert calls == ["fetched", "let go"]
