"""The pairwise cases against all cases there are."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from nn.quantizers.pairwise import pairwise_cases

FACTORS = {"a": "123", "b": "12", "c": "1234", "d": "12", "e": "12"}


def pairs(cases):
    return {frozenset(pair) for case in cases for pair in combinations(case.items(), 2)}


@pytest.mark.parametrize(
    "excluded",
    [
        [],
        [{"a": "1", "b": "2"}, {"c": "4", "d": "1"}],
        # Together they leave a = 1 no way to meet c = 4.
        [{"a": "1", "c": "4", "d": "1"}, {"a": "1", "d": "2", "e": "1"}, {"c": "4", "e": "2"}],
        [{"e": "2"}],
    ],
)
def test_every_pair_that_can_meet_meets(excluded):
    everything = [dict(zip(FACTORS, levels, strict=True)) for levels in product(*FACTORS.values())]
    possible = [case for case in everything if not any(part.items() <= case.items() for part in excluded)]
    cases = pairwise_cases(FACTORS, excluded)
    assert all(case in possible for case in cases)
    assert pairs(cases) == pairs(possible)
    assert len(cases) < len(possible) / 2
