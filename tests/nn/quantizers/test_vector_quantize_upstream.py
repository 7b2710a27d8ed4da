"""Parity with vector-quantize-pytorch itself, where it is installed (`pip install 'ferrovae[bench]'`)."""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import VectorQuantize

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

DIM, SIZE = 12, 16


def pair(**options):
    """The same layer twice: the same seed gives the same parameters and codes."""
    torch.manual_seed(5)
    theirs = upstream.VectorQuantize(dim=DIM, codebook_size=SIZE, **options)
    torch.manual_seed(5)
    ours = VectorQuantize(DIM, SIZE, **options)
    return theirs, ours


def clear_batches(codebook, count, shape=(3, 20)):
    """Rows close to a code, so that rounding decides no index; every code in use."""
    for _ in range(count):
        indices = torch.randint(codebook.shape[0], shape)
        yield codebook[indices] + 0.02 * torch.randn(*shape, codebook.shape[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codebook_dim": 5},
        {"use_cosine_sim": True, "decay": 0.5},
        {"rotation_trick": False, "commitment_weight": 0.25, "eps": 1e-3},
        {"learnable_codebook": True, "ema_update": False},
        {"ema_update": False},
        {"codebook_dim": 5, "straight_through": True, "rotation_trick": False, "freeze_codebook": True},
        {"commitment_weight": 0.0},
    ],
)
@pytest.mark.parametrize("input_grad", [True, False])
def test_outputs_losses_gradients_and_codebook_over_steps(options, input_grad):
    theirs, ours = pair(**options)
    centres = torch.randn(SIZE, DIM) * 2
    if "codebook_dim" not in options:
        codes = torch.nn.functional.normalize(centres, dim=-1) if "use_cosine_sim" in options else centres
        for layer in (theirs, ours):
            with torch.no_grad():
                layer.codebook = codes
    for x in clear_batches(centres, 5):
        results = []
        for layer in (theirs, ours):
            layer.zero_grad()
            inputs = x.clone().requires_grad_(input_grad)
            quantized, indices, loss = layer(inputs)
            total = (quantized * torch.linspace(-1, 1, DIM)).sum() + 10 * loss
            if total.requires_grad:
                total.backward()
            gradients = [inputs.grad, *(parameter.grad for _, parameter in sorted(layer.named_parameters()))]
            results.append((quantized, indices, loss, gradients, dict(layer.state_dict())))
        (their_vectors, their_indices, their_loss, their_gradients, their_state) = results[0]
        (our_vectors, our_indices, our_loss, our_gradients, our_state) = results[1]
        assert torch.equal(our_indices, their_indices)
        assert our_loss.dtype == their_loss.dtype
        torch.testing.assert_close(our_vectors, their_vectors, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-7)
        for one, two in zip(our_gradients, their_gradients, strict=True):
            # an unused parameter of theirs has a zero gradient where ours has none, or the reverse
            one, two = (torch.zeros(()) if gradient is None else gradient for gradient in (one, two))
            torch.testing.assert_close(*torch.broadcast_tensors(one, two), rtol=1e-4, atol=1e-4)
        assert our_state.keys() == their_state.keys()
        torch.testing.assert_close(our_state, their_state, rtol=1e-4, atol=1e-5)
    theirs.eval()
    ours.eval()
    for one, two in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_masks(zeros):
    theirs, ours = pair(return_zeros_for_masked_padding=zeros)
    centres = torch.randn(SIZE, DIM)
    theirs.codebook = centres
    ours.codebook = centres
    for x in clear_batches(centres, 3):
        mask = torch.rand(3, 20) > 0.4
        for one, two in zip(ours(x, mask=mask), theirs(x, mask=mask), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"channel_last": False}, (2, DIM, 9)),
        ({"accept_image_fmap": True}, (2, DIM, 3, 4)),
        ({"accept_image_fmap": True, "codebook_dim": 5}, (2, DIM, 3, 4)),
        ({}, (7, DIM)),
    ],
)
def test_layouts(options, shape):
    theirs, ours = pair(**options)
    x = torch.randn(shape)
    results = ours(x), theirs(x)
    for one, two in zip(*results, strict=True):
        assert one.shape == two.shape
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    codes = [layer.get_codes_from_indices(results[0][1]) for layer in (ours, theirs)]
    torch.testing.assert_close(*codes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"codebook_dim": 5}, {"kmeans_init": True}, {"learnable_codebook": True, "ema_update": False}]
)
def test_checkpoints_load_both_ways(options):
    theirs, ours = pair(**options)
    x = torch.randn(4, 30, DIM)
    theirs(x)
    ours(x + 1)
    for source, target in ((theirs, pair(**options)[1]), (ours, pair(**options)[0])):
        target.load_state_dict(source.state_dict(), strict=True)
        source.eval()
        target.eval()
        for one, two in zip(source(x), target(x), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_start_by_kmeans_reaches_the_same_means():
    centres = torch.eye(4) * 10
    x = (centres[:, None] + 0.01 * torch.randn(4, 50, 4)).flatten(0, 1)
    wanted = x.reshape(4, 50, 4).mean(1)
    for start in range(20):  # theirs starts at random: until it finds all four
        torch.manual_seed(start)
        theirs = upstream.VectorQuantize(dim=4, codebook_size=4, kmeans_init=True).eval()
        theirs(x[None])
        if (torch.cdist(wanted, theirs.codebook).amin(-1) < 0.1).all():
            break
    ours = VectorQuantize(4, 4, kmeans_init=True).eval()
    ours(x[None])
    for name in ("cluster_size", "embed", "embed_avg"):
        one, two = (getattr(layer._codebook, name)[0] for layer in (ours, theirs))
        order = [layer.codebook.argmax(-1).argsort() for layer in (ours, theirs)]
        torch.testing.assert_close(one[order[0]], two[order[1]], rtol=1e-4, atol=1e-3)
