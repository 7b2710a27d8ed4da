"""What `accelerate` and `restore` keep, and what they say."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import ferrovae
from compat.models import dac, encodec, mimi, vq_model
from ferrovae import compat
from ferrovae.ops import nearest_code

MODULE = "diffusers.models.autoencoders.vae"
MODELS = {"encodec": encodec, "dac": dac, "mimi": mimi, "vq_model": vq_model}
QUANTIZERS = {"encodec": 1 + 8, "dac": 4, "mimi": 2 + 6, "vq_model": 1}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def tensors(model: nn.Module) -> dict[str, int]:
    return {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def test_nothing_but_classes_changes(name: str) -> None:
    model = MODELS[name]()
    modules = {path: (id(module), type(module)) for path, module in model.named_modules()}
    before, keys = tensors(model), list(model.state_dict())
    assert ferrovae.accelerate(model) is model
    assert {path: id(module) for path, module in model.named_modules()} == {p: i for p, (i, _) in modules.items()}
    assert tensors(model) == before
    assert list(model.state_dict()) == keys
    changed = [path for path, module in model.named_modules() if type(module) is not modules[path][1]]
    assert changed == [entry.path for entry in compat.report(model).swapped]
    assert len(changed) == QUANTIZERS[name]
    assert all(isinstance(module, modules[path][1]) for path, module in model.named_modules())
    assert ferrovae.restore(model) is model
    assert {path: (id(module), type(module)) for path, module in model.named_modules()} == modules
    assert tensors(model) == before


def test_twice_is_once(name: str) -> None:
    model = ferrovae.accelerate(MODELS[name]())
    classes = [type(module) for module in model.modules()]
    ferrovae.accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    ferrovae.restore(model)
    ferrovae.restore(model)
    assert compat.report(model).swapped == ()


def test_copies_and_pickles_stay_swapped_and_can_be_restored(name: str) -> None:
    model = MODELS[name]()
    # The weight norm of EnCodec's convolutions cannot be pickled.
    model = ferrovae.accelerate(model.quantizer if name == "encodec" else model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        torch.load(buffer, weights_only=False),
        pickle.loads(pickle.dumps(model, protocol=0)),
    ):
        assert compat.report(other) == compat.report(model)
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        ferrovae.restore(other)
        assert compat.report(other).swapped == ()
    assert len(compat.report(model).swapped) == QUANTIZERS[name]


def test_state_dicts_load_both_ways(name: str) -> None:
    theirs, ours = MODELS[name](), ferrovae.accelerate(MODELS[name]())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_report_and_log(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    model = vq_model()
    found = compat.report(model)
    assert found.left == (
        compat.Left(
            "quantize", "diffusers.models.autoencoders.vae.VectorQuantizer", "not swapped yet: call accelerate"
        ),
    )
    with caplog.at_level(logging.INFO, "ferrovae"):
        ferrovae.accelerate(model)
    assert [record.getMessage() for record in caplog.records] == ["accelerate: 1 quantizers swapped, 0 left"]
    assert capsys.readouterr().out == ""
    ferrovae.accelerate(model, verbose=True)
    printed = capsys.readouterr().out
    assert printed.startswith(f"swapped quantize: {MODULE}.VectorQuantizer -> ferrovae.compat.")
    assert printed.strip() == str(compat.report(model))


def test_a_root_quantizer() -> None:
    root = vq_model().quantize
    kind = type(root)
    assert ferrovae.accelerate(root) is root
    assert compat.report(root).swapped[0].path == ""
    assert type(root) is not kind
    assert type(ferrovae.restore(root)) is kind


def test_hooks_mode_and_dtype_are_kept() -> None:
    model = vq_model().double().train()
    calls = []
    model.quantize.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.quantize.register_forward_hook(lambda *_: calls.append("after"))
    model.quantize.register_full_backward_hook(lambda *_: calls.append("backward"))
    model.quantize.register_state_dict_post_hook(lambda *_: calls.append("state"))
    ferrovae.accelerate(model)
    model(torch.randn(1, 3, 8, 8, dtype=torch.float64)).sample.sum().backward()
    model.state_dict()
    assert calls == ["before", "after", "backward", "state"]
    assert model.quantize.training
    assert model.quantize.embedding.weight.dtype == torch.float64


def test_shared_modules_stay_shared() -> None:
    quantizer = vq_model().quantize
    model = ferrovae.accelerate(nn.ModuleDict({"a": quantizer, "b": nn.Sequential(quantizer)}))
    assert model["a"] is model["b"][0] is quantizer
    assert len(compat.report(model).swapped) == 1


def test_an_optimizer_goes_on() -> None:
    model = vq_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ferrovae.accelerate(model)
    before = model.quantize.embedding.weight.detach().clone()
    model.quantize(torch.randn(1, 4, 4, 4))[1].backward()
    optimizer.step()
    assert not torch.equal(model.quantize.embedding.weight, before)


def test_a_subclass_is_left() -> None:
    quantizer = vq_model().quantize

    class Own(type(quantizer)):
        pass

    quantizer.__class__ = Own
    with pytest.warns(compat.AccelerateWarning, match="Own: a subclass of VectorQuantizer"):
        ferrovae.accelerate(quantizer)
    assert type(quantizer) is Own


def test_a_method_replaced_on_the_object_is_left() -> None:
    quantizer = vq_model().quantize
    quantizer.forward = quantizer.forward
    with pytest.warns(compat.AccelerateWarning, match="forward was replaced on this one object"):
        ferrovae.accelerate(quantizer)


def test_another_signature_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = vq_model().quantize
    monkeypatch.setattr(type(quantizer), "forward", lambda self, z, scale: z * scale)
    with pytest.warns(compat.AccelerateWarning, match="takes other arguments than known"):
        ferrovae.accelerate(quantizer)


def test_a_class_of_the_same_name_is_another() -> None:
    quantizer = vq_model().quantize
    impostor = type("VectorQuantizer", (nn.Module,), {"__module__": type(quantizer).__module__})()
    with pytest.warns(compat.AccelerateWarning, match="0 quantizers swapped"):
        ferrovae.accelerate(impostor)


def test_nothing_to_swap_is_said() -> None:
    with pytest.warns(compat.AccelerateWarning, match="no quantizer of a known class"):
        ferrovae.accelerate(nn.Linear(2, 2))


@pytest.mark.parametrize("function", [ferrovae.accelerate, ferrovae.restore, compat.report])
def test_what_is_no_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model is a dict, expected a torch\.nn\.Module"):
        function({})


def test_a_class_made_of_ours_stays_and_says_so() -> None:
    quantizer = ferrovae.accelerate(vq_model().quantize)
    ours = type(quantizer)
    quantizer.__class__ = type("Sharded", (ours,), {})
    with pytest.warns(compat.AccelerateWarning, match="its class is now Sharded"):
        ferrovae.restore(quantizer)
    quantizer.__class__ = ours
    ferrovae.restore(quantizer)
    assert compat.report(quantizer).swapped == ()


def test_meta_models_swap_and_materialize() -> None:
    theirs = vq_model()
    with torch.device("meta"):
        ours = vq_model()
    ferrovae.accelerate(ours)
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(ours(x).sample, theirs(x).sample)


def test_a_compiled_quantizer_is_compiled_again() -> None:
    torch._dynamo.reset()
    quantizer = vq_model(num_vq_embeddings=256).quantize
    codes = quantizer.embedding.weight.detach().mul_(50.0).add_(1000.0)
    x = codes[torch.randint(256, (1, 8, 8))].movedim(-1, 1).contiguous()
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    compiled(x)
    assert ferrovae.accelerate(compiled) is compiled
    exact = nearest_code(x.movedim(1, -1), codes).flatten()
    assert torch.equal(compiled(x)[2][2], exact)
    assert not torch.equal(ferrovae.restore(compiled)(x)[2][2], exact)


def test_accelerate_imports_no_other_library() -> None:
    program = """
import sys, torch, warnings, ferrovae
assert "ferrovae.compat" not in sys.modules
warnings.simplefilter("ignore")
ferrovae.accelerate(torch.nn.Linear(2, 2))
print(sorted({"transformers", "diffusers", "vector_quantize_pytorch"} & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
