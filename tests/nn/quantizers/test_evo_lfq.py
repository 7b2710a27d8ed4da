"""`EvoLFQ`: genes that decode to what evaluation gives, a search that finds the best, and what it complains about."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from ferrovae.nn import LFQ, EvoLFQ


def model_of(encoder=None, **options):
    torch.manual_seed(0)
    return EvoLFQ(encoder or nn.Linear(7, 6), nn.Linear(6, 7) if encoder is None else nn.Identity(), **options)


def fitness(decoded, genes):
    """Of a gene alone; the best is all ones."""
    return (genes * torch.arange(1.0, genes.shape[-1] + 1)).flatten(1).sum(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 6},
        {"dim": 6, "codebook_size": 16},
        {"dim": 6, "codebook_size": 8, "num_codebooks": 2},
        {"dim": 6, "codebook_size": 16, "num_codebooks": 3, "spherical": True, "orthogonal_rotation": True},
    ],
)
@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 7)])
@pytest.mark.parametrize("signs", [True, False])
def test_decoding_the_genes_of_data_is_reconstructing_them(options, shape, signs):
    """Also with projections and rotations, whose output has other signs than the code."""
    model = model_of(**options)
    x = torch.randn(shape)
    genes = model.encode(x, return_signs=signs)
    assert genes.shape == (*shape[:-1], model.lfq.codebook_dim * model.lfq.num_codebooks)
    assert set(genes.unique().tolist()) == ({-1.0, 1.0} if signs else {0.0, 1.0})
    torch.testing.assert_close(model.decode_bits(genes), model.eval()(x).reconstructed)


def test_images():
    model = model_of(nn.Conv2d(3, 6, 1), dim=6, codebook_size=16)
    x = torch.randn(2, 3, 4, 5)
    genes = model.encode(x)
    assert genes.shape == (2, 4, 4, 5)
    torch.testing.assert_close(model.decode_bits(genes), model.eval()(x).reconstructed)
    population = model.init_population_from_data(x, 5, mutation_rate=0.0)
    assert torch.equal(population, genes[[0, 1, 0, 1, 0]])


def test_every_module_is_left_in_its_mode():
    model = model_of(dim=6).train()
    model.encoder.eval()
    genes = model.encode(torch.randn(2, 7))
    model.decode_bits(genes)
    assert (model.training, model.encoder.training, model.lfq.training) == (True, False, True)


def test_gradients_flow_in_training():
    model = model_of(dim=6)
    x = torch.randn(5, 7)
    reconstructed, indices, loss = model(x, inv_temperature=1.0)
    assert (reconstructed.shape, indices.shape) == ((5, 7), (5,))
    (reconstructed.square().sum() + loss).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("signs", [True, False])
def test_the_best_gene_is_the_one_with_the_best_fitness(batch_size, signs):
    model = model_of(dim=6, pop_size=16, elitism_count=2, mutation_rate=0.1)
    best = float("-inf")
    for population, gene, value, decoded in model.evolve(
        fitness, shape=(6,), generations=15, is_sign=signs, return_best_decoded=True, batch_size=batch_size
    ):
        assert population.shape == (16, 6)
        assert fitness(None, gene[None]).item() == value >= best
        torch.testing.assert_close(decoded, model.decode_bits(gene[None])[0])
        # An elite is never lost.
        assert fitness(None, population).max() >= value
        best = value
    assert best == 21.0


def test_nothing_mutates_or_everything():
    model = model_of(dim=6)
    genes = model.init_random_population(9, (2, 6))
    assert torch.equal(model.mutate(genes, 0.0), genes)
    assert torch.equal(model.mutate(genes, 1.0), 1 - genes)
    signs = model.init_random_population(9, (2, 6), is_sign=True)
    assert torch.equal(model.mutate(signs, 1.0, is_sign=True), -signs)
    assert torch.equal(model.uniform_crossover(genes, genes), genes)


def test_draws_do_not_depend_on_how_genes_lie_in_memory():
    model = model_of(dim=6)
    genes = model.init_random_population(9, (2, 6))
    turned = genes.mT.contiguous().mT
    for breed in (lambda genes: model.mutate(genes, 0.5), lambda genes: model.uniform_crossover(genes, 1 - genes)):
        results = []
        for laid_out in (genes, turned):
            torch.manual_seed(3)
            results.append(breed(laid_out))
        assert torch.equal(*results)


def test_a_tournament_of_many_has_one_winner():
    model = model_of(dim=6)
    genes = model.init_random_population(5, (6,))
    values = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
    winners = model.tournament_selection(genes, values, tournament_size=200)
    assert torch.equal(winners, genes[1].expand(5, 6))


def test_no_fitness_is_a_number():
    model = model_of(dim=6, pop_size=4)
    for result in model.evolve(lambda *_: [float("nan")] * 4, shape=(6,), generations=1, return_best_decoded=True):
        assert result.best_gene is None
        assert result.best_decoded is None


def test_complaints():
    with pytest.raises(ValueError, match="EvoLFQ: none of lfq, dim and codebook_size is given"):
        model_of()
    with pytest.raises(ValueError, match="EvoLFQ: elitism_count is 4, expected 0 to 3"):
        model_of(dim=6, pop_size=4, elitism_count=4)
    with pytest.raises(ValueError, match=r"EvoLFQ: mutation_rate is 1.5"):
        model_of(dim=6, mutation_rate=1.5)
    model = model_of(lfq=LFQ(dim=6), pop_size=4)
    with pytest.raises(ValueError, match="EvoLFQ: shape is None"):
        model.init_random_population()
    with pytest.raises(ValueError, match="EvoLFQ: neither pop_bits nor shape is given"):
        next(model.evolve(fitness))
    with pytest.raises(ValueError, match=re.escape("EvoLFQ: bits are (4, 5), expected (P, ..., 6)")):
        model.decode_bits(torch.ones(4, 5))
    with pytest.raises(ValueError, match=re.escape("EvoLFQ: fitness_fn gave (3,), expected (4,)")):
        model.step(torch.ones(4, 6), lambda *_: [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=re.escape("EvoLFQ: x is (0, 7), expected at least one example")):
        model.init_population_from_data(torch.ones(0, 7))
