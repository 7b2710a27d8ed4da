"""The benchmark of `sign_code_entropy`: all providers are right, and a wrong result is found."""

from __future__ import annotations

import torch

from ferrovae.bench import sign_code_entropy


def test_providers_agree_and_errors_are_found() -> None:
    (case,) = sign_code_entropy.cases({"N": 200, "d": 5}, torch.device("cpu"))
    assert next(iter(case.providers)) == "ferrovae"
    assert set(case.targets) <= set(case.providers)
    for name, call in case.providers.items():
        per_sample, batch, slope = call()
        assert case.check(name, (per_sample, batch, slope)), name
        assert not case.check(name, (per_sample * 1.1, batch, slope)), name
        assert not case.check(name, (per_sample, batch * 1.1, slope)), name
        assert not case.check(name, (per_sample, batch, -slope)), name
