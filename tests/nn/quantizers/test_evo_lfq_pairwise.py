"""Parity of `EvoLFQ` with vector-quantize-pytorch 1.32 over pairs of options.

Every case trains both models for some steps, evaluates them, and breeds with them: outputs, indices, losses, gradients,
genes and what they decode to, populations, fitnesses and the best, with checkpoints handed over both ways and the
same draws. Where the library's value is wrong the right one comes from its parts:
- what `test_lfq_pairwise` lists, of its quantizer;
- genes: it takes signs after projections and rotations; they are the bits of its indices;
- genes with channels first: it decodes them as if channels were last;
- the best gene: it takes it from the next population, at the place that it had in this one.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from ferrovae import nn
from nn.quantizers import lfq_cases
from nn.quantizers.lfq_draws import DrawnRows
from nn.quantizers.pairwise import in_two_companies, naming, options_at
from nn.quantizers.pairwise_parity import close, rounds_alike, step_down

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
module = pytest.importorskip("vector_quantize_pytorch.lookup_free_quantization")

WIDTH = 7
GRIDS = {"sequence": (6,), "image": (3, 2), "video": (2, 1, 3), "rows": ()}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "population": {"64": {}, "10": {"pop_size": 10}, "3": {"pop_size": 3}},
    "mutation": {
        "rare": {},
        "none": {"mutation_rate": 0.0},
        "some": {"mutation_rate": 0.3},
        "all": {"mutation_rate": 1.0},
    },
    "tournament": {"two": {}, "one": {"tournament_size": 1}, "four": {"tournament_size": 4}},
    "elite": {"one": {}, "none": {"elitism_count": 0}, "two": {"elitism_count": 2}},
    "generations": {"50": {}, "4": {"generations": 4}},
}
CALLS = {
    "lfq": ("made", "given"),
    "layout": (
        "rows",
        "sequence",
        "image",
        "video",
        "sequence, channels last",
        "image, channels last",
        "sequence, channels first",
        "rows, channels first",
    ),
    **{name: lfq_cases.CALLS[name] for name in ("mask", "dtype", "temperature", "input")},
    "signs": ("no", "yes"),
    "fitness": ("tensor", "numbers"),
    "arguments": ("of the model", "of the call"),
    "decoded": ("at once", "in parts"),
    "start": ("shape", "genes", "data"),
    "best": ("gene", "gene and data"),
}
LEVELS = {
    **{name: tuple(levels) for name, levels in chain(OPTIONS.items(), lfq_cases.OPTIONS.items())},
    **CALLS,
}
CASES, OTHERS = in_two_companies(LEVELS, lfq_cases.EXCLUDED)
name_of = naming(LEVELS)


@pytest.fixture
def draws(monkeypatch):
    return DrawnRows(monkeypatch, module)


def channels_first(case):
    return case["layout"] in ("image", "video") or case["layout"].endswith("first")


def make(case, kind, quantizer):
    options, of_lfq = options_at(case, OPTIONS), lfq_cases.options_of(case)
    torch.manual_seed(5)
    lfq = quantizer(**of_lfq)
    grid = GRIDS[case["layout"].split(",")[0]]
    maps = channels_first(case) and len(grid) > 0
    layer = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(grid) if maps else 0]
    coders = [layer(*sizes, *([1] if maps else [])) for sizes in ((WIDTH, lfq.dim), (lfq.dim, WIDTH))]
    model = kind(*coders, lfq, **options) if case["lfq"] == "given" else kind(*coders, **options, **of_lfq)
    rounds_alike(model.lfq.project_in)
    return model.to(getattr(torch, case["dtype"]))


class Peer:
    """The library's model, put together from its parts where it puts them together wrongly."""

    def __init__(self, case):
        self.case, self.model = case, make(case, upstream.EvoLFQ, upstream.LFQ)
        self.grid = GRIDS[case["layout"].split(",")[0]]
        self.model.encode, self.library_encodes = self.encode, self.model.encode
        self.model.decode_bits, self.library_decodes = self.decode_bits, self.model.decode_bits
        plain = not self.model.lfq.has_projections and case["rotation"] == "no"
        self.encodes = plain and not channels_first(case) and case["layout"] != "image, channels last"
        self.decodes = not channels_first(case)

    def __call__(self, x, shown, call):
        model = self.model
        if self.case["layout"] in ("image, channels last", "rows, channels first"):  # it raises
            quantized, indices, loss = self._in_a_sequence(model.encoder(x), call)
            result = model.decoder(quantized), indices, loss
        else:
            result = model(x, **call)
            assert result._fields == ("reconstructed", "indices", "entropy_aux_loss")
        if shown is not None and model.training:
            latents = model.encoder(x)
            rows = (latents.movedim(1, -1) if channels_first(self.case) else latents).flatten(0, -2)[shown][None]
            result = *result[:2], model.lfq(rows.mT if model.lfq.channel_first else rows, **call)[2]
        return result

    def _in_a_sequence(self, latents, call):
        """Vectors (B, ..., dim) quantized, whatever the layer's layout is."""
        lfq, rows = self.model.lfq, latents.reshape(1, -1, latents.shape[-1])
        quantized, indices, loss = lfq(rows.mT if lfq.channel_first else rows, **call)
        quantized = (quantized.mT if lfq.channel_first else quantized).view_as(latents)
        return quantized, indices[0].unflatten(0, latents.shape[:-1]), loss

    @torch.no_grad()
    def encode(self, x, return_signs=False):
        training = self.model.training
        _, indices, _ = self(x, None, {}) if not training else self._evaluated(x)
        indices = indices if self.model.lfq.keep_num_codebooks_dim else indices[..., None]
        bits = ((indices[..., None] & self.model.lfq.mask) != 0).flatten(-2)
        bits = bits.movedim(-1, 1).contiguous() if channels_first(self.case) else bits
        genes = torch.where(bits, 1.0, -1.0) if return_signs else bits.float()
        if self.encodes:
            assert torch.equal(self.library_encodes(x, return_signs), genes)
        return genes

    def _evaluated(self, x):
        self.model.eval()
        result = self(x, None, {})
        self.model.train()
        return result

    @torch.no_grad()
    def decode_bits(self, bits):
        if self.decodes:
            return self.library_decodes(bits)
        decoder, self.model.decoder = self.model.decoder, torch.nn.Identity()
        codes = self.library_decodes(bits.movedim(1, -1))
        self.model.decoder = decoder
        return decoder(codes.movedim(-1, 1))


