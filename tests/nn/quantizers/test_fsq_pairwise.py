"""Parity of `FSQ` with vector-quantize-pytorch 1.32 over pairs of options, training and evaluation.

Every case trains both layers for some steps and then evaluates them: outputs, indices, gradients, state, codes of
indices, methods and attributes, with checkpoints handed over both ways. Both draw the same noise, with the probability
asked for. Rows lie so that rounding decides no index. Where the library raises it is asked in another way:
- vectors (B, dim) with channels last, as a sequence;
- codes of indices by a layer that is not float32, as a float32 layer.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from ferrovae.nn import FSQ
from ferrovae.nn.quantizers import fsq
from nn.quantizers.fsq_cases import CASES, OTHERS, name_of, options_of
from nn.quantizers.pairwise_draws import shared_draws
from nn.quantizers.pairwise_parity import assert_results, backward, close, dtype_of, loaded, step_down

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
module = pytest.importorskip("vector_quantize_pytorch.finite_scalar_quantization")

pytestmark = pytest.mark.filterwarnings("ignore:FSQ. orthogonal_rotation mixes channels")

BATCH, GRIDS = 3, {"sequence": (12,), "image": (3, 4), "video": (2, 2, 3), "rows": ()}
# How far from where it would become another code a number stays, in steps between codes.
MARGIN = {"float32": 1e-3, "float64": 1e-4, "bfloat16": 0.1, "autocast": 0.1}
ATTRIBUTES = ("_levels", "_basis", "codebook_dim", "effective_codebook_dim", "num_codebooks", "dim", "channel_first")
ATTRIBUTES += ("keep_num_codebooks_dim", "has_projections", "return_indices", "allowed_dtypes", "scale")
ATTRIBUTES += ("noise_dropout", "force_quantization_f32", "bound_hard_clamp", "preserve_symmetry")
ATTRIBUTES += ("orthogonal_rotation",)


@pytest.fixture
def draws(monkeypatch):
    return shared_draws(monkeypatch, module, fsq)


def pair(case):
    dtype = dtype_of(case)
    torch.manual_seed(5)
    peer = upstream.FSQ(**options_of(case)).to(dtype)
    return peer, loaded(FSQ(**options_of(case)).to(dtype), peer)


def clear_tokens(case, peer, number):
    """Tokens (B N, dim) of which a rounding decides no code."""
    generator = torch.Generator().manual_seed(100 + number)
    rows = BATCH * 12
    tokens = torch.randn(400 * rows, peer.dim, generator=generator)
    exact, levels = copy.deepcopy(peer).double(), peer._levels
    with torch.no_grad():
        z = exact.project_in(tokens.double()).unflatten(-1, (peer.num_codebooks, -1))
        z = z @ exact.orthogonal_rot if peer.orthogonal_rotation else z
        half, offset = (levels - 1) * 1.001 / 2, 0.5 * (levels % 2 == 0)
        clamp = peer.bound_hard_clamp
        if peer.preserve_symmetry:
            bounded = z.clamp(-1, 1) if clamp else z.tanh()
            place = (levels - 1) * (bounded + 1) / 2 + 0.5
        else:
            shift = offset / half
            bounded = (z + shift).clamp(-1, 1) if clamp else (z + shift.atanh()).tanh()
            place = bounded * half - offset + 0.5
    tight = ((place - place.round()).abs() < MARGIN[case["dtype"]]).flatten(1).any(-1)
    kept = tokens[~tight][:rows]
    assert len(kept) == rows
    return kept.to(dtype_of(case))


def laid_out(case, tokens):
    """(B N, dim) as the case has it: (B, N, dim), or (B, dim, ...)."""
    x = tokens.view(-1, *GRIDS[case["layout"]], tokens.shape[-1])
    return x.movedim(-1, 1) if case["layout"] in ("image", "video") or case["channels"] == "first" else x


def as_sequence(case, layer):
    """Whether the library raises at this layout."""
    return type(layer) is upstream.FSQ and case["layout"] == "rows" and case["channels"] != "first"


def run(case, layer, tokens, draws, seed):
    """Results and gradients of one step."""
    layer.zero_grad()
    draws.restart(seed)
    tokens = tokens.clone().requires_grad_(case["input"] == "learnt")
    z = laid_out(case, tokens)
    with torch.autocast("cpu", torch.bfloat16) if case["dtype"] == "autocast" else nullcontext():
        quantized, indices = (layer(z[None]) if as_sequence(case, layer) else layer(z))[:2]
    if as_sequence(case, layer):
        quantized, indices = quantized[0], None if indices is None else indices[0]
    assert quantized.shape == z.shape
    backward(quantized)
    results = {"quantized": quantized, "indices": indices, "gradient of x": tokens.grad}
    return results | {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case, draws):
    check(case, draws)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case, draws):
    check(case, draws)


def check(case, draws):
    rough = case["dtype"] in ("bfloat16", "autocast")
    peer, layer = pair(case)
    for step in range(3):
        training = step < 2
        peer.train(training)
        layer.train(training)
        tokens = clear_tokens(case, peer, step)
        found = run(case, layer, tokens, draws, step)
        assert_results(found, run(case, peer, tokens, draws, step), f"step {step}", rough)
        if training:
            step_down(layer, 1e-2)
            peer.load_state_dict(layer.state_dict(), strict=True)
    assert_attributes(layer, peer, rough)
    decoded = assert_decoding(case, layer, peer, found["indices"])
    if found["indices"] is not None:
        close(decoded, found["quantized"], "what the indices decode to", rough)


def assert_attributes(layer, peer, rough):
    for name in ATTRIBUTES:
        one, two = getattr(layer, name), getattr(peer, name)
        assert torch.equal(one, two) if isinstance(two, torch.Tensor) else one == two, name
    if peer.return_indices:
        assert layer.codebook_size == peer.codebook_size
        close(layer.implicit_codebook, peer.implicit_codebook, "implicit codebook", rough)
    z = torch.randn(30, layer.codebook_dim)
    with torch.no_grad():
        codes = layer.quantize(z)
        close(codes, peer.quantize(z), "quantize")
        close(layer.bound(z, 1e-2, True), peer.bound(z, 1e-2, True), "bound")
        close(layer.symmetry_preserving_bound(z), peer.symmetry_preserving_bound(z), "symmetry-preserving bound")
    indices = layer.codes_to_indices(codes)
    assert torch.equal(indices, peer.codes_to_indices(codes))
    assert indices.dtype == peer.codes_to_indices(codes).dtype
    for given in (indices, indices.long()):
        one, two = layer.indices_to_level_indices(given), peer.indices_to_level_indices(given)
        assert torch.equal(one, two)
        assert one.dtype == two.dtype


def assert_decoding(case, layer, peer, indices):
    """Codes of the indices, or of some drawn ones where a layer gives none."""
    if indices is None:
        kept = (layer.num_codebooks,) if layer.keep_num_codebooks_dim else ()
        shape = (*laid_out(case, torch.zeros(BATCH * 12, 1)).squeeze().shape, *kept)
        indices = torch.randint(layer.codebook_size, shape)
    single = copy.deepcopy(peer).float()
    with torch.no_grad():
        found = layer.indices_to_codes(indices)
        due = single.indices_to_codes(indices[None])[0] if as_sequence(case, peer) else single.indices_to_codes(indices)
        assert found.shape == due.shape
        # Numbers of levels are float32 until a projection makes them another dtype.
        assert found.dtype == getattr(layer.project_out, "weight", due).dtype
        close(found, due, "codes of indices", rough=case["dtype"] == "bfloat16")
        assert torch.equal(layer.indices_to_codes(indices.long()), found)
    return found
