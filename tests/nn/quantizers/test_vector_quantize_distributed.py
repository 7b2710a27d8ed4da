"""Two processes over gloo: one codebook, the same bits on both, and what one process would have made of all rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ferrovae.nn import VectorQuantize

DIM, SIZE, STEPS = 4, 8, 4
CASES = {
    "plain": ({}, "even"),
    "dead codes": ({"threshold_ema_dead_code": 3}, "even"),
    "k-means": ({"kmeans_init": True, "kmeans_iters": 5}, "uneven"),
    "uneven": ({"use_cosine_sim": True}, "uneven"),
    "one empty": ({"threshold_ema_dead_code": 1, "kmeans_init": True}, "one empty"),
}


def layer_of(case):
    torch.manual_seed(3)
    return VectorQuantize(DIM, SIZE, **CASES[case][0])


def batches(case):
    """The rows of both ranks at each step."""
    generator = torch.Generator().manual_seed(11)
    sizes = {"even": (30, 30), "uneven": (41, 19), "one empty": (30, 0)}[CASES[case][1]]
    return [tuple(3 * torch.randn(size, DIM, generator=generator) for size in sizes) for _ in range(STEPS)]


def run(rank, folder):
    torch.set_num_threads(1)
    layers = {case: layer_of(case) for case in CASES}  # made before the process group: it is asked at call time
    for layer in layers.values():
        assert layer.codebook.shape == (SIZE, DIM)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for case, layer in layers.items():
            for batch in batches(case):
                layer(batch[rank])
        torch.save({case: layer.state_dict() for case, layer in layers.items()}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_hold_the_same_bits(states, case):
    start = layer_of(case).state_dict()
    for name, tensor in states[0][case].items():
        assert torch.equal(tensor, states[1][case][name]), name
        assert tensor.isfinite().all()
    assert not torch.equal(states[0][case]["_codebook.embed"], start["_codebook.embed"])


@pytest.mark.parametrize("case", [case for case in CASES if case != "one empty"])
def test_the_ranks_together_do_what_one_process_does(states, case):
    layer = layer_of(case)
    for batch in batches(case):
        layer(torch.cat(batch))
    torch.testing.assert_close(states[0][case], dict(layer.state_dict()), rtol=1e-4, atol=1e-5, check_device=False)
