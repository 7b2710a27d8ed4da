"""`EvoLFQ` against vector-quantize-pytorch's, where it is installed (`pip install 'ferrovae[bench]'`).

Where the two differ, and why ours is right:
- the best gene: upstream takes it from the next population at the place it had in this one.
- genes of projected or rotated codes: upstream takes the signs after `project_out`, which are not the code's.
- genes of images and of channel-first sequences: upstream encodes them channels first and decodes them channels last.
- vectors (B, dim) with `channel_first=True`: upstream looks for the channels on the wrong axis and raises.
- modes: upstream leaves every submodule in the mode of the whole.
- `step` refuses unknown keywords, which upstream ignores.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ferrovae.nn import EvoLFQ

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

OPTIONS = [
    {"dim": 6},
    {"codebook_size": 64, "spherical": True, "mutation_rate": 0.3},
    {"dim": 6, "codebook_size": 8, "num_codebooks": 2, "elitism_count": 3},
    {"dim": 6, "keep_num_codebooks_dim": True, "tournament_size": 4, "elitism_count": 0},
]


def pair(options):
    models = []
    for kind in (upstream.EvoLFQ, EvoLFQ):
        torch.manual_seed(5)
        models.append(kind(nn.Linear(7, 6), nn.Linear(6, 7), pop_size=10, **options))
    return models


def both(models, call):
    """The results of a call on either model, each after the same seed."""
    results = []
    for model in models:
        torch.manual_seed(3)
        results.append(call(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    return results[1]


def fitness(decoded, genes):
    return decoded.flatten(1).square().mean(-1) - genes.flatten(1).mean(-1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7)])
def test_forward_encode_and_decode(options, shape):
    models = pair(options)
    x = torch.randn(shape)
    for model in models:
        model.eval()
    both(models, lambda model: tuple(model(x)))
    for signs in (True, False):
        genes = both(models, lambda model, signs=signs: model.encode(x, return_signs=signs))
        both(models, lambda model, genes=genes: model.decode_bits(genes))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("gene", [(6,), (3, 6)])
def test_populations(options, signs, gene):
    models = pair(options)
    genes = both(models, lambda model: model.init_random_population(shape=gene, is_sign=signs))
    for rows in (4, 15):
        x = torch.randn(rows, *gene[:-1], 7)
        both(models, lambda model, x=x: model.init_population_from_data(x, is_sign=signs))
    both(models, lambda model: model.mutate(genes, is_sign=signs))
    both(models, lambda model: model.uniform_crossover(genes, genes.flip(0)))
    values = torch.randn(10)
    for size in (None, 3):
        both(models, lambda model, size=size: model.tournament_selection(genes, values, size))
    both(models, lambda model: model.step(genes, fitness, is_sign=signs, batch_size=4))
    both(models, lambda model: model.step(genes, fitness, 3, 0.5, 2, signs))


@pytest.mark.parametrize("options", OPTIONS)
def test_evolution(options):
    models = pair(options)
    evolved = both(
        models,
        lambda model: [
            (population, value)
            for population, _, value, _ in model.evolve(fitness, shape=(3, 6), generations=6, is_sign=True)
        ],
    )
    assert len(evolved) == 6


def test_upstream_returns_another_gene_than_the_best():
    wrong = []
    for model in pair({"dim": 6}):
        torch.manual_seed(1)
        results = list(model.evolve(fitness, shape=(6,), generations=5))
        values = [fitness(model.decode_bits(best[None]), best[None]).item() - value for _, best, value, _ in results]
        wrong.append(max(map(abs, values)) > 1e-5)
    assert wrong == [True, False]


def test_checkpoints_load_both_ways():
    for options in OPTIONS:
        theirs, ours = pair(options)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(theirs.state_dict(), strict=True)
