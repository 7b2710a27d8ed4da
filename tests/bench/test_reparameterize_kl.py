"""The benchmark's cases do the same work, and its check tells right from wrong."""

from __future__ import annotations

import pytest
import torch

from ferrovae.bench.reparameterize_kl import SHAPES, VARIANTS, cases


@pytest.mark.parametrize("shape", [{"N": 40, "D": 17}, {"N": 5, "C": 2, "H": 8, "W": 7}])
def test_cases(shape: dict[str, int]) -> None:
    found = list(cases(shape, torch.device("cpu")))
    assert [(case.variant, case.mode) for case in found] == [(v, m) for v in VARIANTS for m in ("forward", "full")]
    for case in found:
        assert next(iter(case.providers)) == "ferrovae"
        for name in ("ferrovae", "eager"):  # not torch.compile: a minute of compilation
            result = case.providers[name]()
            assert case.check(name, result), (case.variant, case.mode, name)
            for wrong in range(len(result)):
                worse = list(result)
                worse[wrong] = worse[wrong] * 1.5
                assert not case.check(name, worse), (case.variant, case.mode, name, wrong)


def test_promises_stand_where_they_were_made() -> None:
    assert SHAPES[0] == {"N": 4096, "D": 1024}
    small = cases({"N": 3, "D": 4}, torch.device("cpu"))
    assert all(not case.targets for case in small)
