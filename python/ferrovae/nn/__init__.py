"""Layers: encoders, decoders and quantizers."""

from ferrovae.nn.decoders import ConvDecoder, ConvDecoder2d, MLPDecoder
from ferrovae.nn.distributions import DiagonalNormal
from ferrovae.nn.encoders import ConvEncoder, ConvEncoder2d, MLPEncoder
from ferrovae.nn.point_mass import PointMass
from ferrovae.nn.quantizers import LFQ, LFQLossBreakdown, LFQReturn, LossBreakdown, SimVQ, VectorQuantize

__all__ = [
    "ConvDecoder",
    "ConvDecoder2d",
    "ConvEncoder",
    "ConvEncoder2d",
    "DiagonalNormal",
    "LFQ",
    "LFQLossBreakdown",
    "LFQReturn",
    "LossBreakdown",
    "MLPDecoder",
    "MLPEncoder",
    "PointMass",
    "SimVQ",
    "VectorQuantize",
]
