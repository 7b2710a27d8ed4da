"""`torch.func`'s transforms over every differentiable operation: the gradients that autograd gives, one by one."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jacrev, vmap

from ferrovae import ops


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


BOOK = normal(7, 3)
INDICES = torch.tensor([2, 0, 2, 6, -1])
COUNTS = torch.tensor([[0.0, 3.0, 1.0, 8.0]]).double().expand(5, 4)
PIXELS = torch.tensor([0, 3, 255, 128]).double().expand(5, 4)
IMAGES = PIXELS[:3, None, :].expand(2, 3, 4, 4) / 127.5 - 1.0
# A scalar of one tensor, and that tensor: B members of a batch.
CASES = {
    "bernoulli_log_prob": (lambda p: ops.bernoulli_log_prob(COUNTS.clamp(max=1), p), normal(3, 5, 4)),
    "continuous_bernoulli_log_prob": (
        lambda p: ops.continuous_bernoulli_log_prob(COUNTS.clamp(max=1), p),
        normal(3, 5, 4),
    ),
    "gaussian_log_prob": (lambda p: ops.gaussian_log_prob(COUNTS, p, 0.3 * p), normal(3, 5, 4)),
    "poisson_log_prob": (lambda p: ops.poisson_log_prob(COUNTS, p), normal(3, 5, 4)),
    "negative_binomial_log_prob": (lambda p: ops.negative_binomial_log_prob(COUNTS, p, 0.5 * p), normal(3, 5, 4)),
    "categorical_log_prob": (lambda p: ops.categorical_log_prob(PIXELS.long() % 6, p), normal(3, 5, 6, 4)),
    "discretized_logistic_log_prob": (
        lambda p: ops.discretized_logistic_log_prob(PIXELS / 127.5 - 1.0, p, 0.1 * p),
        normal(3, 5, 4),
    ),
    "discretized_logistic_mixture_log_prob": (
        lambda p: ops.discretized_logistic_mixture_log_prob(IMAGES, p[:, 0], p, 0.1 * p, 0.5 * p),
        normal(3, 2, 3, 5, 4, 4),
    ),
    "reparameterize_kl": (
        lambda p: sum(part.sum() for part in ops.reparameterize_kl(p, 0.5 * p, prior_mean=0.1 * p, seed=3)),
        normal(3, 5, 4),
    ),
    "reparameterize_kl_from_moments": (
        lambda p: sum(part.sum() for part in ops.reparameterize_kl_from_moments(p, seed=3)),
        normal(3, 5, 4),
    ),
    "nearest_code": (lambda p: ops.nearest_code(p, BOOK, return_distances=True)[1], normal(3, 5, 3)),
    "residual_nearest_code": (lambda p: ops.residual_nearest_code(BOOK, p)[1].square(), normal(3, 2, 7, 3)),
    "code_logsumexp": (lambda p: ops.code_logsumexp(p, BOOK), normal(3, 5, 3)),
    "code_cross_entropy": (lambda p: ops.code_cross_entropy(p, BOOK, INDICES.clamp(min=0)), normal(3, 5, 3)),
    "expected_code": (lambda p: ops.expected_code(p, BOOK).square(), normal(3, 5, 3)),
    "mean_code_entropy": (lambda p: ops.mean_code_entropy(p, BOOK), normal(3, 5, 3)),
    "code_sums": (lambda p: ops.code_sums(p, INDICES, 7)[0].square(), normal(3, 5, 3)),
    "sign_code_entropy": (lambda p: ops.sign_code_entropy(p)[0], normal(3, 5, 3)),
    "sign_code_mean": (lambda p: ops.sign_code_mean(p).square(), normal(3, 5, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_each_example(name):
    call, batch = CASES[name]

    def scalar(parameter):
        return call(parameter).sum()

    exact = torch.stack([torch.autograd.functional.jacobian(scalar, member) for member in batch])
    assert exact.abs().max() > 0
    torch.testing.assert_close(torch.stack([grad(scalar)(member) for member in batch]), exact)
    torch.testing.assert_close(vmap(grad(scalar))(batch), exact)
    torch.testing.assert_close(jacrev(lambda parameters: vmap(scalar)(parameters).sum())(batch), exact)
    torch.testing.assert_close(jacrev(vmap(scalar))(batch).diagonal(dim1=0, dim2=1).movedim(-1, 0), exact)
