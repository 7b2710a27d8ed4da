"""One Inductor compile of all operations together, forward and backward, against eager."""

from __future__ import annotations

import shutil

import pytest
import torch

from ferrovae import ops


def together(
    mean: torch.Tensor, logvar: torch.Tensor, decoder: torch.Tensor, x: torch.Tensor, codebook: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """An ELBO and the codes of z: [B], [B]."""
    z, kl = ops.reparameterize_kl(mean, logvar, seed=torch.tensor([3]))
    indices, distances = ops.nearest_code(z, codebook, return_distances=True)
    return ops.bernoulli_log_prob(x, z @ decoder) - kl - distances, indices


@pytest.mark.slow
def test_all_operations_in_one_compiled_graph() -> None:
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    mean, logvar, decoder, codebook = (torch.randn(shape) for shape in ((6, 4), (6, 4), (4, 50), (16, 4)))
    x = torch.rand(6, 50).round()
    results = []
    for function in (together, torch.compile(together, fullgraph=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in (mean, logvar, decoder, codebook)]
        elbo, indices = function(*leaves[:3], x, leaves[3])
        elbo.sum().backward()
        results.append((elbo.detach(), indices, *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
