"""What every scalar quantizer must survive: pickling, copies, empty batches, channels-last images in one graph."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch

from ferrovae.nn import FSP, FSQ, BinaryMapper, GroupedResidualFSQ, LatentQuantize, ResidualFSQ

LAYERS = {
    "fsq": (partial(FSQ, [5, 4, 3], dim=6, channel_first=True), (2, 6, 3, 4)),
    "rotated": (partial(FSQ, [4, 4], dim=6, num_codebooks=2, orthogonal_rotation=True), (2, 6, 3, 4)),
    "fsp": (partial(FSP, [5, 4, 3], dim=6, channel_first=True, act_name="normal"), (2, 6, 3, 4)),
    "latent": (partial(LatentQuantize, [5, 4, 3], dim=6), (2, 6, 3, 4)),
    "constant": (partial(LatentQuantize, [5, 4, 3], dim=6, optimize_values=False), (2, 6, 3, 4)),
    "residual": (partial(ResidualFSQ, levels=[5, 4], num_quantizers=3, dim=6, is_channel_first=True), (2, 6, 3, 4)),
    "grouped": (
        partial(GroupedResidualFSQ, dim=6, groups=2, levels=[5, 4], num_quantizers=3, accept_image_fmap=True),
        (2, 6, 3, 4),
    ),
    "binary": (partial(BinaryMapper, 6, deterministic_on_eval=True), (2, 3, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_pickles_and_copies_do_the_same(name):
    make, shape = LAYERS[name]
    layer = make().eval()
    x = torch.randn(shape)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(layer)):
        torch.testing.assert_close(twin(x)[:2], layer(x)[:2], rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_no_rows_give_no_rows(name):
    make, shape = LAYERS[name]
    layer = make()
    quantized, *rest = layer(torch.zeros(0, *shape[1:]))
    assert quantized.shape == ((0, 3, 64) if name == "binary" else (0, *shape[1:]))
    assert all(loss == 0 for loss in rest if isinstance(loss, torch.Tensor) and loss.ndim == 0)


@pytest.mark.parametrize("name", ["fsq", "latent", "residual"])
def test_training_compiles_into_one_graph_for_channels_last_images(name):
    make, shape = LAYERS[name]
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    results = []
    for run in (compiled, layer):
        inputs = x.detach().requires_grad_()
        quantized = run(inputs)[0]
        (quantized * torch.linspace(-1, 1, quantized.shape[-1])).sum().backward()
        results.append((quantized, inputs.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "binary"])
def test_bfloat16_in_and_out(name):
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype == torch.bfloat16
    layer = layer.bfloat16()
    quantized = layer(x.bfloat16())[0]
    assert quantized.dtype == torch.bfloat16
    quantized.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in layer.parameters())
