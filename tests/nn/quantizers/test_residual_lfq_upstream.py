"""`ResidualLFQ`, `GroupedResidualLFQ`, `ResidualSimVQ` against vector-quantize-pytorch's, where it is installed.

`pip install 'ferrovae[bench]'`. How many stages quantizer dropout keeps is injected: the peer's draw for the seed.

Where the two differ, and why ours is right (beside what test_lfq_upstream.py and test_sim_vq_upstream.py list):
- codes of spherical or rotated stages: the peer decodes them neither normalised nor rotated.
- a codebook size that is no power of 2: the peer takes the next smaller one silently.
- images with projections: the peer projects a spatial axis and raises.
- quantizer dropout of images or with `keep_num_codebooks_dim`: the peer raises, for its null
  indices have another shape.
- `ResidualSimVQ.codebook_dim`: the peer raises AttributeError.
"""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import nn

from ferrovae.nn import GroupedResidualLFQ, ResidualLFQ, ResidualSimVQ
from ferrovae.nn.quantizers import quantizer_dropout
from nn.quantizers.scalar_upstream import assert_parity, assert_same, twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
from vector_quantize_pytorch import lookup_free_quantization as module

FOUR = {"num_quantizers": 4, "codebook_size": 32}
DROPS = {"quantize_dropout": True}


@pytest.fixture(autouse=True)
def _like_the_peer(monkeypatch):
    """The peer's entropies without their floor, our dropout with the peer's draw."""
    monkeypatch.setattr(module, "log", lambda t: t.clamp(min=torch.finfo(t.dtype).tiny).log())

    def draw(low, high, *, seed, batch, device):
        return torch.tensor(random.Random(int(seed)).randrange(low, high))

    monkeypatch.setattr(quantizer_dropout, "draw_last_stage", draw)
    monkeypatch.setattr(
        quantizer_dropout.QuantizerDropout,
        "dropout_seed",
        lambda self, device: torch.randint(10_000, (), device=device),
    )


LFQ_CASES = [
    ({"dim": 5} | FOUR, (3, 10, 5)),
    ({"dim": 12} | FOUR, (3, 10, 12)),
    ({"dim": 12, "soft_clamp_input_value": 2.0, "commitment_loss_weight": 0.5} | FOUR, (3, 10, 12)),
    ({"dim": 5, "spherical": True, "entropy_loss_weight": 0.3} | FOUR, (3, 10, 5)),
    ({"dim": 12, "spherical": True, "orthogonal_rotation": True} | FOUR, (3, 10, 12)),
    ({"dim": 5, "orthogonal_rotation": True, "diversity_gamma": 2.0} | FOUR, (3, 10, 5)),
    ({"dim": 5, "keep_num_codebooks_dim": True, "straight_through_activation": nn.Tanh()} | FOUR, (3, 10, 5)),
    ({"dim": 12, "experimental_softplus_entropy_loss": True, "frac_per_sample_entropy": 0.5} | FOUR, (3, 10, 12)),
    ({"dim": 5, "soft_clamp_input_value": 1.0, "force_quantization_f32": False} | FOUR, (2, 5, 3, 4)),
    ({"dim": 5, "channel_first": True} | FOUR, (2, 5, 7)),
    ({"dim": 12} | DROPS | FOUR, (3, 10, 12)),
    ({"dim": 12, "quantize_dropout_cutoff_index": 2, "commitment_loss_weight": 1.0} | DROPS | FOUR, (3, 10, 12)),
    ({"dim": 5, "quantize_dropout_multiple_of": 2} | DROPS | FOUR, (3, 10, 5)),
    ({"dim": 5, "num_quantizers": 1, "codebook_size": 32} | DROPS, (3, 10, 5)),
]
SIM_VQ = {"num_quantizers": 3, "codebook_size": 24}
SIM_VQ_CASES = [
    ({"dim": 8} | SIM_VQ, (3, 20, 8)),
    ({"dim": 8, "rotation_trick": False, "commitment_weight": 0.5} | SIM_VQ, (3, 20, 8)),
    ({"dim": 8, "frozen_codebook_dim": 5, "init_fn": lambda e: 2 * e} | SIM_VQ, (3, 20, 8)),
    ({"dim": 8, "channel_first": True} | SIM_VQ, (2, 8, 3, 4)),
    ({"dim": 8, "channel_first": True, "rotation_trick": False} | DROPS | SIM_VQ, (2, 8, 3, 4)),
    ({"dim": 8, "input_to_quantize_commit_loss_weight": 0.9} | DROPS | SIM_VQ, (3, 20, 8)),
    ({"dim": 8, "quantize_dropout_multiple_of": 2, "quantize_dropout_cutoff_index": 1} | DROPS | SIM_VQ, (3, 20, 8)),
    ({"dim": 8, "num_quantizers": 1, "codebook_size": 24} | DROPS, (2, 3, 4, 8)),
]
GROUPED_CASES = [
    ({"dim": 10, "groups": 2} | FOUR, (3, 10, 10)),
    ({"dim": 24, "groups": 2, "commitment_loss_weight": 0.5} | DROPS | FOUR, (3, 10, 24)),
    ({"dim": 12, "groups": 3, "soft_clamp_input_value": 1.5, "spherical": True} | FOUR, (3, 10, 12)),
    ({"dim": 10, "groups": 2, "accept_image_fmap": True} | FOUR, (2, 10, 3, 4)),
    ({"dim": 6, "groups": 1} | FOUR, (3, 10, 6)),
]
CASES = [
    *((upstream.ResidualLFQ, ResidualLFQ, *case) for case in LFQ_CASES),
    *((upstream.ResidualSimVQ, ResidualSimVQ, *case) for case in SIM_VQ_CASES),
    *((upstream.GroupedResidualLFQ, GroupedResidualLFQ, *case) for case in GROUPED_CASES),
]


