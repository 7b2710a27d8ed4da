"""The fused operations: tensors in, tensors out; any device, autograd, `torch.compile(fullgraph=True)`."""

from ferrovae.ops._backend import BackendWarning, use_backend
from ferrovae.ops.bernoulli_log_prob import bernoulli_log_prob
from ferrovae.ops.categorical_log_prob import categorical_log_prob
from ferrovae.ops.code_cross_entropy import code_cross_entropy
from ferrovae.ops.code_logsumexp import code_logsumexp
from ferrovae.ops.code_sums import code_sums
from ferrovae.ops.continuous_bernoulli_log_prob import continuous_bernoulli_log_prob
from ferrovae.ops.discretized_logistic_log_prob import discretized_logistic_log_prob
from ferrovae.ops.discretized_logistic_mixture_log_prob import discretized_logistic_mixture_log_prob
from ferrovae.ops.expected_code import expected_code
from ferrovae.ops.gaussian_log_prob import gaussian_log_prob
from ferrovae.ops.mean_code_entropy import mean_code_entropy
from ferrovae.ops.nearest_code import nearest_code
from ferrovae.ops.negative_binomial_log_prob import negative_binomial_log_prob
from ferrovae.ops.poisson_log_prob import poisson_log_prob
from ferrovae.ops.reparameterize_kl import reparameterize_kl, reparameterize_kl_from_moments
from ferrovae.ops.residual_nearest_code import residual_nearest_code
from ferrovae.ops.sample_code import sample_code
from ferrovae.ops.sign_code_entropy import sign_code_entropy
from ferrovae.ops.sign_code_mean import sign_code_mean

__all__ = [
    "BackendWarning",
    "bernoulli_log_prob",
    "categorical_log_prob",
    "code_cross_entropy",
    "code_logsumexp",
    "code_sums",
    "continuous_bernoulli_log_prob",
    "discretized_logistic_log_prob",
    "discretized_logistic_mixture_log_prob",
    "expected_code",
    "gaussian_log_prob",
    "mean_code_entropy",
    "nearest_code",
    "negative_binomial_log_prob",
    "poisson_log_prob",
    "reparameterize_kl",
    "reparameterize_kl_from_moments",
    "residual_nearest_code",
    "sample_code",
    "sign_code_entropy",
    "sign_code_mean",
    "use_backend",
]
