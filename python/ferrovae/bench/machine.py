"""What a figure depends on: the processor or GPU, the versions of everything at hand, the load of the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# A provider's name contains the word: its version is that of the first of these packages that is installed.
PACKAGES: dict[str, tuple[str, ...]] = {
    "ferrovae": ("ferrovae",),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12"),
    "vector-quantize-pytorch": ("vector-quantize-pytorch",),
    "numpy": ("numpy",),
}


def machine() -> dict[str, str | int]:
    """The processor, the software versions and the settings a figure depends on."""
    import numpy
    import torch

    from ferrovae import __version__

    return {
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "ferrovae": __version__,
        "simd": simd(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def simd() -> str:
    """The instruction set our kernels use here; `"none"` without the compiled extension."""
    try:
        from ferrovae import _core
    except ImportError:
        return "none"
    return _core.simd_level()


def multiply_add_peak(attempts: int = 3) -> float | None:
    """Float32 operations a second of one thread that does nothing but multiply and add; None where not measurable.

    The best of a few attempts: whatever else the machine does only takes away.
    """
    try:
        from ferrovae import _core
    except ImportError:
        return None
    measure = getattr(_core, "multiply_add_peak", None)
    return None if measure is None else max(measure() for _ in range(attempts))


def device_name(kind: str) -> str:
    """What a row calls the device: the processor's or the GPU's name."""
    if kind == "cpu":
        return processor()
    import torch

    return torch.cuda.get_device_name()


def version_of(provider: str) -> str:
    """The version of the software behind a provider; torch's, unless its name says another."""
    for word, packages in PACKAGES.items():
        if word in provider:
            return next(filter(None, map(_installed, packages)), "")
    return _installed("torch") or ""


def describe(kind: str) -> dict[str, Any]:
    """`machine()`, with the GPU, the peers' versions and the load average so far."""
    found: dict[str, Any] = {**machine(), "load_average": load()}
    found["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "")
    names = dict.fromkeys(name for packages in PACKAGES.values() for name in packages)
    found["versions"] = {name: installed for name in [*names, "triton"] if (installed := _installed(name))}
    if kind == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability()
        found |= {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    return found


def load() -> list[float]:
    """Processes that wanted a processor in the last minute, on average; empty where the system does not say."""
    try:
        return [round(os.getloadavg()[0], 2)]
    except (AttributeError, OSError):
        return []


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
