"""Two processes over gloo, each with a generator of its own: what the ranks must agree on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ferrovae.nn import GroupedResidualFSQ, LatentQuantize, ResidualFSQ
from two_ranks import run_two_ranks

STEPS = 12
DROPS = {"levels": [5, 4, 3], "num_quantizers": 8, "quantize_dropout": True}
SGD = partial(torch.optim.SGD, lr=0.5)


def layers_of_seed(seed):
    torch.manual_seed(seed)
    return {
        "residual": ResidualFSQ(dim=6, **DROPS),
        "grouped": GroupedResidualFSQ(dim=8, groups=2, **DROPS),
        "latent": LatentQuantize([5, 4], 2, in_place_codebook_optimizer=SGD),
    }


def batches():
    """The rows of both ranks at each step; as many on one rank as on the other, or not."""
    generator = torch.Generator().manual_seed(11)
    return [tuple(torch.randn(size, 2, 7, generator=generator) for size in (9, 5)) for _ in range(STEPS)]


def run(rank, folder):
    torch.set_num_threads(1)
    layers = layers_of_seed(3)  # made before the process group: it is asked at call time
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(100 + rank)
    kept = {"residual": [], "grouped": []}
    try:
        for batch in batches():
            for name, dim in (("residual", 6), ("grouped", 8)):
                quantized, indices = layers[name](torch.randn(2, 5, dim))
                kept[name].append((indices >= 0).sum(-1).unique().tolist())
                quantized.square().mean().backward()
                for parameter in layers[name].parameters():
                    dist.all_reduce(parameter.grad)
                    parameter.data -= 0.1 * parameter.grad
                    parameter.grad = None
            layers["latent"](batch[rank])
        torch.save((kept, layers["latent"].state_dict()), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks(run, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_the_ranks_keep_equally_many_stages(ranks, name):
    kept = ranks[0][0][name]
    assert kept == ranks[1][0][name]
    assert all(len(step) == 1 for step in kept)
    assert len({step[0] for step in kept}) > 2


def test_the_values_are_the_same_bits_and_those_of_one_process(ranks):
    latent = layers_of_seed(3)["latent"]
    for batch in batches():
        latent(torch.cat(batch))
    start = layers_of_seed(3)["latent"].state_dict()
    for name, tensor in ranks[0][1].items():
        assert torch.equal(tensor, ranks[1][1][name])
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(tensor, latent.state_dict()[name], rtol=1e-5, atol=1e-6)
