"""LatentQuantize: nearest values, the loss and its gradients in closed form, and the step of the values."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ferrovae.nn import LatentQuantize


def moved(layer):
    """Values of no special place, out of order."""
    with torch.no_grad():
        for values in layer.values_per_latent:
            values.copy_(torch.randn_like(values))
    return layer


def brute_force(layer, z):
    """Codes (N, d), places (N, d), in float64."""
    z = z.detach().double()
    places = torch.stack(
        [(z[:, i, None] - values.double()).abs().argmin(-1) for i, values in enumerate(layer.values_per_latent)], -1
    )
    codes = torch.stack([values.double()[places[:, i]] for i, values in enumerate(layer.values_per_latent)], -1)
    return codes, places


def test_each_element_takes_the_nearest_of_its_values():
    layer = moved(LatentQuantize([5, 4, 1], 3)).eval()
    z = torch.randn(200, 3)
    codes, places = brute_force(layer, z)
    quantized, indices, loss = layer(z)
    torch.testing.assert_close(quantized.double(), codes, rtol=1e-7, atol=1e-7)
    assert torch.equal(indices, (places * torch.tensor([1, 5, 20])).sum(-1).int())
    assert torch.equal(layer.codes_to_indices(quantized), indices)
    assert torch.equal(layer.indices_to_codes(indices), quantized)
    assert loss == 0
    book = layer.implicit_codebook
    assert book.shape == (20, 3)
    assert torch.equal(book[indices.long()], quantized)


def test_loss_and_gradients_in_closed_form():
    layer = moved(LatentQuantize([5, 4], 2, commitment_loss_weight=0.3, quantization_loss_weight=0.7))
    z = torch.randn(40, 2, requires_grad=True)
    codes, places = brute_force(layer, z)
    _, _, loss = layer(z)
    error = codes - z.detach().double()
    torch.testing.assert_close(loss.double(), error.square().mean(), rtol=1e-5, atol=0)
    loss.backward()
    # the straight-through term of weight 0.3 pulls towards larger error, that of 0.7 towards smaller
    torch.testing.assert_close(z.grad.double(), 2 * (0.3 - 0.7) * error / 80, rtol=1e-4, atol=1e-7)
    for i, values in enumerate(layer.values_per_latent):
        expected = torch.zeros(len(values), dtype=torch.float64).index_add_(0, places[:, i], 2 * 0.3 * error[:, i] / 80)
        torch.testing.assert_close(values.grad.double(), expected, rtol=1e-4, atol=1e-7)
    # what comes out carries no gradient to the values
    grads = torch.autograd.grad(layer(z)[0].sum(), list(layer.values_per_latent), allow_unused=True)
    assert all(grad is None or (grad == 0).all() for grad in grads)


def test_the_loss_trains_the_values_to_the_means_of_their_rows():
    layer = LatentQuantize([3], 1, commitment_loss_weight=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    z = torch.tensor([-2.0, -2.2, 0.1, 0.3, 1.9, 2.1])[:, None]
    for _ in range(200):
        optimizer.zero_grad()
        layer(z)[2].backward()
        optimizer.step()
    torch.testing.assert_close(
        layer.values_per_latent[0].detach(), torch.tensor([-2.1, 0.2, 2.0]), rtol=1e-4, atol=1e-4
    )


def test_a_step_in_place_is_gradient_descent_before_the_batch_is_quantized():
    layer = LatentQuantize([5, 4], 2, in_place_codebook_optimizer=partial(torch.optim.SGD, lr=2.0))
    moved(layer)
    z = torch.randn(40, 2, requires_grad=True)
    _, places = brute_force(layer, z)
    before = [values.detach().double() for values in layer.values_per_latent]
    quantized, _, loss = layer(z)
    for i, values in enumerate(layer.values_per_latent):
        live = before[i].clone().requires_grad_()
        # of the mean over all elements
        ((live[places[:, i]] - z[:, i].detach().double()).square().sum() / 80).backward()
        torch.testing.assert_close(values.detach().double(), before[i] - 2 * live.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantized.detach().double(), brute_force(layer, z)[0], rtol=1e-6, atol=1e-6)
    loss.backward()
    assert all(values.grad is None for values in layer.values_per_latent)
    state = [values.clone() for values in layer.values_per_latent]
    layer.eval()(z)
    assert all(torch.equal(one, two) for one, two in zip(state, layer.values_per_latent, strict=True))


def test_a_nan_takes_the_first_value():
    z = torch.zeros(3, 2)
    z[1, 0] = torch.nan
    _, indices, _ = LatentQuantize([5, 4], 2).eval()(z)
    assert indices.tolist() == [12, 10, 12]


def test_half_precision():
    layer = LatentQuantize([5, 4], 3)
    x = torch.randn(2, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, _, loss = layer(x)
    assert quantized.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    quantized, indices, loss = layer.bfloat16()(x.bfloat16())
    assert quantized.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(layer.indices_to_codes(indices), quantized)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(training):
    layer = LatentQuantize([5, 4], 3, num_codebooks=2).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    z = torch.randn(2, 3, 5, requires_grad=True)
    results = []
    for run in (compiled, layer):
        layer.zero_grad()
        z.grad = None
        quantized, indices, loss = run(z)
        (quantized.sum() + loss).backward()
        values = [one.grad for one in layer.values_per_latent] if training else []
        results.append((quantized, indices, loss, z.grad, values))
    torch.testing.assert_close(results[0], results[1])


def test_exports():
    layer = LatentQuantize([5, 4], 3).eval()
    x = torch.randn(2, 3, 5)
    program = torch.export.export(layer, (x,)).module()
    for ours, exported in zip(layer(x), program(x), strict=True):
        torch.testing.assert_close(ours, exported)


@pytest.mark.parametrize(
    ("arguments", "options", "complaint"),
    [
        ((4, 3), {}, "one number of levels needs it"),
        (([4, 3], 3), {"codebook_dim": 3}, "expected the 2 of levels"),
        (([4, 0], 3), {}, "at least 1"),
        (([4, 3], 0), {}, "dim is 0"),
        (([4, 3], 3), {"num_codebooks": 0}, "num_codebooks is 0"),
        (([4, 3], 3), {"optimize_values": False, "in_place_codebook_optimizer": torch.optim.SGD}, "needs optimize"),
    ],
)
def test_bad_options(arguments, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        LatentQuantize(*arguments, **options)


def test_bad_input():
    layer = LatentQuantize([4, 3], 2)
    with pytest.raises(ValueError, match=r"z is \(5, 3\), expected \(B, 2, ...\)"):
        layer(torch.zeros(5, 3))
    with pytest.raises(TypeError, match=r"z is torch\.int64"):
        layer(torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="run from 12 to 12"):
        layer.indices_to_codes(torch.tensor([[12]]))
    with pytest.raises(ValueError, match=r"codes are \(5, 3\)"):
        layer.codes_to_indices(torch.zeros(5, 3))
