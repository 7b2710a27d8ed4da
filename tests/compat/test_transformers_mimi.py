"""Mimi of transformers: the same codes and waveforms before and after, with and without projections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import ferrovae
from compat.models import check_gradients, mimi


@pytest.mark.parametrize("stages", [1, 3, 6])
@pytest.mark.parametrize(
    "options", [{}, {"hidden_size": 16, "upsample_groups": 16}, {"num_semantic_quantizers": 2, "num_quantizers": 8}]
)
def test_codes_and_waveform(options: dict[str, Any], stages: int) -> None:
    theirs = mimi(**options)
    stages = max(stages, theirs.config.num_semantic_quantizers)
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 1, 8000)
    with torch.no_grad():
        before, after = theirs.encode(x, num_quantizers=stages), ours.encode(x, num_quantizers=stages)
        assert after.audio_codes.shape[1] == stages
        assert torch.equal(after.audio_codes, before.audio_codes)
        assert torch.equal(ours.decode(after.audio_codes).audio_values, theirs.decode(before.audio_codes).audio_values)


def test_gradients_in_training() -> None:
    theirs = mimi().train()
    ours = ferrovae.accelerate(copy.deepcopy(theirs))
    x = torch.randn(2, 1, 4000)
    for model in (ours, theirs):
        model(x).audio_values.square().sum().backward()
    assert check_gradients(ours, theirs) > 10


def test_a_subclass_inside_keeps_its_own_search() -> None:
    model = mimi()
    stack = model.quantizer.acoustic_residual_vector_quantizer

    class Last(type(stack.layers[0].codebook)):
        def quantize(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return torch.full((len(hidden_states),), self.codebook_size - 1)

    stack.layers[2].codebook.__class__ = Last
    with pytest.warns(ferrovae.compat.AccelerateWarning, match="a subclass of MimiEuclideanCodebook"):
        ferrovae.accelerate(model)
    codes = model.encode(torch.randn(1, 1, 4000)).audio_codes
    assert (codes[0, 3] == 63).all()
    assert not (codes[0, 2] == 63).all()
