"""The fused operations: tensors in, tensors out; any device, autograd, `torch.compile(fullgraph=True)`."""

from ferrovae.ops._backend import BackendWarning, use_backend

__all__ = ["BackendWarning", "use_backend"]
