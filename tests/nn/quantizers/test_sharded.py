"""A model sharded by FSDP2 over two processes trains like its unsharded twin: parameters are sharded, codebooks not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

from ferrovae.nn import ResidualVQ, VectorQuantize
from two_ranks import run_two_ranks

pytestmark = pytest.mark.slow  # torch.distributed.fsdp takes long to import

DIM, STEPS = 6, 4


def model_of() -> nn.Module:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(DIM, 8)
            self.residual = ResidualVQ(dim=8, num_quantizers=2, codebook_size=8, codebook_dim=4)
            self.single = VectorQuantize(8, 16, threshold_ema_dead_code=1)
            self.decoder = nn.Linear(8, DIM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            quantized, _, losses = self.residual(self.encoder(x))
            quantized, _, loss = self.single(quantized)
            return mse_loss(self.decoder(quantized), x) + losses.sum() + loss

    return Model()


def train(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(x[step]).backward()
        optimizer.step()


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}


def run(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x = torch.randn(STEPS, 2, 3, 20, DIM, generator=torch.Generator().manual_seed(5))[:, rank]
    sharded, replicated = model_of(), DistributedDataParallel(model_of())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    train(sharded, x)
    train(replicated, x)
    torch.save([full_state(sharded), replicated.module.state_dict()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_two_ranks(run, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("engine", [0, 1], ids=["sharded", "replicated"])
def test_codebooks_are_equal_on_both_ranks_to_the_bit(states, engine):
    first, second = (states[rank][engine] for rank in range(2))
    books = [key for key in first if "_codebook." in key]
    assert len(books) == 3 * 4
    for key in books:
        assert torch.equal(first[key], second[key]), key


def test_sharding_changes_nothing(states):
    sharded, replicated = states[0]
    assert list(sharded) == list(replicated)
    start = model_of().state_dict()
    for key, value in replicated.items():
        torch.testing.assert_close(sharded[key], value, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, key))
        assert key.endswith("initted") or not torch.equal(value, start[key]), f"{key} was not trained"
