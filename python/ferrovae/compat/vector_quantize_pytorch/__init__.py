"""The names and submodules of vector-quantize-pytorch 1.32 over `ferrovae.nn`.

For code that imports deep into that package this one can stand in its place:

    import sys
    from ferrovae.compat import vector_quantize_pytorch
    sys.modules["vector_quantize_pytorch"] = vector_quantize_pytorch
    from vector_quantize_pytorch.residual_vq import ResidualVQ
"""

from typing import Any

from ferrovae.compat.vector_quantize_pytorch._names import SUBMODULES, resolve

__all__ = list(SUBMODULES)


def __getattr__(name: str) -> Any:
    if name in SUBMODULES:
        return resolve(name)
    raise AttributeError(f"module 'ferrovae.compat.vector_quantize_pytorch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *SUBMODULES])
