"""Which benchmarks there are, read off the modules' source: torch is not imported to answer `--help` or a typo."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ferrovae.bench import shapes

# Benchmarks of something that is not an operation, with a `main(arguments)` of their own.
PROGRAMS = ("loader", "quantizers")

Plan = list[tuple[str, dict[str, int]]]


@cache
def operations() -> tuple[str, ...]:
    """The modules of this package that have shapes and cases; what several share is in modules `_name.py`."""
    modules = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return tuple(path.stem for path in modules if {"SHAPES", "cases"} <= set(_defined(path)))


def module_of(operation: str) -> ModuleType:
    """`ferrovae.bench.<operation>`."""
    return import_module(f"ferrovae.bench.{operation}")


def check(names: Sequence[str], texts: Sequence[str]) -> None:
    """Refuse names that are no benchmark and shapes that cannot be, before anything is imported.

    Raises:
        ValueError: in one sentence that names the word.
    """
    for name in names:
        if name in PROGRAMS:
            raise ValueError(f"bench: {name!r} is measured alone and takes options of its own: ferrovae bench {name}")
        if name not in operations():
            known = ", ".join([*operations(), *PROGRAMS])
            raise ValueError(f"bench: {name!r} is not a benchmark, expected one of {known}")
    shapes.known(texts)


def planned(names: Sequence[str], texts: Sequence[str]) -> Plan:
    """Which operation is measured at which shape; without names all, each at those of the shapes that it can have.

    Raises:
        ValueError: a shape that a named operation cannot have, or none of them.
    """
    plan: Plan = []
    for name in names or operations():
        own = module_of(name).SHAPES
        fitting = [text for text in texts if names or shapes.fits(own, text)]
        if fitting or not texts:
            plan += [(name, shape) for shape in shapes.for_operation(name, own, fitting)]
    if not plan:
        raise ValueError(f"bench: no operation can have the shapes {' '.join(texts)}")
    return plan


def _defined(path: Path) -> Iterator[str]:
    """Names that a module defines or imports at its top."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
