"""Where `ResidualLFQ`, `GroupedResidualLFQ` and `ResidualSimVQ` differ from vector-quantize-pytorch's.

`pip install 'ferrovae[bench]'`. What they have in common: test_residual_lfq_pairwise.py,
test_residual_sim_vq_pairwise.py. Where they differ, and why ours is right (beside what test_lfq_upstream.py and
test_sim_vq_upstream.py list):
- codes of spherical or rotated stages: the peer decodes them neither normalised nor rotated.
- a codebook size that is no power of 2: the peer takes the next smaller one silently.
- images with projections: the peer projects a spatial axis and raises.
- quantizer dropout of images or with `keep_num_codebooks_dim`: the peer raises, for its null
  indices have another shape.
- `ResidualSimVQ.codebook_dim`: the peer raises AttributeError.
"""

from __future__ import annotations

import re

import pytest
import torch

from ferrovae.nn import GroupedResidualLFQ, ResidualLFQ, ResidualSimVQ
from nn.quantizers.scalar_upstream import assert_same, twins

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

FOUR = {"num_quantizers": 4, "codebook_size": 32}
DROPS = {"quantize_dropout": True}


SIM_VQ = {"num_quantizers": 3, "codebook_size": 24}


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
