"""What both this library and vector-quantize-pytorch 1.32 refuse: here with a `ValueError` or `TypeError`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ferrovae import nn

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

LFQ = {"dim": 8, "num_quantizers": 2, "codebook_size": 16}
SIM = {"dim": 8, "num_quantizers": 2, "codebook_size": 16}
HIERARCHY = {"dim": 4, "codebook_size": 8, "scales": (1, 2, 4)}
RANDOM = {"dim": 8, "codebook_size": 16, "codebook_dim": 4}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("ResidualLFQ", LFQ | {"has_projections": True}),
    ("ResidualLFQ", LFQ | {"num_codebooks": 2}),
    ("ResidualLFQ", LFQ | {"codebook_scale": 2.0}),
    ("ResidualLFQ", LFQ | {"soft_clamp_input_value": 0.5}),
    ("ResidualLFQ", LFQ | {"frac_per_sample_entropy": 0.0}),
    ("ResidualLFQ", LFQ | {"frac_per_sample_entropy": 1.5}),
    ("ResidualLFQ", LFQ | {"quantize_dropout": True, "quantize_dropout_cutoff_index": -1}),
    ("GroupedResidualLFQ", LFQ | {"groups": 3}),
    ("ResidualSimVQ", SIM | {"heads": 2}),
    ("ResidualSimVQ", SIM | {"quantize_dropout_cutoff_index": -1}),
    ("HierarchicalVQ", HIERARCHY | {"accept_image_fmap": True, "accept_3d_fmap": True}),
    ("HierarchicalVQ", HIERARCHY | {"scales": ()}),
    ("HierarchicalVQ", HIERARCHY | {"scales": (2, 1)}),
    ("HierarchicalVQ", HIERARCHY | {"scales": (0, 1)}),
    ("HierarchicalVQ", HIERARCHY | {"scales": ((1, 1), (2, 2))}),
    ("HierarchicalVQ", HIERARCHY | {"scales": ((1, 2), (2, 1)), "accept_image_fmap": True}),
    ("HierarchicalVQ", HIERARCHY | {"codebook_size": (8, 8), "shared_codebook": False}),
    ("HierarchicalVQ", HIERARCHY | {"codebook_size": (8, 8, 4)}),
    ("HierarchicalVQ", HIERARCHY | {"nested_dropout": 1.5}),
    ("HierarchicalVQ", HIERARCHY | {"nested_dropout_min_levels": 0}),
    ("RandomProjectionQuantizer", RANDOM | {"heads": 2}),
    ("RandomProjectionQuantizer", RANDOM | {"learnable_codebook": True}),
    ("RandomProjectionQuantizer", RANDOM | {"affine_param": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_options(kind, options):
    with pytest.raises((AssertionError, TypeError)):
        getattr(upstream, kind)(**options)
    with pytest.raises((ValueError, TypeError), match=r"\w+"):
        getattr(nn, kind)(**options)


X = torch.randn(2, 4, 8)
CALLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ResidualLFQ", LFQ, {"x": X[..., :7]}),
    ("ResidualSimVQ", SIM, {"x": X[..., :7]}),
    ("ResidualSimVQ", SIM | {"channel_first": True}, {"x": X}),
    ("GroupedResidualLFQ", LFQ | {"groups": 2}, {"x": X[..., :6]}),
    ("HierarchicalVQ", HIERARCHY, {"x": X, "indices": (torch.zeros(2, 1).long(),)}),
    ("HierarchicalVQ", HIERARCHY, {"x": X, "lens": torch.tensor([3, 4]), "mask": torch.ones(2, 8).bool()}),
    ("HierarchicalVQ", HIERARCHY, {"x": X, "mask": torch.ones(2, 4).bool()}),
    ("HierarchicalVQ", HIERARCHY, {"x": X.mT}),
    ("HierarchicalVQ", HIERARCHY, {"x": X[..., None]}),
    (
        "HierarchicalVQ",
        HIERARCHY | {"accept_image_fmap": True},
        {"x": X.unflatten(2, (2, 4)), "lens": torch.tensor([3, 4])},
    ),
    ("RandomProjectionQuantizer", RANDOM, {"x": X[..., :7]}),
    ("BinaryMapper", {"bits": 3}, {"logits": X}),
]


@pytest.mark.parametrize(("kind", "options", "call"), CALLS, ids=[f"{kind} {n}" for n, (kind, *_) in enumerate(CALLS)])
def test_calls(kind, options, call):
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        getattr(upstream, kind)(**options)(**call)
    with pytest.raises((ValueError, TypeError), match=f"^{kind}"):
        getattr(nn, kind)(**options)(**call)


@pytest.mark.parametrize("call", [{}, {"indices": torch.tensor([1]), "one_hot": torch.eye(8)[:1]}])
def test_log_probabilities_of_either(call):
    for package, error in ((upstream, AssertionError), (nn, ValueError)):
        with pytest.raises(error):
            package.BinaryMapper(3).log_prob(torch.zeros(1, 3), **call)


@pytest.mark.parametrize("kind", ["ResidualLFQ", "ResidualSimVQ"])
def test_fewer_stages_without_dropout(kind):
    for package, error in ((upstream, AssertionError), (nn, ValueError)):
        layer = getattr(package, kind)(**SIM)
        with pytest.raises(error):
            layer.get_codes_from_indices(torch.zeros(2, 4, 1, dtype=torch.int64))


def test_genes():
    coders = torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)
    for package, error in ((upstream, AssertionError), (nn, ValueError)):
        with pytest.raises(error):
            package.EvoLFQ(*coders)
        with pytest.raises(error):
            package.EvoLFQ(*coders, dim=6, pop_size=4, elitism_count=4)
        with pytest.raises(error):
            next(package.EvoLFQ(*coders, dim=6).evolve(lambda decoded, genes: genes.sum(1)))


@pytest.mark.parametrize("count", [0, 2])
def test_chains_of_one_quantizer(count):
    for package, error in ((upstream, AssertionError), (nn, ValueError)):
        with pytest.raises(error, match="exactly one"):
            package.Sequential(torch.nn.Identity(), *(package.FSQ([5, 5]) for _ in range(count)))
