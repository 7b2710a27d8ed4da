"""vector-quantize-pytorch's layers in a model become those of `ferrovae.nn`; its package can be stood in for."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ferrovae
from compat.upstream_cases import CASES, fitting, made, runs
from ferrovae import compat
from ferrovae.compat.vector_quantize_pytorch._names import SUBMODULES, resolve

upstream = pytest.importorskip("vector_quantize_pytorch")

VQ = {"dim": 8, "codebook_size": 16}
# Every one of these is swapped by any version of ferrovae.
CERTAIN: list[dict[str, Any]] = [
    VQ,
    {**VQ, "codebook_dim": 4},
    {**VQ, "decay": 0.95, "eps": 1e-3, "commitment_weight": 0.25},
    {**VQ, "kmeans_init": True, "kmeans_iters": 3},
    {**VQ, "use_cosine_sim": True},
    {**VQ, "channel_last": False, "freeze_codebook": True},
    {**VQ, "accept_image_fmap": True},
    {**VQ, "straight_through": True, "rotation_trick": False},
    {**VQ, "learnable_codebook": True, "ema_update": False},
    {**VQ, "return_zeros_for_masked_padding": False},
]


@pytest.mark.parametrize("options", CERTAIN, ids=str)
def test_it_goes_on_where_upstream_was(options: dict[str, Any]) -> None:
    module, x = made("VectorQuantize", options), fitting("VectorQuantize", options)
    module(x)
    theirs = copy.deepcopy(module)
    tensors = {key: id(t) for key, t in [*module.named_parameters(), *module.named_buffers()]}
    assert ferrovae.accelerate(module) is module
    assert type(module) is ferrovae.nn.VectorQuantize
    shared = {key: id(t) for key, t in [*module.named_parameters(), *module.named_buffers()]}
    assert {key: shared[key] for key in theirs.state_dict()} == {key: tensors[key] for key in theirs.state_dict()}
    assert set(module.state_dict()) == set(theirs.state_dict())
    for training in (True, True, False):
        outputs = []
        for layer in (module.train(training), theirs.train(training)):
            z = x.clone().requires_grad_()
            quantized, indices, loss = layer(z)
            if training:
                (quantized.square().sum() + loss).backward()
            outputs.append((quantized, indices, loss.reshape(()), z.grad if training else z))
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ferrovae.restore(module.train())
    assert type(module) is type(theirs)
    assert list(module.state_dict()) == list(theirs.state_dict())
    for a, b in zip(module.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(module(x), theirs.train()(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_case_is_swapped(name: str, options: dict[str, Any]) -> None:
    module = made(name, options)
    theirs = copy.deepcopy(module)
    found = compat.report(module)
    assert found.left[0].reason == "not swapped yet: call accelerate"
    ferrovae.accelerate(module)
    assert type(module) is resolve(name)
    assert module.load_state_dict(theirs.state_dict(), strict=True)
    if runs(name, options):
        with warnings.catch_warnings():
            # The coarsest level has fewer vectors than codes, and k-means says so.
            warnings.filterwarnings("ignore", message="k-means start")
            module(fitting(name, options))
    ferrovae.restore(module)
    assert type(module) is type(theirs)
    module.load_state_dict(theirs.state_dict(), strict=True)


def test_a_model_trains_on() -> None:
    model = nn.Sequential(nn.Linear(4, 8), made("VectorQuantize", VQ))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = copy.deepcopy(model)
    ferrovae.accelerate(model)
    x = torch.randn(2, 20, 4)
    for layer in (model, theirs):
        quantized, _, loss = layer(x)
        (quantized.square().mean() + loss).backward()
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_copies_and_pickles_go_on_and_can_be_restored() -> None:
    module, x = made("VectorQuantize", VQ), torch.randn(2, 20, 8)
    ferrovae.accelerate(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        other(x)
        ours = copy.deepcopy(module)
        ours(x)
        assert torch.equal(other.codebook, ours.codebook)
        assert type(ferrovae.restore(other)) is upstream.VectorQuantize
        assert torch.equal(other.codebook, ours.codebook)
        other(x)


@pytest.fixture
def alone() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_wrapped_for_data_parallel_training() -> None:
    theirs = nn.Sequential(nn.Linear(8, 8), made("VectorQuantize", {**VQ, "codebook_dim": 4}))
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(theirs))
    ferrovae.accelerate(model)
    assert [entry.path for entry in compat.report(model).swapped] == ["module.1"]
    x = torch.randn(2, 20, 8)
    for layer in (model, theirs):
        quantized, _, loss = layer(x)
        (quantized.square().sum() + loss).backward()
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.module[1].codebook, theirs[1].codebook)


def test_what_ours_cannot_do_is_left_with_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from ferrovae.compat.vector_quantize_pytorch import _names

    def none(name: str) -> Any:
        raise AttributeError(name)

    monkeypatch.setattr(_names, "resolve", none)
    monkeypatch.setattr("ferrovae.compat.vector_quantize_pytorch._adapters.resolve", none)
    model = nn.ModuleDict({"q": made("ResidualVQ", {**VQ, "num_quantizers": 2})})
    with pytest.warns(compat.AccelerateWarning, match=r"ferrovae\.nn has no ResidualVQ"):
        ferrovae.accelerate(model)
    assert [entry.reason for entry in compat.report(model).left] == [
        "ferrovae.nn has no ResidualVQ",
        "part of q, which is left",
        "part of q, which is left",
    ]


def test_parts_of_a_subclass_are_left() -> None:
    class Own(upstream.ResidualVQ):
        pass

    model = Own(**VQ, num_quantizers=2)
    with pytest.warns(compat.AccelerateWarning, match="a subclass of ResidualVQ"):
        ferrovae.accelerate(model)
    assert all(type(layer) is upstream.VectorQuantize for layer in model.layers)


def test_a_sequential_and_its_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sequential(nn.Module):
        def __init__(self, *fns: nn.Module) -> None:
            super().__init__()
            assert sum(isinstance(fn, ferrovae.nn.VectorQuantize) for fn in fns) == 1
            self.fns = nn.ModuleList(fns)

    if not hasattr(ferrovae.nn, "Sequential"):
        monkeypatch.setattr(ferrovae.nn, "Sequential", Sequential, raising=False)
    inner, linear = made("VectorQuantize", VQ), nn.Linear(8, 8)
    module = upstream.Sequential(linear, inner)
    ferrovae.accelerate(module)
    assert type(module) is ferrovae.nn.Sequential
    assert type(inner) is ferrovae.nn.VectorQuantize
    assert list(module.fns) == [linear, inner]
    ferrovae.restore(module)
    assert type(module) is upstream.Sequential
    assert type(inner) is upstream.VectorQuantize
    assert list(module.fns) == [linear, inner]
    module(torch.randn(1, 5, 8))


def test_names_stand_where_upstream_has_them() -> None:
    from ferrovae.compat import vector_quantize_pytorch as ours

    assert set(ours.__all__) == {name for name in dir(upstream) if isinstance(getattr(upstream, name), type)}
    assert ours.VectorQuantize is ferrovae.nn.VectorQuantize
    for name, submodule in SUBMODULES.items():
        assert getattr(upstream, name).__module__ == f"vector_quantize_pytorch.{submodule}"
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = ours.Nothing


def test_stands_in_sys_modules() -> None:
    program = """
import sys
from ferrovae.compat import vector_quantize_pytorch
sys.modules["vector_quantize_pytorch"] = vector_quantize_pytorch
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize as deep
import ferrovae, vector_quantize_pytorch.residual_vq, vector_quantize_pytorch.utils
assert VectorQuantize is deep is ferrovae.nn.VectorQuantize
try:
    from vector_quantize_pytorch.residual_vq import VectorQuantize
except ImportError:
    print("ours")
"""
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "ours\n"
    )
