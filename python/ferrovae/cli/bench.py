"""`ferrovae bench [NAME] [ARGUMENTS]`: hands over to `ferrovae.bench.NAME.main`; without a name, runs them all."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import ferrovae.bench


def names() -> list[str]:
    """The benchmarks there are: the modules of `ferrovae.bench` except the shared timing and tables."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(ferrovae.bench.__path__)
        if module.name not in ("measure", "tables")
    )


def main(prog: str, arguments: list[str]) -> int:
    """Run one benchmark with its own arguments, or all."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {prog} [NAME] [ARGUMENTS]\n\nNAME: {', '.join(names())} (none: all of them)")
        return 0
    chosen = arguments[:1] or names()
    for name in chosen:
        if name not in names():
            raise ValueError(f"bench: {name!r} is not a benchmark, expected one of {', '.join(names())}")
        import_module(f"ferrovae.bench.{name}").main(arguments[1:])
    return 0
