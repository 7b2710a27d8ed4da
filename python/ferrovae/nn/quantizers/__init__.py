"""Quantizers: layers that replace vectors by codes, with the interface and state_dict of vector-quantize-pytorch."""

from ferrovae.nn.quantizers.evo_lfq import EvoLFQ, EvoLFQResult, EvoLFQReturn
from ferrovae.nn.quantizers.lfq import LFQ, LFQLossBreakdown, LFQReturn
from ferrovae.nn.quantizers.sim_vq import SimVQ
from ferrovae.nn.quantizers.vector_quantize import LossBreakdown, VectorQuantize

__all__ = [
    "LFQ",
    "EvoLFQ",
    "EvoLFQResult",
    "EvoLFQReturn",
    "LFQLossBreakdown",
    "LFQReturn",
    "LossBreakdown",
    "SimVQ",
    "VectorQuantize",
]
