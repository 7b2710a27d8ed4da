"""Checkpoints as older versions of vector-quantize-pytorch wrote them: the same layer, or the key that does not load.

The older forms are made here from a state of today; the versions in the names are those that wrote them.
"""

from __future__ import annotations

import re

import pytest
import torch

from ferrovae.nn import FSQ, LFQ, EvoLFQ, GroupedResidualVQ, ResidualLFQ, ResidualVQ, SimVQ, VectorQuantize

DIM, SIZE = 12, 16


def trained(make):
    torch.manual_seed(4)
    layer = make()
    for _ in range(2):
        layer(torch.randn(2, 40, DIM))
    return layer


def older(layer, change):
    """The state after `change(prefix, name, tensor)` -> (name, tensor) or None, of every key `prefix + name`."""
    changed = {}
    for key, tensor in layer.state_dict().items():
        codebook = key.rfind("_codebook.")
        at = key.rfind(".") + 1 if codebook < 0 else codebook
        found = change(key[at:], tensor.clone())
        if found is not None:
            changed[key[:at] + found[0]] = found[1]
    return changed


def one_axis(name, tensor):
    """0.9 to 1.30: flags had one axis, in float32."""
    return name, tensor.float()[None] if tensor.dtype == torch.bool else tensor


def no_heads(name, tensor):
    """0.3.3 to 0.8."""
    name, tensor = one_axis(name, tensor)
    is_code = name.removeprefix("_codebook.") in ("embed", "embed_avg", "cluster_size")
    return name, tensor[0] if is_code else tensor


def no_codebook(name, tensor):
    """0.3.0."""
    name, tensor = no_heads(name, tensor)
    return name.removeprefix("_codebook."), tensor.mT if tensor.ndim == 2 and "embed" in name else tensor


def no_start(name, tensor):
    """0.1 and 0.2."""
    return None if name == "_codebook.initted" else no_codebook(name, tensor)


LAYERS = {
    "layer": lambda: VectorQuantize(DIM, SIZE),
    "square": lambda: VectorQuantize(DIM, DIM),
    "k-means": lambda: VectorQuantize(DIM, SIZE, kmeans_init=True),
    "learnt": lambda: VectorQuantize(DIM, SIZE, learnable_codebook=True, ema_update=False),
    "projected": lambda: VectorQuantize(DIM, SIZE, codebook_dim=5),
    "cosine": lambda: VectorQuantize(DIM, SIZE, use_cosine_sim=True),
    "affine": lambda: VectorQuantize(DIM, SIZE, affine_param=True),
    "stack": lambda: ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=3),
    "shared": lambda: ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=3, shared_codebook=True),
    "groups": lambda: GroupedResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=2, groups=2),
    "separate": lambda: VectorQuantize(DIM, SIZE, heads=2, codebook_dim=6, separate_codebook_per_head=True),
}
FORMS = [(name, form) for name in LAYERS for form in (one_axis, no_heads, no_codebook, no_start)]
FORMS = [(name, form) for name, form in FORMS if name not in ("separate", "affine") or form is one_axis]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_codebook_goes_on_from_an_older_checkpoint(name, form):
    layer = trained(LAYERS[name])
    state = older(layer, form)
    keys = set(state)
    again = LAYERS[name]()
    again.load_state_dict(state, strict=True)
    assert set(state) == keys  # what the user holds stays as it is
    x = torch.randn(2, 40, DIM)
    for mode in (False, True):  # the training step shows that counts and sums came over
        results = [one.train(mode)(x) for one in (layer, again)]
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)
    for key, tensor in layer.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_a_codebook_that_has_not_started_starts_with_the_first_batch():
    layer = trained(LAYERS["k-means"])
    layer.load_state_dict(older(LAYERS["k-means"](), no_heads), strict=True)
    assert (layer.codebook == 0).all()
    layer(torch.randn(2, 40, DIM))
    assert (layer.codebook != 0).any(-1).all()


