"""The benchmarks of the log-likelihoods compare providers that are right, and see one that is wrong."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from ferrovae.bench.case import Case

NAMES = [
    "bernoulli",
    "categorical",
    "continuous_bernoulli",
    "discretized_logistic",
    "discretized_logistic_mixture",
    "gaussian",
    "negative_binomial",
    "poisson",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_provider_is_right_and_a_wrong_one_is_seen(name: str) -> None:
    module = import_module(f"ferrovae.bench.{name}_log_prob")
    shape = {letter: min(size, 12) for letter, size in module.SHAPES[-1].items()}
    cases: list[Case] = list(module.cases(shape, torch.device("cpu")))
    assert {(case.mode, case.threads) for case in cases} == {("forward", 1), ("forward", 2), ("full", 1), ("full", 2)}
    for case in cases:
        assert case.operation == f"{name}_log_prob"
        assert next(iter(case.providers)) == "ferrovae"
        for provider in ("ferrovae", "eager"):  # compiling takes seconds
            results = case.providers[provider]()
            assert case.check(provider, results)
            assert not case.check(provider, [result * 1.01 for result in results])
