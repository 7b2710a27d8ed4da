"""Layers: encoders, decoders and quantizers."""

from ferrovae.nn.decoders import (
    ConvDecoder,
    ConvDecoder2d,
    MLPDecoder,
)
from ferrovae.nn.distributions import DiagonalNormal
from ferrovae.nn.encoders import (
    ConvEncoder,
    ConvEncoder2d,
    MLPEncoder,
)
from ferrovae.nn.point_mass import PointMass
from ferrovae.nn.quantizers import (
    FSP,
    FSQ,
    LFQ,
    BinaryMapper,
    CodebookUsage,
    GroupedResidualFSQ,
    GroupedResidualVQ,
    HierarchicalVQ,
    LatentQuantize,
    LFQLossBreakdown,
    LFQReturn,
    LossBreakdown,
    RandomProjectionQuantizer,
    ResidualFSQ,
    ResidualVQ,
    Sequential,
    SimVQ,
    VectorQuantize,
)

__all__ = [
    "FSP",
    "FSQ",
    "LFQ",
    "BinaryMapper",
    "CodebookUsage",
    "ConvDecoder",
    "ConvDecoder2d",
    "ConvEncoder",
    "ConvEncoder2d",
    "DiagonalNormal",
    "GroupedResidualFSQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "LFQLossBreakdown",
    "LFQReturn",
    "LatentQuantize",
    "LossBreakdown",
    "MLPDecoder",
    "MLPEncoder",
    "PointMass",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualVQ",
    "Sequential",
    "SimVQ",
    "VectorQuantize",
]
