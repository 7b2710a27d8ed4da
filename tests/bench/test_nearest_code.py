"""The benchmark of `nearest_code` says what it measures, and tells right from wrong."""

from __future__ import annotations

import torch

from ferrovae.bench.nearest_code import _TARGETS, SHAPES, cases


def test_every_promise_is_measured() -> None:
    assert set(_TARGETS) <= {(shape["N"], shape["K"], shape["D"]) for shape in SHAPES}


def test_cases_of_a_small_shape() -> None:
    several, alone = cases({"N": 70, "K": 50, "D": 6}, torch.device("cpu"))
    assert next(iter(several.providers)) == "ferrovae"
    assert {"addmm + argmin", "cdist + argmin"} <= set(several.providers)
    assert several.work.flops == 2 * 70 * 50 * 6
    assert (several.threads, alone.threads) == (2, 1)
    for name, call in several.providers.items():
        result = call()
        assert several.check(name, result), name
        assert isinstance(result, torch.Tensor)
        wrong = result.clone()
        wrong[-1] = (wrong[-1] + 1) % 50
        assert not several.check(name, wrong)
