"""Pairwise test cases: every two levels of two factors meet in some case, but not their whole product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

Case = dict[str, str]


def pairwise_cases(factors: Mapping[str, Sequence[str]], excluded: Iterable[Case] = ()) -> list[Case]:
    """Cases, a level for each factor, in which every pair of levels occurs that can; the first ones hold most pairs.

    excluded: combinations of levels that no case may hold. Greedy, and so not the smallest number of cases; the same
    for the same arguments.
    """
    banned = [frozenset(part.items()) for part in excluded]

    def allowed(case: Case) -> bool:
        items = case.items()
        return not any(part <= items for part in banned)

    def completed(case: Case) -> Case | None:
        """The case with a level for the factors that have none: those that cover the most, depth first."""
        missing = [name for name in factors if name not in case]
        if not missing:
            return case
        name = missing[0]
        levels = [level for level in factors[name] if allowed({**case, name: level})]
        gains = {level: sum(frozenset([(name, level), item]) in due for item in case.items()) for level in levels}
        # A tie goes to the level that still has the most pairs to come.
        for level in sorted(levels, key=lambda level: (-gains[level], -left[name, level])):
            found = completed({**case, name: level})
            if found is not None:
                return {name: found[name] for name in factors}
        return None

    due: dict[frozenset[tuple[str, str]], None] = {}
    for one, two in combinations(factors, 2):
        for first in factors[one]:
            for second in factors[two]:
                if allowed({one: first, two: second}):
                    due[frozenset([(one, first), (two, second)])] = None
    left = Counter(item for pair in due for item in pair)
    cases = []
    while due:
        pair = next(iter(due))
        case = completed(dict(pair))
        if case is not None:
            cases.append(case)
        # A pair that no case holds is excluded by larger combinations.
        for held in [pair] if case is None else map(frozenset, combinations(case.items(), 2)):
            if held in due:
                del due[held]
                left.subtract(held)
    return cases
