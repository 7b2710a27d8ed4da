"""The benchmark of `code_sums`: all providers are right, and a wrong result is found."""

from __future__ import annotations

import torch

from ferrovae.bench import code_sums


def test_providers_agree_and_errors_are_found() -> None:
    cases = list(code_sums.cases({"N": 200, "K": 7, "D": 3}, torch.device("cpu")))
    assert [case.variant for case in cases] == ["spread", "one code"]
    for case in cases:
        assert next(iter(case.providers)) == "ferrovae"
        assert set(case.targets) <= set(case.providers)
        for name, call in case.providers.items():
            sums, counts = call()
            assert case.check(name, (sums, counts)), name
            assert not case.check(name, (sums * 1.01, counts)), name
            assert not case.check(name, (sums, counts + 1)), name
