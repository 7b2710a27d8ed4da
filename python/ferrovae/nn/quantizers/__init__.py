"""Quantizers: layers that replace vectors by codes, with the interface and state_dict of vector-quantize-pytorch."""

from ferrovae.nn.quantizers.quantization_step import LossBreakdown
from ferrovae.nn.quantizers.random_projection_quantizer import RandomProjectionQuantizer
from ferrovae.nn.quantizers.usage import CodebookUsage
from ferrovae.nn.quantizers.vector_quantize import VectorQuantize

__all__ = ["CodebookUsage", "LossBreakdown", "RandomProjectionQuantizer", "VectorQuantize"]
