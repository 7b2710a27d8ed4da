"""The benchmark's providers do the same work, and its check tells right from wrong."""

from __future__ import annotations

import torch

from ferrovae.bench.residual_nearest_code import SHAPES, cases


def test_providers_agree_and_the_check_can_fail() -> None:
    assert {"N": 4800, "K": 1024, "D": 128, "Q": 8} in SHAPES
    (case,) = cases({"N": 30, "K": 20, "D": 6, "Q": 3}, torch.device("cpu"))
    assert next(iter(case.providers)) == "ferrovae"
    results = {name: provider() for name, provider in case.providers.items()}
    for name, result in results.items():
        assert case.check(name, result), name
    indices, quantized = results["ferrovae"]
    assert not case.check("ferrovae", (indices.roll(1, 0), quantized))
    assert not case.check("ferrovae", (indices, quantized + 0.1))


def test_a_codebook_for_all_stages() -> None:
    (shape,) = [shape for shape in SHAPES if shape["K"] == 16384]
    (case,) = cases(shape | {"N": 2}, torch.device("cpu"))
    assert case.variant == "one codebook"
    assert case.check("ferrovae", case.providers["ferrovae"]())
