"""The public names of this submodule of vector-quantize-pytorch."""

from ferrovae.compat.vector_quantize_pytorch._names import lazily

__getattr__ = lazily("sim_vq")
