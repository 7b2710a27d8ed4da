"""Two processes over gloo: the batch entropy is that of the rows of both, and so is its gradient."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ferrovae.nn import LFQ, EvoLFQ, ResidualLFQ, ResidualSimVQ
from two_ranks import run_two_ranks

# Options, and how many rows of 12 channels each rank holds.
CASES = {
    "even": ({"codebook_size": 64}, (20, 20)),
    "uneven": ({"codebook_size": 64, "spherical": True}, (27, 13)),
    "masked": ({"codebook_size": 16, "num_codebooks": 2, "diversity_gamma": 3.0}, (20, 20)),
    "one empty": ({"codebook_size": 64}, (30, 0)),
    "many bits": ({"codebook_size": 2**20}, (20, 30)),
}


# What rank 1 does while rank 0 trains, and what the error says on rank 0.
DISAGREEMENTS = {
    "evaluation": "rank 0 waited 1 s in training step 1 for the statistics of rank 1",
    "no backward": "rank 0 waited 1 s in training step 2 for the statistics of rank 1",
    "behind": "rank 1 sent those of its step 2",
    "stage in evaluation": "rank 0 waited 1 s in training step 0 for the statistics of rank 1",
    "evolving in evaluation": "rank 0 waited 1 s in training step 0 for the statistics of rank 1",
}


def layer_of(case):
    torch.manual_seed(3)
    return LFQ(dim=12, **CASES[case][0])


def batches(case):
    """Rows and mask of both ranks."""
    generator = torch.Generator().manual_seed(11)
    counts = CASES[case][1]
    rows = [torch.randn(1, count, 12, generator=generator) + rank for rank, count in enumerate(counts)]
    if case != "masked":
        return rows, [None, None]
    return rows, [
        torch.rand(1, count, generator=generator) > share for count, share in zip(counts, (0.2, 0.7), strict=True)
    ]


def step(layer, x, mask):
    """The batch entropy and its gradients."""
    layer.zero_grad()
    _, breakdown = layer(x, 2.0, return_loss_breakdown=True, mask=mask)
    breakdown.batch_entropy.backward()
    return breakdown, [layer.project_in.weight.grad, layer.project_in.bias.grad]


STACKS = {
    "signs": (ResidualLFQ, {"dim": 12, "num_quantizers": 4, "codebook_size": 64, "quantize_dropout": True}),
    "codes": (ResidualSimVQ, {"dim": 12, "num_quantizers": 4, "codebook_size": 8, "quantize_dropout": True}),
}


def trained_stack(name, rank):
    """The state after some steps, and how many stages each step kept."""
    kind, options = STACKS[name]
    torch.manual_seed(7)
    layer = DistributedDataParallel(kind(**options))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    torch.manual_seed(rank)  # the ranks draw apart, and must agree on the stages all the same
    kept = []
    for _ in range(6):
        x = torch.randn(2, 15 + 3 * rank, 12)
        quantized, indices, losses = layer(x)
        optimizer.zero_grad()
        ((quantized - x).square().mean() + losses.sum()).backward()
        optimizer.step()
        kept.append(int((indices[0, 0] >= 0).sum()))
    return layer.module.state_dict(), kept


def disagree(kind, rank):
    """The message of the error of this rank, and how long it took to come."""
    torch.manual_seed(1)
    x = torch.randn(1, 20, 4, requires_grad=True)
    layer = LFQ(codebook_size=16, sync_timeout=1)
    if kind == "stage in evaluation":
        layer = ResidualLFQ(dim=4, codebook_size=16, num_quantizers=2, sync_timeout=1)
    elif kind == "evolving in evaluation":
        layer = EvoLFQ(nn.Identity(), nn.Identity(), codebook_size=16, sync_timeout=1)
    else:
        layer(x)
    started = time.monotonic()
    try:
        if kind == "behind":
            layer._sum_over_ranks._step += rank
            layer(x)
        elif kind == "no backward":
            loss = layer(x).entropy_aux_loss
            if rank == 0:
                loss.backward()
        else:
            layer.train(rank == 0)(x)
    except RuntimeError as error:
        return str(error), time.monotonic() - started
    return "", time.monotonic() - started


def run(rank, folder, compiled):
    torch.set_num_threads(1)
    cases = ["uneven", "masked"] if compiled else CASES
    layers = {case: layer_of(case) for case in cases}  # made before the process group: it is asked at call time
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {}
        for case, layer in layers.items():
            rows, masks = batches(case)
            called = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
            breakdown, gradients = step(called, rows[rank], masks[rank])
            for gradient in gradients:  # as DistributedDataParallel does
                dist.all_reduce(gradient)
                gradient /= 2
            results[case] = tuple(breakdown), gradients
        if not compiled:
            results["stacks"] = {name: trained_stack(name, rank) for name in STACKS}
        if not compiled:
            for kind in DISAGREEMENTS:
                dist.destroy_process_group()
                dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=2)
                results[kind] = disagree(kind, rank)
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def results_of(folder, compiled):
    run_two_ranks(run, str(folder), compiled)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("ranks"), False)


def assert_one_batch(results, case):
    rows, masks = batches(case)
    mask = None if masks[0] is None else torch.cat(masks, 1)
    breakdown, gradients = step(layer_of(case), torch.cat(rows, 1), mask)
    for rank, result in enumerate(results):
        terms, rank_gradients = result[case]
        torch.testing.assert_close(terms[1], breakdown.batch_entropy.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank_gradients, gradients, rtol=1e-4, atol=1e-6)
        # The per-sample entropy is that of the rank's own rows.
        alone, _ = step(layer_of(case), rows[rank], masks[rank])
        torch.testing.assert_close(terms[0], alone.per_sample_entropy.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_batch(results, case):
    assert_one_batch(results, case)


@pytest.mark.parametrize("name", STACKS)
def test_stacks_drop_the_same_stages_and_stay_equal(results, name):
    (state, kept), (other, other_kept) = (result["stacks"][name] for result in results)
    assert kept == other_kept
    assert len(set(kept)) > 1
    for key, tensor in state.items():
        assert torch.equal(tensor, other[key]), key
        assert tensor.isfinite().all()


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_ranks_that_disagree_are_named_in_time(results, kind):
    message, seconds = results[0][kind]
    assert message.startswith("LFQ(dim=4, codebook_size=16): ")
    assert DISAGREEMENTS[kind] in message
    assert seconds < 10


@pytest.mark.slow
def test_compiled_ranks_too(tmp_path):
    results = results_of(tmp_path, True)
    for case in ("uneven", "masked"):
        assert_one_batch(results, case)
