"""Pairwise test cases: every two levels of two factors meet in some case, but not their whole product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, str]
Level = tuple[str, str]


def pairwise_cases(factors: Mapping[str, Sequence[str]], excluded: Iterable[Case] = ()) -> list[Case]:
    """Cases, a level for each factor, in which every pair of levels occurs that can; the first ones hold most pairs.

    excluded: combinations of levels that no case may hold. Greedy, and so not the smallest number of cases; the same
    for the same arguments.
    """
    place = {name: number for number, name in enumerate(factors)}
    banned: dict[Level, list[Case]] = {}
    for part in excluded:
        for level in part.items():
            banned.setdefault(level, []).append(part)

    def pair(one: Level, two: Level) -> tuple[Level, Level]:
        return (one, two) if place[one[0]] < place[two[0]] else (two, one)

    def allowed(case: Case, new: Level) -> bool:
        """Whether a case that is allowed stays so with one more level."""
        name, level = new
        return not any(
            all(value == (level if other == name else case.get(other)) for other, value in part.items())
            for part in banned.get(new, ())
        )

    def completed(case: Case) -> Case | None:
        """The case with a level for the factors that have none: those that cover the most, depth first."""
        name = next((name for name in factors if name not in case), None)
        if name is None:
            return case
        gains = {
            level: sum(pair((name, level), item) in due for item in case.items())
            for level in factors[name]
            if allowed(case, (name, level))
        }
        # A tie goes to the level that still has the most pairs to come.
        for level in sorted(gains, key=lambda level: (-gains[level], -left[name, level])):
            found = completed({**case, name: level})
            if found is not None:
                return {name: found[name] for name in factors}
        return None

    due = {
        ((one, first), (two, second)): None
        for one, two in combinations(factors, 2)
        for first, second in product(factors[one], factors[two])
        if allowed({}, (one, first)) and allowed({one: first}, (two, second))
    }
    left = Counter(level for levels in due for level in levels)
    cases = []
    while due:
        first = next(iter(due))
        case = completed(dict(first))
        if case is not None:
            cases.append(case)
        # A pair that no case holds is excluded by larger combinations.
        for held in [first] if case is None else list(combinations(case.items(), 2)):
            if held in due:
                del due[held]
                left.subtract(held)
    return cases


def in_two_companies(
    levels: Mapping[str, Sequence[str]], excluded: Iterable[Case] = ()
) -> tuple[list[Case], list[Case]]:
    """Cases with all pairs of levels, and the same pairs in other company."""
    excluded = list(excluded)
    turned = {name: tuple(levels[name])[::-1] for name in reversed(levels)}
    return pairwise_cases(levels, excluded), pairwise_cases(turned, excluded)


def options_at(case: Case, options: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The constructor's options of a case; what is a class makes its value anew."""
    found: dict[str, Any] = {}
    for factor, levels in options.items():
        found |= levels[case[factor]]
    return {name: value() if isinstance(value, type) else value for name, value in found.items()}


def naming(levels: Mapping[str, Sequence[str]]) -> Callable[[Case], str]:
    """How a case is called: by its levels that are not their factor's first."""

    def name_of(case: Case) -> str:
        return ", ".join(f"{name} {level}" for name, level in case.items() if level != levels[name][0]) or "default"

    return name_of
