"""Where `EvoLFQ` differs from vector-quantize-pytorch's (`pip install 'ferrovae[bench]'`), and why ours is right.

What they have in common: test_evo_lfq_pairwise.py.
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


def pair(options):
    models = []
    for kind in (upstream.EvoLFQ, EvoLFQ):
        torch.manual_seed(5)
        models.append(kind(nn.Linear(7, 6), nn.Linear(6, 7), pop_size=10, **options))
    return models


def fitness(decoded, genes):
    return decoded.flatten(1).square().mean(-1) - genes.flatten(1).mean(-1)


def test_upstream_returns_another_gene_than_the_best():
    wrong = []
    for model in pair({"dim": 6}):
        torch.manual_seed(1)
        results = list(model.evolve(fitness, shape=(6,), generations=5))
        values = [fitness(model.decode_bits(best[None]), best[None]).item() - value for _, best, value, _ in results]
        wrong.append(max(map(abs, values)) > 1e-5)
    assert wrong == [True, False]
