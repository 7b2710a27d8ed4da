"""Two processes over gloo: a swapped layer shares with the other rank what it shared before, and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ferrovae
from two_ranks import run_two_ranks

upstream = pytest.importorskip("vector_quantize_pytorch")
upstream_module = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")

VQ, RVQ = {"dim": 4, "codebook_size": 8}, {"dim": 4, "codebook_size": 8, "num_quantizers": 2}
HVQ = {"dim": 4, "codebook_size": 8, "scales": (1, 2), "channel_first": False}
# Class, options, whether the ranks hold one codebook after some steps.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "alone": ("VectorQuantize", {**VQ, "sync_codebook": False}, False),
    "together": ("VectorQuantize", VQ, True),
    "together as asked": ("VectorQuantize", {**VQ, "sync_codebook": True}, True),
    "k-means alone": ("VectorQuantize", {**VQ, "kmeans_init": True, "sync_kmeans": False, "decay": 0.9}, False),
    "k-means together": ("VectorQuantize", {**VQ, "kmeans_init": True, "decay": 0.9}, True),
    "stack alone": ("ResidualVQ", {**RVQ, "sync_codebook": False}, False),
    "stack together": ("ResidualVQ", RVQ, True),
    "groups alone": ("GroupedResidualVQ", {**RVQ, "groups": 2, "sync_codebook": False}, False),
    "hierarchy alone": ("HierarchicalVQ", {**HVQ, "sync_codebook": False}, False),
    "hierarchy together": ("HierarchicalVQ", HVQ, True),
}
OLDER = ("older than the group", "swapped before the group")


def made(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(3)
    return getattr(upstream, name)(**options)


def codes_after_steps(layer: nn.Module, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        layer(torch.randn(2, 20, 4, generator=generator) + rank)
    return {key: tensor for key, tensor in layer.state_dict().items() if key.endswith("embed")}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", ferrovae.compat.AccelerateWarning)  # that a layer is left as it is
    older, before = made("VectorQuantize", VQ), ferrovae.accelerate(made("VectorQuantize", VQ))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for case, layer in zip(OLDER, (ferrovae.accelerate(older), before), strict=True):
        results[case] = codes_after_steps(layer, rank)
    upstream_module.is_distributed.cache_clear()  # it would go on to say what was true of the older layers
    for case, (name, options, _) in CASES.items():
        results[case] = codes_after_steps(ferrovae.accelerate(made(name, options)), rank)
    dist.destroy_process_group()
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks(run, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "shared"), [*((case, CASES[case][2]) for case in CASES), *((case, True) for case in OLDER)]
)
def test_ranks_share_what_they_shared_before(
    codes: list[dict[str, dict[str, Tensor]]], case: str, shared: bool
) -> None:
    first, second = (rank[case] for rank in codes)
    assert first
    for key, embed in first.items():
        assert torch.equal(embed, second[key]) == shared, key


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ["alone", "stack alone"])
def test_alone_a_rank_does_what_one_process_does(
    codes: list[dict[str, dict[str, Tensor]]], case: str, rank: int
) -> None:
    name, options, _ = CASES[case]
    expected = codes_after_steps(made(name, {key: value for key, value in options.items() if "sync" not in key}), rank)
    torch.testing.assert_close(codes[rank][case], expected)
