"""Parity of `RandomProjectionQuantizer` with vector-quantize-pytorch 1.32 over pairs of options.

Every case compares `ferrovae.compat`'s layer, and with one codebook, where the two are the same, that of `ferrovae.nn`:
indices, the loss of given indices, its gradients, and state, over some steps of training and in evaluation, with
checkpoints handed over both ways. Rows are far enough from where two codes are as near, so that rounding, which in
bfloat16 is the library's of the cosines, decides no index.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from ferrovae import nn
from ferrovae.compat.vector_quantize_pytorch._names import resolve
from ferrovae.nn.quantizers.keyed_sampling import head_keys, key_of, stratified_rows
from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at
from nn.quantizers.pairwise_parity import close, step_down

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

DIM = 9
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "size": {"8": {"codebook_size": 8}, "2": {"codebook_size": 2}, "30": {"codebook_size": 30}},
    "channels": {"6": {"codebook_dim": 6}, "9": {"codebook_dim": 9}, "12": {"codebook_dim": 12}},
    "books": {"one": {}, "three": {"num_codebooks": 3}},
    "norm": {"yes": {}, "no": {"norm": False}},
    # Of the `VectorQuantize` inside, which is in evaluation mode.
    "start": {"given": {}, "k-means": {"kmeans_init": True, "kmeans_iters": 3}},
    "moves": {"slow": {}, "fast": {"decay": 0.5, "eps": 1e-3}, "by hand": {"manual_ema_update": True}},
    "ema": {"yes": {}, "no": {"ema_update": False}, "frozen": {"freeze_codebook": True}},
    "dead": {"stay": {}, "replaced": {"threshold_ema_dead_code": 3}},
    "loss": {
        "commitment": {},
        "none": {"commitment_weight": 0.0},
        "cross-entropy": {"commitment_use_cross_entropy_loss": True},
        "diversity": {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 2.0},
        "orthogonal": {"orthogonal_reg_weight": 0.5, "orthogonal_reg_max_codes": 5},
    },
    "draws": {
        "nearest": {},
        "stochastic": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.5},
        "soft": {"straight_through": True, "rotation_trick": False},
    },
    "gradient": {"default": {}, "straight": {"rotation_trick": False}, "none": {"route_gradients_to_input": False}},
    "projection": {"as it is": {}, "normalized": {"layernorm_after_project_in": True}},
    "padding": {"zeros": {}, "as it came": {"return_zeros_for_masked_padding": False}},
    "sync": {"default": {}, "no": {"sync_codebook": False, "sync_kmeans": False}},
}
CALLS = {
    "layout": ("sequences", "one token", "one sequence"),
    "dtype": ("float32", "float64", "bfloat16"),
    "targets": ("all", "some", "own"),
    "input": ("learnt", "fixed"),
}
DIFFERENT: dict[str, list[Case]] = {
    "k-means in bfloat16: upstream normalizes rows in bfloat16, ours in float32; `test_k_means_of_bfloat16`": [
        {"start": "k-means", "dtype": "bfloat16"},
    ],
}
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
CASES, OTHERS = in_two_companies(LEVELS, chain(*DIFFERENT.values()))
name_of = naming(LEVELS)


def make(kind, case):
    torch.manual_seed(5)
    return kind(dim=DIM, **options_at(case, OPTIONS)).to(getattr(torch, case["dtype"]))


def first_means(samples, size):
    """The rows (H, N, D) that k-means starts from, as ours chooses them."""
    valid = torch.ones(samples.shape[1], dtype=torch.bool)
    keys = head_keys(key_of(torch.ones(len(samples), size)), len(samples))
    chosen = [stratified_rows(valid, size, key, offset=0, total=len(valid), distinct=False)[0] for key in keys]
    return torch.stack([part[rows] for part, rows in zip(samples, chosen, strict=True)])


@torch.no_grad()
def batch(case, peer, number):
    """x (B, N, DIM) without the rows of which a rounding could decide a code."""
    generator = torch.Generator().manual_seed(100 + number)
    shape = {"sequences": (5, 30), "one token": (150, 1), "one sequence": (1, 150)}[case["layout"]]
    x = torch.randn(150, DIM, generator=generator).to(getattr(torch, case["dtype"]))
    if peer.vq._codebook.initted:
        rows = torch.einsum("nd,hde->nhe", peer.norm(x), peer.rand_projs).flatten(1)
        rows = peer.vq.project_in(rows).unflatten(-1, (peer.num_codebooks, -1)).double().transpose(0, 1)
        codes = normalize(peer.vq._codebook.embed.double(), dim=-1)
        near = (normalize(rows, dim=-1) @ codes.mT).topk(2).values
        margin = 0.03 if case["dtype"] == "bfloat16" else 1e-3
        bad = (near[..., 0] - near[..., 1] < margin).any(0)
        x = torch.where(bad[:, None], x[~bad][0], x)
    return x.view(*shape, DIM)


def scored(layer, x, targets, learnt):
    """The loss of given indices, and its gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_(learnt)
    loss = layer(x, indices=targets)
    if loss.requires_grad:
        loss.backward()
    return loss, {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def check_step(case, layers, peer, number):
    rough, x = case["dtype"] == "bfloat16", batch(case, peer, number)
    due = peer(x)
    targets = due.clone()
    if case["targets"] != "own":
        least = 0 if case["targets"] == "all" else -1
        generator = torch.Generator().manual_seed(number)
        targets = torch.randint(least, peer.vq.codebook_size, due.shape, generator=generator)
    their_loss, their_gradients = scored(peer, x, targets, case["input"] == "learnt")
    for layer in layers:
        found = layer(x)
        assert (found.dtype, found.shape) == (due.dtype, due.shape)
        assert torch.equal(found, due), f"step {number}: {int((found != due).sum())} indices differ"
        loss, gradients = scored(layer, x, targets, case["input"] == "learnt")
        assert loss.shape == their_loss.shape
        close(loss, their_loss, f"step {number}: loss", rough)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            if isinstance(layer, nn.RandomProjectionQuantizer) and name != "x":
                assert gradient is None  # it is frozen
            else:
                close(gradient, their_gradients[name], f"step {number}: gradient of {name}", rough)
        state = layer.state_dict()
        assert state.keys() == peer.state_dict().keys()
        for name, tensor in peer.state_dict().items():
            close(state[name], tensor, f"step {number}: state {name}", rough)


def check(case):
    peer = make(upstream.RandomProjectionQuantizer, case)
    kinds = [resolve("RandomProjectionQuantizer")]
    if case["books"] == "one":
        kinds.append(nn.RandomProjectionQuantizer)
    layers = [make(kind, case) for kind in kinds]
    with torch.no_grad():
        if case["start"] == "given":
            book = peer.vq._codebook
            book.embed.copy_(normalize(torch.randn(book.embed.shape), dim=-1))
            book.embed_avg.copy_(book.embed)
        peer.vq._codebook.sample_fn = first_means
        for layer in layers:
            for tensor in layer.state_dict().values():  # what is loaded is seen to be
                if tensor.is_floating_point():
                    tensor.fill_(1.0)
            layer.load_state_dict(peer.state_dict(), strict=True)
    for step in range(3):
        check_step(case, layers, peer, step)
        step_down(layers[0], 1e-2)
        for layer in (peer, *layers[1:]):
            layer.load_state_dict(layers[0].state_dict(), strict=True)
    for layer in (peer, *layers):
        layer.eval()
    check_step(case, layers, peer, 3)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case):
    check(case)


def test_k_means_of_bfloat16():
    """Of the same rows its clusters are those of float32."""
    rows, layers = torch.randn(2, 60, 6).bfloat16(), []
    for dtype in (torch.bfloat16, torch.float32):
        layer = nn.RandomProjectionQuantizer(dim=DIM, codebook_size=8, codebook_dim=6, kmeans_init=True).to(dtype)
        layer.vq(rows.to(dtype))
        layers.append(layer)
    codes, due = (layer.vq.codebook.float() for layer in layers)
    torch.testing.assert_close(codes, due, rtol=0, atol=4e-3)
