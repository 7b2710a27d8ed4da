"""The fused operations: tensors in, tensors out; any device, autograd, `torch.compile(fullgraph=True)`."""

from ferrovae.ops._backend import BackendWarning, use_backend
from ferrovae.ops.bernoulli_log_prob import bernoulli_log_prob
from ferrovae.ops.discretized_logistic_log_prob import discretized_logistic_log_prob
from ferrovae.ops.discretized_logistic_mixture_log_prob import discretized_logistic_mixture_log_prob
from ferrovae.ops.nearest_code import nearest_code
from ferrovae.ops.reparameterize_kl import reparameterize_kl, reparameterize_kl_from_moments

__all__ = [
    "BackendWarning",
    "bernoulli_log_prob",
    "discretized_logistic_log_prob",
    "discretized_logistic_mixture_log_prob",
    "nearest_code",
    "reparameterize_kl",
    "reparameterize_kl_from_moments",
    "use_backend",
]
