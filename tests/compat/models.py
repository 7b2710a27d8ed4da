"""Small models of other libraries with random weights, and what tests ask of two that should agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def encodec(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 64, "num_lstm_layers": 1}
    config = transformers.EncodecConfig(**{**settings, "target_bandwidths": [1.0, 4.0], **options})
    model = transformers.EncodecModel(config).eval()
    for stage, layer in enumerate(model.quantizer.layers):
        layer.codebook.embed.normal_(std=0.5 / (stage + 1))
    return model


def dac(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = {"encoder_hidden_size": 4, "hidden_size": 64, "decoder_hidden_size": 32, "n_codebooks": 4}
    config = transformers.DacConfig(**{**settings, "codebook_size": 128, **options})
    model = transformers.DacModel(config).eval()
    for quantizer in model.quantizer.quantizers:
        torch.nn.init.normal_(quantizer.codebook.weight)
    return model


def mimi(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = {"num_filters": 4, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 8}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vector_quantization_hidden_dimension": 16}
    settings |= {"codebook_dim": 16, "codebook_size": 64, "num_quantizers": 6, "upsample_groups": 32}
    model = transformers.MimiModel(transformers.MimiConfig(**{**settings, **options})).eval()
    quantizer = model.quantizer
    stacks = (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)
    for layer in (layer for stack in stacks for layer in stack.layers):
        layer.codebook.embed_sum.normal_(std=0.1)
        layer.codebook.cluster_usage.uniform_(0.5, 2.0)
    return model


def vq_model(**options: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    settings = {"block_out_channels": (8,), "norm_num_groups": 4, "num_vq_embeddings": 64, "vq_embed_dim": 4}
    return diffusers.VQModel(**{**settings, **options}).eval()


def check_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> int:
    """The parameters' gradients agree; how many have one."""
    pairs = list(zip(ours.named_parameters(), theirs.parameters(), strict=True))
    for (name, p), q in pairs:
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    return sum(p.grad is not None for (_, p), _ in pairs)


def check_codes(ours: Tensor, theirs: Tensor, x: Tensor, codebook: Tensor, *, cosine: bool = False) -> int:
    """Indices [N] of rows [N, D] are equal, or float32 cannot tell the two codes apart; how many differ."""
    x, codebook = x.double(), codebook.double()
    if cosine:
        x, codebook = (torch.nn.functional.normalize(t, dim=-1) for t in (x, codebook))
    best, other = ((x - codebook[i]).square().sum(-1) for i in (ours, theirs))
    assert (best <= other).all()
    scale = (x.norm(dim=-1) + codebook.norm(dim=-1).max()).square()
    differ = ours != theirs
    assert (other - best)[differ].le(4 * x.shape[-1] * 2**-24 * scale[differ]).all()
    return int(differ.sum())


def check_stack(ours: Tensor, theirs: Tensor, x: Tensor, codebooks: list[Tensor]) -> int:
    """Indices [Q, N] of rows [N, D] agree up to where float32 cannot tell two codes apart; how many rows part there.

    Behind that stage a row is another one, and its codes are not compared.
    """
    parted = 0
    for stage, codebook in enumerate(codebooks):
        parted += check_codes(ours[stage], theirs[stage], x, codebook)
        x = x - codebook[ours[stage]]
        together = ours[stage] == theirs[stage]
        x, ours, theirs = x[together], ours[:, together], theirs[:, together]
    return parted
