"""Where each public name of vector-quantize-pytorch 1.32 stands there; here all of them resolve on first use."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

# name -> its submodule.
SUBMODULES = {
    "BinaryMapper": "binary_mapper",
    "EvoLFQ": "evo_lookup_free_quantization",
    "FSP": "finite_scalar_perturbation",
    "FSQ": "finite_scalar_quantization",
    "GroupedResidualFSQ": "residual_fsq",
    "GroupedResidualLFQ": "residual_lfq",
    "GroupedResidualVQ": "residual_vq",
    "HierarchicalVQ": "hierarchical_vq",
    "LFQ": "lookup_free_quantization",
    "LatentQuantize": "latent_quantization",
    "RandomProjectionQuantizer": "random_projection_quantizer",
    "ResidualFSQ": "residual_fsq",
    "ResidualLFQ": "residual_lfq",
    "ResidualSimVQ": "residual_sim_vq",
    "ResidualVQ": "residual_vq",
    "Sequential": "utils",
    "SimVQ": "sim_vq",
    "VectorQuantize": "vector_quantize_pytorch",
}


# What `ferrovae.nn` has under this name is right, and so another layer with another state_dict.
_ELSEWHERE = {"RandomProjectionQuantizer": "ferrovae.compat.vector_quantize_pytorch._random_projection"}


def resolve(name: str) -> Any:
    """The class of ours; AttributeError if there is none."""
    return getattr(import_module(_ELSEWHERE.get(name, "ferrovae.nn")), name)


def lazily(submodule: str) -> Callable[[str], Any]:
    """The `__getattr__` of a submodule: the names that stand in it upstream."""

    def find(name: str) -> Any:
        if SUBMODULES.get(name) == submodule:
            return resolve(name)
        raise AttributeError(f"module 'ferrovae.compat.vector_quantize_pytorch.{submodule}' has no attribute {name!r}")

    return find
