"""The fused operations: tensors in, tensors out; any device, autograd, `torch.compile(fullgraph=True)`."""

from ferrovae.ops._backend import BackendWarning, use_backend
from ferrovae.ops.bernoulli_log_prob import bernoulli_log_prob
from ferrovae.ops.categorical_log_prob import categorical_log_prob
from ferrovae.ops.continuous_bernoulli_log_prob import continuous_bernoulli_log_prob
from ferrovae.ops.gaussian_log_prob import gaussian_log_prob
from ferrovae.ops.nearest_code import nearest_code
from ferrovae.ops.negative_binomial_log_prob import negative_binomial_log_prob
from ferrovae.ops.poisson_log_prob import poisson_log_prob
from ferrovae.ops.reparameterize_kl import reparameterize_kl, reparameterize_kl_from_moments

__all__ = [
    "BackendWarning",
    "bernoulli_log_prob",
    "categorical_log_prob",
    "continuous_bernoulli_log_prob",
    "gaussian_log_prob",
    "nearest_code",
    "negative_binomial_log_prob",
    "poisson_log_prob",
    "reparameterize_kl",
    "reparameterize_kl_from_moments",
    "use_backend",
]
