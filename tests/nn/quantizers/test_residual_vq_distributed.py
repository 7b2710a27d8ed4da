"""Two processes over gloo: a residual stack sends one all-reduce a step, and both hold the same bits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ferrovae.nn import GroupedResidualVQ, HierarchicalVQ, ResidualVQ
from two_ranks import run_two_ranks

DIM, SIZE, STAGES = 4, 8, 3
CASES = {
    "plain, 100 steps": ({}, (12, 12), 100),
    "dead codes": ({"threshold_ema_dead_code": 3}, (30, 30), 4),
    "usage ratio, shared": ({"threshold_usage_ratio": 0.3, "shared_codebook": True}, (30, 30), 4),
    "k-means": ({"kmeans_init": True, "kmeans_iters": 3}, (41, 19), 3),
    "uneven, cosine": ({"use_cosine_sim": True}, (41, 19), 4),
    "one empty": ({}, (30, 0), 3),
    "dropout": ({"quantize_dropout": True}, (20, 20), 12),
    "dropout for each sample": ({"quantize_dropout": True, "quantize_dropout_per_sample": True}, (20, 12), 6),
    "beam": ({"beam_size": 2}, (20, 20), 3),
    "groups": ({"groups": 2}, (20, 20), 4),
    "levels": ({"scales": (2, 4), "shared_codebook": False, "kmeans_init": False}, (8, 8), 4),
}
ALONE = ("plain, 100 steps", "uneven, cosine", "groups", "one empty", "beam", "k-means")


def layer_of(case):
    torch.manual_seed(3)
    options = {"dim": DIM, "codebook_size": SIZE, **CASES[case][0]}
    if case == "levels":
        return HierarchicalVQ(**options)
    kind = GroupedResidualVQ if case == "groups" else ResidualVQ
    return kind(num_quantizers=STAGES, **options)


def batches(case):
    """The rows of both ranks at each step."""
    generator = torch.Generator().manual_seed(11)
    _, sizes, steps = CASES[case]
    shape = (DIM, 4) if case == "levels" else (3, DIM)
    return [tuple(2 * torch.randn(size, *shape, generator=generator) for size in sizes) for _ in range(steps)]


def run(rank, folder):
    torch.set_num_threads(1)
    layers = {case: layer_of(case) for case in CASES}  # made before the process group: it is asked at call time
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results, reduce, calls = {}, dist.all_reduce, [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counted
    try:
        for case, layer in layers.items():
            torch.manual_seed(rank)  # the ranks' own generators differ
            reductions, kept = [], []
            for batch in batches(case):
                before = calls[0]
                indices = layer(batch[rank])[1]
                reductions.append(calls[0] - before)
                kept.append(0 if case == "levels" or not indices.numel() else int((indices[0, 0] >= 0).sum()))
            results[case] = {"state": dict(layer.state_dict()), "reductions": reductions, "kept": kept}
        torch.save(results, Path(folder) / f"{rank}.pt")
        lonely = ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=SIZE, sync_timeout=1.0).train(rank == 0)
        complaint = ""
        try:
            lonely(torch.randn(5, DIM))
        except RuntimeError as error:
            complaint = str(error)
        (Path(folder) / f"{rank}.txt").write_text(complaint)
        # Neither leaves while the other still waits.
        for _ in range(100):
            if (Path(folder) / "0.txt").exists():
                break
            time.sleep(0.1)
    finally:
        dist.all_reduce = reduce
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks(run, str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_hold_the_same_bits(ranks, case):
    start = layer_of(case).state_dict()
    one, two = (rank[case]["state"] for rank in ranks)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
        assert tensor.isfinite().all()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in one.items())


@pytest.mark.parametrize("case", CASES)
def test_one_reduction_for_a_step(ranks, case):
    for rank in ranks:
        later = rank[case]["reductions"][1 if case == "k-means" else 0 :]
        assert later == [1] * len(later)


def test_the_ranks_keep_equally_many_stages(ranks):
    kept = [rank["dropout"]["kept"] for rank in ranks]
    assert kept[0] == kept[1]
    assert len(set(kept[0])) > 1


@pytest.mark.parametrize("case", ALONE)
def test_the_ranks_together_do_what_one_process_does(ranks, case):
    layer = layer_of(case)
    for batch in batches(case):
        layer(torch.cat(batch))
    torch.testing.assert_close(ranks[0][case]["state"], dict(layer.state_dict()), rtol=1e-3, atol=1e-4)


def test_a_rank_in_evaluation_mode_is_named(folder):
    complaint = (folder / "0.txt").read_text()
    assert "ResidualVQ(dim=4, num_quantizers=2)" in complaint
    assert "rank 1" in complaint
    assert (folder / "1.txt").read_text() == ""
