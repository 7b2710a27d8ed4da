"""Layers: encoders, decoders and quantizers."""

from ferrovae.nn.decoders import ConvDecoder, ConvDecoder2d, MLPDecoder
from ferrovae.nn.distributions import DiagonalNormal
from ferrovae.nn.encoders import ConvEncoder, ConvEncoder2d, MLPEncoder
from ferrovae.nn.point_mass import PointMass
from ferrovae.nn.quantizers import CodebookUsage, LossBreakdown, RandomProjectionQuantizer, VectorQuantize

__all__ = [
    "CodebookUsage",
    "ConvDecoder",
    "ConvDecoder2d",
    "ConvEncoder",
    "ConvEncoder2d",
    "DiagonalNormal",
    "LossBreakdown",
    "MLPDecoder",
    "MLPEncoder",
    "PointMass",
    "RandomProjectionQuantizer",
    "VectorQuantize",
]
