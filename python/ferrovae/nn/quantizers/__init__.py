"""Quantizers: layers that replace vectors by codes, with the interface and state_dict of vector-quantize-pytorch."""

from ferrovae.nn.quantizers.binary_mapper import BinaryMapper
from ferrovae.nn.quantizers.fsp import FSP
from ferrovae.nn.quantizers.fsq import FSQ
from ferrovae.nn.quantizers.grouped_residual_vq import GroupedResidualVQ
from ferrovae.nn.quantizers.hierarchical_vq import HierarchicalVQ
from ferrovae.nn.quantizers.latent_quantize import LatentQuantize
from ferrovae.nn.quantizers.lfq import (
    LFQ,
    LFQLossBreakdown,
    LFQReturn,
)
from ferrovae.nn.quantizers.quantization_step import LossBreakdown
from ferrovae.nn.quantizers.random_projection_quantizer import RandomProjectionQuantizer
from ferrovae.nn.quantizers.residual_fsq import (
    GroupedResidualFSQ,
    ResidualFSQ,
)
from ferrovae.nn.quantizers.residual_vq import ResidualVQ
from ferrovae.nn.quantizers.sequential import Sequential
from ferrovae.nn.quantizers.sim_vq import SimVQ
from ferrovae.nn.quantizers.usage import CodebookUsage
from ferrovae.nn.quantizers.vector_quantize import VectorQuantize

__all__ = [
    "FSP",
    "FSQ",
    "LFQ",
    "BinaryMapper",
    "CodebookUsage",
    "GroupedResidualFSQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "LFQLossBreakdown",
    "LFQReturn",
    "LatentQuantize",
    "LossBreakdown",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualVQ",
    "Sequential",
    "SimVQ",
    "VectorQuantize",
]