class Ours:
    def __init__(self, case):
        self.case, self.model = case, make(case, nn.EvoLFQ, nn.LFQ)

    def __call__(self, x, shown, call):
        grid = GRIDS[self.case["layout"].split(",")[0]]
        if shown is not None:
            shape = grid if self.case["mask"] == "as the indices" or not grid else [6]
            shown = shown.view(-1, *shape)
        return self.model(x, **call, mask=shown)


def data(case, rows, number):
    """x, laid out."""
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(rows, *GRIDS[case["layout"].split(",")[0]], WIDTH, generator=generator)
    return (x.movedim(-1, 1) if channels_first(case) else x).to(getattr(torch, case["dtype"]))


def run(asked, x, shown, call, case):
    """Results and gradients of one step."""
    asked.model.zero_grad()
    x = x.clone().requires_grad_(case["input"] == "learnt")
    temperature = call.get("inv_temperature")
    if isinstance(temperature, torch.Tensor):
        temperature.grad = None
    out, indices, loss = asked(x, shown, call)
    total = (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + 3 * loss
    total.backward()
    gradients = {"x": x.grad, **{name: p.grad for name, p in asked.model.named_parameters()}}
    if isinstance(temperature, torch.Tensor):
        gradients["inv_temperature"] = temperature.grad
    return (out, indices, loss), gradients


def check_step(case, ours, peer, number, draws):
    rough = case["dtype"] == "bfloat16"
    draws.drawn.clear()
    grid = GRIDS[case["layout"].split(",")[0]]
    examples = 4 if grid else 24
    x, call, rows = data(case, examples, number), {}, 24
    shown = None
    if case["mask"] != "none":
        shown = torch.rand(rows, generator=torch.Generator().manual_seed(number)) > 0.3
    if case["temperature"] != "default":
        call["inv_temperature"] = torch.tensor(0.7, requires_grad=True) if case["temperature"] == "learnt" else 0.5
    (out, indices, loss), gradients = run(ours, x, shown, call, case)
    due, their_gradients = run(peer, x, shown, call, case)
    assert torch.equal(indices, due[1]), f"step {number}: indices"
    assert (out.dtype, out.shape, indices.dtype) == (due[0].dtype, due[0].shape, due[1].dtype)
    close(out, due[0], f"step {number}: reconstructed", rough)
    close(loss, due[2], f"step {number}: loss", rough)
    assert gradients.keys() == their_gradients.keys()
    for name in gradients:
        close(gradients[name], their_gradients[name], f"step {number}: gradient of {name}", rough)


def both(case, ours, peer, call):
    """The results of a call on either model, each after the same seed; ours."""
    results = []
    for asked in (ours, peer):
        torch.manual_seed(3)
        results.append(call(asked.model))
    one, two = results
    if isinstance(one, torch.Tensor):
        one, two = [one], [two]
    for first, second in zip(one, two, strict=True):
        assert (first.shape, first.dtype) == (second.shape, second.dtype)
        close(first, second, "breeding", case["dtype"] == "bfloat16")
    return results[0]


def check_breeding(case, ours, peer):
    signs, given = case["signs"] == "yes", case["arguments"] == "of the call"
    x = data(case, 5, 50)
    genes = both(case, ours, peer, lambda model: model.encode(x, return_signs=signs))
    both(case, ours, peer, lambda model: model.decode_bits(genes))
    shape = genes.shape[1:]
    made: dict[str, Any] = {"shape": shape, "is_sign": signs}
    from_data: dict[str, Any] = {"is_sign": signs}
    step: dict[str, Any] = {}
    if given:
        made |= {"pop_size": 6, "device": "cpu"}
        from_data |= {"pop_size": 6, "mutation_rate": 0.5}
        step = {"tournament_size": 3, "mutation_rate": 0.25, "elitism_count": 3}
    if case["decoded"] == "in parts":
        step["batch_size"] = 4
    population = both(case, ours, peer, lambda model: model.init_random_population(**made))
    of_data = both(case, ours, peer, lambda model: model.init_population_from_data(x, **from_data))
    rate = {"mutation_rate": 0.4} if given else {}
    both(case, ours, peer, lambda model: model.mutate(population, is_sign=signs, **rate))
    both(case, ours, peer, lambda model: model.uniform_crossover(population, of_data))
    fitnesses = score(population)
    size = {"tournament_size": 3} if given else {}
    both(case, ours, peer, lambda model: model.tournament_selection(population, fitnesses, **size))
    if len(population) > 3 or not given:
        both(case, ours, peer, lambda model: model.step(population, fitness_of(case, []), is_sign=signs, **step))
    start: dict[str, Any] = {"shape": shape} if case["start"] == "shape" else {"pop_bits": population}
    if case["start"] == "data":
        start["pop_bits"] = of_data.contiguous()  # the library draws by how genes lie in memory
    elif given and case["start"] == "shape":
        start["pop_size"] = 8
    check_evolution(case, ours, peer, start, {**step, "is_sign": signs}, {"generations": 3} if given else {})


def score(genes):
    """Of genes alone, so that no rounding decides who wins: no two have the same."""
    genes = genes.flatten(1)
    return (genes * torch.arange(1.0, genes.shape[1] + 1).sin()).sum(1)


def fitness_of(case, seen):
    def fitness(decoded, genes):
        seen.append(decoded)
        return score(genes) if case["fitness"] == "tensor" else score(genes).tolist()

    return fitness


def check_evolution(case, ours, peer, start, step, generations):
    runs, seen = [], ([], [])
    for asked, decoded in zip((ours, peer), seen, strict=True):
        torch.manual_seed(8)
        best = {"return_best_decoded": True} if case["best"] == "gene and data" else {}
        runs.append(list(asked.model.evolve(fitness_of(case, decoded), **start, **step, **best, **generations)))
    assert len(runs[0]) == len(runs[1]) == generations.get("generations", ours.model.generations)
    before = start.get("pop_bits")
    for one, two in zip(*runs, strict=True):
        assert one._fields == two._fields
        assert torch.equal(one.pop_bits, two.pop_bits)
        assert one.best_fitness == two.best_fitness
        assert score(one.best_gene[None]).item() == one.best_fitness
        assert before is None or one.best_fitness >= score(before).max()
        assert (one.best_decoded is None) == (two.best_decoded is None)
        if one.best_decoded is not None:
            due = peer.decode_bits(one.best_gene[None])[0]
            close(one.best_decoded, due, "best decoded", case["dtype"] == "bfloat16")
        before = one.pop_bits
    for one, two in zip(*seen, strict=True):
        close(one, two, "decoded", case["dtype"] == "bfloat16")


def check(case, draws):
    peer, ours = Peer(case), Ours(case)
    ours.model.load_state_dict(peer.model.state_dict(), strict=True)
    draws.follow(peer.model)
    for step in range(2):
        check_step(case, ours, peer, step, draws)
        step_down(ours.model, 1e-3)
        peer.model.load_state_dict(ours.model.state_dict(), strict=True)
    check_breeding(case, ours, peer)
    ours.model.eval()
    peer.model.eval()
    check_step(case, ours, peer, 3, draws)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_case(case, draws):
    check(case, draws)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
def test_another_case(case, draws):
    check(case, draws)
