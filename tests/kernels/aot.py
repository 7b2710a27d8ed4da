"""Compile the Triton kernels ahead of time, without a GPU, and print what each needs of the machine as JSON.

    python tests/kernels/aot.py [--operations nearest_code ...] [--targets sm_90 ...] [--first]
    python tests/kernels/aot.py --out benchmarks/aot.json       # what the shipped configurations need, for the record

A process of its own: an interpreted kernel cannot be compiled, so TRITON_INTERPRET must not be set. A module
`kernels/<operation>.py` takes part by having `aot_configurations() -> list[dict]`, the configurations it ships, each

    {"kernel": "forward_kernel",              # name of the @triton.jit function in the module
     "name": "fp32 8x256",                    # optional, for reports
     "signature": {"x": "*fp32", "N": "i32"}, # runtime arguments; one of value None is passed as a constexpr None
     "constexprs": {"BLOCK": 256},
     "divisible": ["x", "N"],                 # optional: arguments known to be divisible by 16 (default: all pointers)
     "num_warps": 4, "num_stages": 2,
     "targets": ["sm_90"]}                    # optional: only there
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# target: (Triton's backend, architecture, lanes of a warp, bytes of shared memory a block may have)
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 166912),
    "sm_90": ("cuda", 90, 32, 232448),
    "sm_100": ("cuda", 100, 32, 232448),
    "gfx942": ("hip", "gfx942", 64, 65536),
}
FIGURES = ("registers", "stack", "local", "spills", "shared", "error")


def operations() -> list[str]:
    """The modules under `kernels/` that say what they ship."""
    return sorted(path.stem for path in KERNELS.glob("*.py") if "def aot_configurations" in path.read_text("utf-8"))


def compile_one(module: Any, configuration: dict[str, Any], target: str) -> dict[str, Any]:
    """Registers, stack, local, spill and shared bytes of one kernel on one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(module, configuration["kernel"])
    names = list(function.arg_names)
    given = dict(configuration["signature"])
    constants = dict(configuration["constexprs"]) | {name: None for name, kind in given.items() if kind is None}
    if set(names) != set(given) | set(constants):
        raise ValueError(
            f"{configuration['kernel']}: arguments {names}, described {sorted(set(given) | set(constants))}"
        )
    signature = {name: "constexpr" if name in constants else given[name] for name in names}
    pointers = [name for name, kind in given.items() if kind is not None and kind.startswith("*")]
    divisible = configuration.get("divisible", pointers)
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    backend, architecture, lanes, _ = TARGETS[target]
    options = {key: configuration[key] for key in ("num_warps", "num_stages") if key in configuration}
    compiled = triton.compile(
        source, target=GPUTarget(backend, architecture, lanes), options={**options, "enable_fp_fusion": True}
    )
    usage = _nvidia(compiled.asm["cubin"]) if backend == "cuda" else _amd(compiled.asm["amdgcn"])
    return {**usage, "shared": compiled.metadata.shared}


def _nvidia(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = subprocess.run(
            [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"]), "spills": 0}


def _amd(assembly: str) -> dict[str, int]:
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    return {
        "registers": found["vgpr_count"],
        "stack": found["private_segment_fixed_size"],
        "local": 0,
        "spills": found["vgpr_spill_count"] + found["sgpr_spill_count"],
    }


def describe(configuration: dict[str, Any]) -> dict[str, Any]:
    """What tells a configuration from others of its kernel, in words."""
    kinds = [kind for kind in configuration["signature"].values() if kind is None or kind.startswith("*")]
    return {
        "name": configuration.get("name", ""),
        "pointers": " ".join("none" if kind is None else kind[1:] for kind in kinds),
        "constexprs": " ".join(f"{name}={value}" for name, value in configuration["constexprs"].items()),
        "warps": configuration.get("num_warps"),
        "stages": configuration.get("num_stages"),
    }


def compile_all(wanted: list[str], targets: list[str], first: bool) -> Iterator[dict[str, Any]]:
    """One record a (configuration, target); an `error` instead of figures where it does not compile."""
    for operation in wanted:
        module = import_module(f"ferrovae.kernels.{operation}")
        for target in targets:
            shipped = [c for c in module.aot_configurations() if target in c.get("targets", TARGETS)]
            for configuration in shipped[:1] if first else shipped:
                record = {"operation": operation, "kernel": configuration["kernel"], "target": target}
                record |= describe(configuration)
                try:
                    record |= compile_one(module, configuration, target)
                except Exception as error:
                    record["error"] = f"{type(error).__name__}: {error}"
                yield record


def identity(record: dict[str, Any]) -> str:
    """What says which kernel a record is about: all of it but the figures."""
    return json.dumps({key: value for key, value in record.items() if key not in FIGURES})


def write(path: Path, records: list[dict[str, Any]], version: str) -> None:
    """Put the records in the place of their operations' and targets' older ones; all go with another compiler.

    Raises:
        ValueError: a kernel that did not compile.
    """
    broken = [record for record in records if "error" in record]
    if broken:
        raise ValueError(f"{broken[0]['operation']} {broken[0]['name']} {broken[0]['target']}: {broken[0]['error']}")
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"triton": version, "kernels": []}
    anew = {(record["operation"], record["target"]) for record in records}
    kept = known["kernels"] if known["triton"] == version else []
    kept = [record for record in kept if (record["operation"], record["target"]) not in anew]
    kernels = {identity(record): record for record in [*kept, *records]}
    lines = ",\n".join(f" {json.dumps(kernels[key])}" for key in sorted(kernels))
    path.write_text(f'{{"triton": {json.dumps(version)}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and print JSON.")
    parser.add_argument("--operations", nargs="*", default=operations())
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--first", action="store_true", help="only the first configuration of an operation")
    parser.add_argument("--out", type=Path, help="record them in this file instead")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("aot.py: unset TRITON_INTERPRET; an interpreted kernel cannot be compiled")
    records = list(compile_all(arguments.operations, arguments.targets, arguments.first))
    if arguments.out is None:
        json.dump(records, sys.stdout, indent=1)
        return
    import triton

    try:
        write(arguments.out, records, triton.__version__)
    except ValueError as error:
        sys.exit(f"aot.py: {error}")


if __name__ == "__main__":
    main()