@pytest.mark.parametrize("strict", [True, False])
def test_cosine_codes_of_any_length_are_refused_by_name(strict):
    """Up to 1.2 directions were compared, and codes of other lengths came out: no codebook of today does that."""
    layer = trained(LAYERS["cosine"])
    state = older(layer, lambda name, tensor: None if name.endswith("embed_avg") else no_heads(name, tensor))
    with pytest.raises(RuntimeError, match=r"_codebook\.embed is without embed_avg, .* expected codes of length 1"):
        LAYERS["cosine"]().load_state_dict(state, strict=strict)


@pytest.mark.parametrize("name", ["layer", "separate", "stack"])
def test_a_key_that_is_not_understood_is_named(name):
    layer = trained(LAYERS[name])
    path = "layers.1." if name == "stack" else ""
    state = {**layer.state_dict(), f"{path}_codebook.code_age": torch.zeros(SIZE)}
    with pytest.raises(RuntimeError, match=re.escape(f'Unexpected key(s) in state_dict: "{path}_codebook.code_age"')):
        LAYERS[name]().load_state_dict(state, strict=True)
    state = {**layer.state_dict(), f"{path}_codebook.embed": torch.zeros(3, DIM)}
    with pytest.raises(RuntimeError, match=re.escape(f"size mismatch for {path}_codebook.embed")):
        LAYERS[name]().load_state_dict(state, strict=True)


def test_half_of_an_older_layer_is_not_taken_for_one():
    state = older(trained(LAYERS["layer"]), no_codebook)
    del state["embed_avg"]
    with pytest.raises(
        RuntimeError, match=r'Unexpected key\(s\) in state_dict: "embed", "cluster_size"|"cluster_size"'
    ):
        LAYERS["layer"]().load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LFQ(dim=DIM, codebook_size=16),
        lambda: ResidualLFQ(dim=DIM, codebook_size=16, num_quantizers=2),
        lambda: EvoLFQ(torch.nn.Identity(), torch.nn.Identity(), dim=DIM, codebook_size=16),
    ],
)
def test_signs_without_the_values_of_the_bits(make):
    """1.9.0."""
    layer, again = make().eval(), make().eval()
    state = older(layer, lambda name, tensor: None if name == "mask" else (name, tensor))
    assert len(state) < len(layer.state_dict())
    again.load_state_dict(state, strict=True)
    x = torch.randn(2, 9, DIM)
    for one, two in zip(layer(x), again(x), strict=True):
        assert torch.equal(one, two)


def fsq_state(layer):
    """1.8 to 1.10."""
    constants = {"_levels": layer._levels, "_basis": layer._basis, "implicit_codebook": layer.implicit_codebook}
    return {**layer.state_dict(), **constants}


def test_levels_with_what_follows_from_them():
    layer, again = (FSQ([5, 4, 3], dim=DIM).eval() for _ in range(2))
    again.load_state_dict(fsq_state(layer), strict=True)
    x = torch.randn(2, 9, DIM)
    for one, two in zip(layer(x), again(x), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("levels", [[5, 3, 4], [5, 4]])
def test_other_levels_are_named(levels):
    state = fsq_state(FSQ(levels))
    with pytest.raises(RuntimeError, match="_levels is not that of the layer's arguments"):
        FSQ([5, 4, 3]).load_state_dict(state, strict=True)


def test_the_codes_and_the_map_of_a_simvq_under_their_first_names():
    """1.20.0."""
    layer, again = SimVQ(dim=DIM, codebook_size=SIZE), SimVQ(dim=DIM, codebook_size=SIZE)
    state = {
        "codebook": layer.state_dict()["frozen_codebook"],
        "codebook_to_codes.weight": layer.state_dict()["code_transform.weight"],
    }
    again.load_state_dict(state, strict=True)
    x = torch.randn(2, 9, DIM)
    for one, two in zip(layer(x), again(x), strict=True):
        assert torch.equal(one, two)
