"""What a benchmark of an operation says: cases, each with providers that do the same work on the same inputs.

A module `ferrovae/bench/<operation>.py` has

    SHAPES: list[dict[str, int]]                                  # where it is measured by default
    def cases(shape: dict[str, int], device: torch.device) -> Iterator[Case]    # makes the inputs, from a fixed seed

and nothing else public: timing, memory, rooflines, tables and JSON are done once, for all operations. The letters of
the first of SHAPES with so many, in their order, are what `--shapes 4096,1024,8` means. Cases are asked for one at a
time, so that inputs made inside the generator are freed before the next ones are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MODES = ("forward", "backward", "full")
UNITS = ("float32", "bfloat16", "float64")
OURS = "ferrovae"


@dataclass(frozen=True)
class Work:
    """The least that must be done: what the roofline is computed from."""

    bytes: float = 0.0  # read and written in main memory
    flops: float = 0.0  # floating-point operations in `unit`, a multiply-add being two
    unit: str = "float32"  # which peak limits them: "float32", "bfloat16" (tensor cores) or "float64"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"Work: unit is {self.unit!r}, expected one of {', '.join(UNITS)}")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        operation: the operation's name.
        shape: sizes by letter, as they are printed: `{"N": 65536, "K": 1024, "D": 8}`.
        providers: name -> a call that does the work once. `"ferrovae"` is first; a peer that is not installed is left
            out, and so is one that cannot run the shape. One that raises is left out of the run, with its reason.
        check: whether what the provider's call returned is right, against a truth computed here in float64. Called
            once a provider; whatever may be computed once is best kept from the first call.
        mode: `"forward"`, `"backward"`, or `"full"`: forward with the backward pass.
        dtype: of the inputs.
        variant: what else distinguishes the case: `"one code"`, `"binary"`.
        work: for the roofline.
        targets: peer name -> how many times its CPU time (on a GPU: its time) ours is promised to be smaller.
        roof_target: the share of the roofline that ours is promised to reach, where that is promised.
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
    roof_target: float | None = None
    memory_limit: int | None = None
    threads: int = 2
    heavy: bool = False

    def __post_init__(self) -> None:
        if next(iter(self.providers), None) != OURS:
            raise ValueError(f"Case: providers are {list(self.providers)}, expected {OURS!r} first")
        if self.mode not in MODES:
            raise ValueError(f"Case: mode is {self.mode!r}, expected one of {', '.join(MODES)}")

    @property
    def title(self) -> str:
        """One line: `nearest_code N=65536 K=1024 D=8 forward float32 one code`."""
        sizes = " ".join(f"{letter}={size}" for letter, size in self.shape.items())
        return " ".join(filter(None, (self.operation, sizes, self.mode, self.dtype, self.variant)))
