"""The benchmarks of `sample_code` and `code_logsumexp`: every provider does the work, and wrong results are seen."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from ferrovae.bench import code_logsumexp, sample_code

SHAPE = {"N": 200, "K": 50, "D": 3}


@pytest.mark.parametrize("module", [code_logsumexp, sample_code])
def test_every_provider_is_right(module: ModuleType) -> None:
    found = list(module.cases(SHAPE, torch.device("cpu")))
    assert len(found) == 2
    for case in found:
        assert next(iter(case.providers)) == "ferrovae"
        for name, run in case.providers.items():
            assert case.check(name, run()), (case.mode, case.variant, name)


def test_wrong_results_are_seen() -> None:
    forward, full = code_logsumexp.cases(SHAPE, torch.device("cpu"))
    assert not forward.check("", forward.providers["ferrovae"]() + 1e-2)
    value, of_x, of_codes = full.providers["ferrovae"]()
    assert not full.check("", (value, of_x * 1.1, of_codes * 1.1))
    assert not full.check("", (value, of_x, -of_codes))
    for case in sample_code.cases(SHAPE, torch.device("cpu")):
        assert not case.check("", torch.zeros(200, dtype=torch.int64))
