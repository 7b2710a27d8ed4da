"""`ferrovae info`: operations x backends on this machine, with the reason for each that cannot run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tyro

BACKENDS = ("reference", "rust", "triton")


@dataclass(frozen=True)
class Info:
    """Which operation runs on which backend here, and why not on the others."""

    json: bool = False
    """Print JSON."""


def main(prog: str, arguments: list[str]) -> int:
    """Collect and print."""
    options = tyro.cli(Info, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone))
    found = collect()
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0


def collect() -> dict[str, Any]:
    """The machine, torch's GPUs, and for each operation and backend why it cannot run (None: it can)."""
    import torch

    from ferrovae.bench.machine import machine
    from ferrovae.ops._registry import operations

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    native = {"reference": "cpu", "rust": "cpu", "triton": "cuda"}
    return {
        "machine": machine(),
        "gpus": devices,
        "operations": {
            name: {backend: _obstacle(operation, backend, native[backend], devices) for backend in BACKENDS}
            for name, operation in sorted(operations.items())
        },
    }


def table(found: dict[str, Any]) -> str:
    """As text: the machine, then a row an operation, then the reasons, each once."""
    lines = [f"{key:<10} {value}" for key, value in found["machine"].items()]
    lines.append(f"{'gpus':<10} {', '.join(found['gpus']) or 'none'}")
    rows = found["operations"]
    width = max((len(name) for name in rows), default=0) + 2
    lines += ["", f"{'operation':<{width}}" + "".join(f"{backend:<11}" for backend in BACKENDS)]
    reasons: list[str] = []
    for name, backends in rows.items():
        cells = []
        for reason in backends.values():
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        lines.append(f"{name:<{width}}" + "".join(f"{cell:<11}" for cell in cells).rstrip())
    lines += [f"({number}) {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join(lines)


def _obstacle(operation: Any, backend: str, device: str, gpus: list[str]) -> str | None:
    reason: str | None = operation.obstacle(backend, device)
    if reason is None and device == "cuda" and not gpus:
        return "torch sees no GPU here"
    return reason
