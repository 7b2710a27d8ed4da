"""The fused operations: tensors in, tensors out; any device, autograd, `torch.compile(fullgraph=True)`."""

from ferrovae.ops._backend import BackendWarning, use_backend
from ferrovae.ops.nearest_code import nearest_code

__all__ = ["BackendWarning", "nearest_code", "use_backend"]