@pytest.mark.parametrize(("theirs", "kind", "options", "shape"), CASES)
def test_results_gradients_and_decoding(theirs, kind, options, shape):
    peer, layer = twins(theirs, kind, options)
    x = 0.7 * torch.randn(shape)
    seeds = range(3) if "quantize_dropout" in options else [3]
    decodes_alike = not (options.get("spherical") or options.get("orthogonal_rotation"))
    for seed in seeds:
        *_, indices, _ = assert_parity(peer, layer, x, seed=seed)
        if decodes_alike:
            assert_parity(peer, layer, x, seed=seed, return_all_codes=True)
        if "groups" not in options and "quantize_dropout" in options:
            assert_parity(peer, layer, x, rand_quantize_dropout_fixed_seed=seed)
    if decodes_alike:
        assert_same(layer.get_codes_from_indices(indices), peer.get_codes_from_indices(indices))
        if len(shape) == 3 or "groups" not in options:
            assert_same(layer.get_output_from_indices(indices), peer.get_output_from_indices(indices))
    torch.testing.assert_close(layer.codebooks, peer.codebooks, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("theirs", "kind", "options", "shape"), CASES)
def test_steps_of_training(theirs, kind, options, shape):
    pair = twins(theirs, kind, options)
    for layer in pair:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD([*layer.parameters(), nn.Parameter(torch.zeros(()))], 1e-3)
        for step in range(3):
            x = 0.7 * torch.randn(shape, generator=torch.Generator().manual_seed(step))
            quantized, _, losses = layer(x)
            total = (quantized - x).square().mean() + losses.sum()
            optimizer.zero_grad()
            if total.requires_grad:
                total.backward()
            optimizer.step()
    assert_same(dict(pair[1].state_dict()), dict(pair[0].state_dict()), rtol=1e-4, atol=1e-5)


def test_coarse_indices():
    for theirs, kind, options in (
        (upstream.ResidualLFQ, ResidualLFQ, {"dim": 12} | DROPS | FOUR),
        (upstream.ResidualSimVQ, ResidualSimVQ, {"dim": 8} | DROPS | SIM_VQ),
    ):
        peer, layer = twins(theirs, kind, options)
        indices = torch.randint(-1, 24, (3, 10, 2))
        assert_same(layer.get_codes_from_indices(indices), peer.get_codes_from_indices(indices))
        assert_same(layer.get_output_from_indices(indices), peer.get_output_from_indices(indices))


@pytest.mark.parametrize("option", ["spherical", "orthogonal_rotation"])
def test_the_peer_decodes_another_vector_than_it_gave(option):
    for layer, right in zip(
        twins(upstream.ResidualLFQ, ResidualLFQ, {"dim": 5, option: True} | FOUR), (False, True), strict=True
    ):
        quantized, indices, _ = layer.eval()(torch.randn(2, 9, 5))
        assert torch.allclose(layer.get_output_from_indices(indices), quantized, atol=1e-5) == right


def test_a_codebook_size_that_is_no_power_of_two():
    options = {"dim": 12, "num_quantizers": 2, "codebook_size": 24}
    assert upstream.ResidualLFQ(**options).codebooks.shape == (2, 16, 4)
    with pytest.raises(ValueError, match="ResidualLFQ: codebook_size is 24, expected a power of 2, such as 32"):
        ResidualLFQ(**options)


@pytest.mark.parametrize(("options", "shape"), [({"keep_num_codebooks_dim": True}, (3, 10, 5)), ({}, (2, 5, 3, 4))])
def test_the_peer_cannot_stack_what_it_dropped(options, shape):
    peer, layer = twins(upstream.ResidualLFQ, ResidualLFQ, {"dim": 5} | DROPS | FOUR | options)
    x = torch.randn(shape)
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        peer(x, rand_quantize_dropout_fixed_seed=1)
    quantized, indices, losses = layer(x, rand_quantize_dropout_fixed_seed=1)
    kept = int((losses != 0).sum())
    assert 1 <= kept < 4
    assert (indices[..., kept:] == -1).all()
    assert (indices[..., :kept] >= 0).all()
    assert quantized.shape == x.shape


def test_the_dimensions_of_a_code():
    peer, layer = twins(upstream.ResidualSimVQ, ResidualSimVQ, {"dim": 8} | SIM_VQ)
    assert layer.codebook_size == peer.codebook_size
    assert layer.codebook_dim == layer.codebooks.shape[-1]
    with pytest.raises(AttributeError, match="codebook_dim"):
        peer.codebook_dim  # noqa: B018


def test_the_peer_projects_a_spatial_axis_of_images():
    peer, layer = twins(
        upstream.GroupedResidualLFQ, GroupedResidualLFQ, {"dim": 24, "groups": 2, "accept_image_fmap": True} | FOUR
    )
    x = torch.randn(2, 24, 3, 4)
    with pytest.raises(RuntimeError, match=re.escape("mat1 and mat2 shapes cannot be multiplied")):
        peer(x)
    quantized, indices, losses, codes = layer(x, return_all_codes=True)
    assert (quantized.shape, indices.shape) == (x.shape, (2, 2, 3, 4, 4))
    assert losses.shape == (2, 4)
    assert [group.shape for group in codes] == [(4, 2, 3, 4, 5)] * 2
    flat = layer.rvqs[0](x[:, :12].flatten(2).mT)
    torch.testing.assert_close(quantized[:, :12].flatten(2).mT, flat[0])
    torch.testing.assert_close(layer.get_output_from_indices(indices), layer.eval()(x)[0])
