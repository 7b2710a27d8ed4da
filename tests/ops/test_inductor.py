"""One Inductor compile of all operations together, forward and backward, against eager."""

from __future__ import annotations

import shutil

import pytest
import torch

from ferrovae import ops
from gpu.examples import examples, public

SEED = torch.tensor([3])


def together(
    mean: torch.Tensor, decoder: torch.Tensor, codebook: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nonsense with every operation in it; mean [6, 4], decoder [4, 48], codebook [16, 4], x [6, 48] of 0 and 1."""
    z, kl = ops.reparameterize_kl(mean, -mean, seed=SEED)
    w, elements = ops.reparameterize_kl_from_moments(torch.cat([mean, z], 1), seed=SEED, kl_reduction="element")
    indices, distances = ops.nearest_code(w, codebook, return_distances=True)
    stages, quantized = ops.residual_nearest_code(z, torch.stack([codebook, codebook / 2]))
    sampled = ops.sample_code(z, codebook, seed=SEED)
    sums, counts = ops.code_sums(z, indices, 16)
    logits = z @ decoder
    pixels, planes = x.reshape(6, 3, 4, 4) / 127.5 - 1, logits.reshape(6, 3, 4, 4)
    mixed = planes.unsqueeze(2)
    grey = x / 2
    total = (
        ops.bernoulli_log_prob(x, logits)
        + ops.continuous_bernoulli_log_prob(grey, logits)
        + ops.categorical_log_prob(x[:, :24], logits.reshape(6, 2, 24))
        + ops.gaussian_log_prob(grey, logits, logits / 4)
        + ops.poisson_log_prob(x, logits)
        + ops.negative_binomial_log_prob(x, logits, -logits)
        + ops.discretized_logistic_log_prob(pixels, planes, planes / 4)
        + ops.discretized_logistic_mixture_log_prob(pixels, mixed[:, 0], mixed, mixed / 4, -mixed)
        + ops.code_logsumexp(z, codebook)
        + ops.code_cross_entropy(z, codebook, indices)
        + ops.expected_code(z, codebook).sum(1)
        + ops.mean_code_entropy(z, codebook)
        + (quantized - distances.unsqueeze(1)).sum(1)
        - kl
        - elements.sum(1)
    )
    per_sample, batch = ops.sign_code_entropy(z / 100)
    extra = per_sample - batch + ops.sign_code_mean(z / 100).square().sum() + sums.square().sum() + counts.sum()
    return total.sum() + extra, torch.cat([indices, stages.flatten(), sampled])


@pytest.mark.slow
def test_all_operations_in_one_compiled_graph() -> None:
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    inputs = [torch.randn(shape) for shape in ((6, 4), (4, 48), (16, 4))]
    x = torch.randint(2, (6, 48))
    results = []
    for function in (together, torch.compile(together, fullgraph=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        value, indices = function(*leaves, x)
        value.backward()
        results.append((value.detach(), indices, *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)


def test_no_operation_is_forgotten() -> None:
    source = together.__code__.co_names
    assert public() <= set(source)
    assert public() == set(examples())
