"""What a benchmark of an operation says: cases, each with providers that do the same work on the same inputs.

A module `ferrovae/bench/<operation>.py` has

    SHAPES: list[dict[str, int]]                                     # where it is measured by default
    def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]   # inputs are made here, keyed by a fixed seed

and nothing else public: timing, memory, rooflines, tables and JSON are done once, for all operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """The least that must be done: what the roofline is computed from."""

    bytes: float = 0.0  # read and written in main memory
    flops: float = 0.0  # floating-point operations in `unit`
    unit: str = "float32"  # which peak limits them: "float32", "bfloat16" (tensor cores) or "float64"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        operation: the operation's name.
        shape: sizes by letter, as they are printed: `{"N": 65536, "K": 1024, "D": 8}`.
        providers: name -> a call that does the work once. `"ferrovae"` is first; a peer that is not installed is left
            out, and so is one that cannot run the shape.
        check: whether what the provider's call returned is right, against a truth computed here in float64.
        mode: `"forward"`, or `"full"` with the backward pass.
        variant: what else distinguishes the case: `"one code"`, `"binary"`.
        work: for the roofline.
        targets: peer name -> how many times its CPU time (on a GPU: its time) ours is promised to be smaller.
        memory_limit: bytes beyond the inputs and results that ours may take at most, where that is promised.
        threads: of torch, on a CPU.
        heavy: skip peers' repeats beyond three rounds: seconds a call.
    """

    operation: str
    shape: Mapping[str, int]
    providers: Mapping[str, Callable[[], object]]
    check: Callable[[str, object], bool]
    mode: str = "forward"
    dtype: str = "float32"
    variant: str = ""
    work: Work = field(default_factory=Work)
    targets: Mapping[str, float] = field(default_factory=dict)
    memory_limit: int | None = None
    threads: int = 2
    heavy: bool = False
