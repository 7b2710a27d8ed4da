"""The benchmarks of the log-likelihoods compare providers that agree with a float64 truth, which can be missed."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from ferrovae.bench.case import Case


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        ("bernoulli_log_prob", {"N": 3, "D": 17}),
        ("discretized_logistic_log_prob", {"N": 3, "D": 17}),
        ("discretized_logistic_mixture_log_prob", {"N": 2, "H": 5, "M": 3}),
    ],
)
def test_providers_are_right_and_wrong_results_are_found(operation: str, shape: dict[str, int]) -> None:
    module = import_module(f"ferrovae.bench.{operation}")
    assert {frozenset(default) for default in module.SHAPES} == {frozenset(shape)}
    found: list[Case] = list(module.cases(shape, torch.device("cpu")))
    assert [case.mode for case in found] == ["forward", "full"]
    for case in found:
        assert next(iter(case.providers)) == "ferrovae"
        for name in ("ferrovae", "torch eager"):  # compiling takes too long here
            result = case.providers[name]()
            assert case.check(name, result)
            wrong = tuple(1.001 * value for value in result) if isinstance(result, tuple) else 1.001 * result
            assert not case.check(name, wrong)
