"""`LFQ` against definitions: entropies by enumeration, shapes, masks, precision, compilation, complaints."""

from __future__ import annotations

import math
import pickle
import re

import pytest
import torch
from torch import nn

from ferrovae.nn import LFQ


def enumerated(x, inv_temperature, codes):
    """Mean entropy of softmax over codes of 2 T <x, c>, and the entropy of its mean: x (N, d), in float64."""
    q = torch.softmax(2 * inv_temperature * x.double() @ codes.double().T, -1)
    return [-torch.special.xlogy(p, p).sum(-1).mean() for p in (q, q.mean(0))]


@pytest.mark.parametrize("spherical", [False, True])
def test_entropies_are_those_over_all_codes(spherical):
    layer = LFQ(codebook_size=32, num_codebooks=2, codebook_scale=0.5, spherical=spherical)
    x = 0.4 * torch.randn(4, 25, 10)
    _, (per_sample, batch, _) = layer(x, 3.0, return_loss_breakdown=True)
    books = x.view(100, 2, 5)
    codes = layer.codebook
    if spherical:
        books, codes = (0.5 * nn.functional.normalize(t, dim=-1) for t in (books, codes))
    exact = [enumerated(book, 3.0, codes) for book in books.unbind(1)]
    for ours, truth in zip((per_sample, batch), zip(*exact, strict=True), strict=True):
        torch.testing.assert_close(ours.double(), sum(truth) / 2, rtol=1e-5, atol=1e-6)


def test_a_temperature_may_be_a_tensor():
    layer = LFQ(dim=4)
    x = torch.randn(2, 9, 4)
    torch.testing.assert_close(layer(x, torch.tensor(3.0)), layer(x, 3.0))


def test_thirty_six_bits():
    """Far beyond any table: two runs of 18 bits, whose entropies add up to no less than the entropy itself."""
    layer = LFQ(codebook_size=2**36, dim=40, num_codebooks=1, commitment_loss_weight=1.0)
    x = torch.randn(2, 50, 40, requires_grad=True)
    (quantized, indices, loss), (per_sample, batch, _) = layer(x, 1.0, return_loss_breakdown=True)
    (quantized.sum() + loss).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    # The mean of N distributions has an entropy of at most the mean of theirs plus log N; the bound adds a run's share.
    assert per_sample < batch < per_sample + 2 * math.log(100)
    with torch.no_grad():
        signs = layer.project_in(x) > 0
    numbers = [sum(int(bit) << (35 - i) for i, bit in enumerate(row)) for row in signs.flatten(0, 1).tolist()]
    assert indices.flatten().tolist() == numbers
    layer.eval()
    torch.testing.assert_close(layer.indices_to_codes(indices), layer(x).quantized)
    with pytest.raises(ValueError, match=re.escape("LFQ: the codebook has 2^36 codes, expected at most 2^18")):
        layer.codebook  # noqa: B018


def test_runs_of_independent_bits_reach_the_bound():
    layer = LFQ(dim=20)
    x = torch.full((1, 7, 20), 0.01)  # all rows alike: both entropies are the sum of those of the bits
    _, (per_sample, batch, _) = layer(x, 10.0, return_loss_breakdown=True)
    p = torch.sigmoid(torch.tensor(4 * 10.0 * 0.01, dtype=torch.float64))
    exact = -20 * (p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close((per_sample.double(), batch.double()), (exact, exact), rtol=1e-5, atol=1e-5)


def test_nothing_counts():
    layer = LFQ(dim=4, commitment_loss_weight=1.0)
    x = torch.randn(2, 5, 4, requires_grad=True)
    loss = layer(x, mask=torch.zeros(2, 5, dtype=torch.bool)).entropy_aux_loss
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()
    assert LFQ(dim=4, frac_per_sample_entropy=0.1)(x).entropy_aux_loss.isfinite()
    assert LFQ(dim=4, frac_per_sample_entropy=0.1)(x[:1, :5]).entropy_aux_loss == 0
    assert layer(torch.zeros(0, 5, 4)).entropy_aux_loss == 0


def test_masked_rows_may_hold_anything():
    layer = LFQ(dim=4, commitment_loss_weight=1.0)
    x = torch.randn(2, 4, 3, 5)
    mask = torch.rand(2, 3, 5) > 0.5
    poisoned = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    loss = layer(poisoned, mask=mask).entropy_aux_loss
    loss.backward()
    assert poisoned.grad.isfinite().all()
    torch.testing.assert_close(loss, layer(x, mask=mask.flatten(1)).entropy_aux_loss)
    assert layer(poisoned).entropy_aux_loss.isnan()
    bits = layer(torch.tensor([[math.nan, 1.0, -1.0, 0.0]])).indices
    assert bits.item() == 0b0100


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_every_row_the_mask_shows_is_as_likely_to_be_sampled(share):
    layer = LFQ(dim=2, frac_per_sample_entropy=share)
    mask = torch.tensor([[True, False, True, True, True, False]])
    x = torch.full((1, 6, 2), 0.1, requires_grad=True)
    hits, draws = torch.zeros(6), 400
    for _ in range(draws):
        loss = layer(x, 1.0, mask=mask, return_loss_breakdown=True)[1].per_sample_entropy
        if int(4 * share) == 0:
            assert loss == 0
            continue
        (grad,) = torch.autograd.grad(loss, x)
        hits += (grad[0] != 0).any(-1)
    wanted = torch.where(mask[0], int(4 * share) / 4, 0.0)
    # Six standard deviations of a frequency.
    assert ((hits / draws - wanted).abs() < 6 * (wanted * (1 - wanted) / draws).sqrt() + 1e-9).all()


def test_decoding_gives_what_evaluation_gives():
    for options in ({}, {"spherical": True, "codebook_scale": 2.0}, {"orthogonal_rotation": True}):
        layer = LFQ(dim=10, codebook_size=16, num_codebooks=2, **options).eval()
        for shape in ((3, 10), (3, 7, 10), (3, 10, 2, 4), (3, 10, 2, 2, 2)):
            quantized, indices, loss = layer(torch.randn(shape))
            assert quantized.shape == shape
            torch.testing.assert_close(layer.indices_to_codes(indices), quantized)
            assert loss == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("force", [True, False])
def test_precision(dtype, force):
    layer = LFQ(dim=4, force_quantization_f32=force, commitment_loss_weight=0.1).to(dtype)
    x = torch.randn(2, 9, 4).to(dtype).requires_grad_()
    quantized, indices, loss = layer(x)
    assert quantized.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 and not force else torch.float32)
    single, single_indices, single_loss = LFQ(dim=4, commitment_loss_weight=0.1)(x.detach().float())
    assert torch.equal(indices, single_indices)
    torch.testing.assert_close(quantized.float(), single, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(loss.float(), single_loss, rtol=1e-2, atol=1e-2)
    (quantized.sum() + loss).backward()
    assert x.grad.dtype == dtype


def test_autocast_leaves_the_entropies_alone():
    layer = LFQ(dim=5)
    x = torch.randn(2, 9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
    torch.testing.assert_close(cast, layer(x))
    projected = LFQ(dim=12, codebook_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, indices, loss = projected(torch.randn(2, 9, 12))
    assert (quantized.dtype, indices.dtype, loss.dtype) == (torch.bfloat16, torch.int64, torch.float32)


TWO = {"dim": 10, "codebook_size": 16, "num_codebooks": 2, "spherical": True, "orthogonal_rotation": True}
SAMPLED = {"dim": 6, "frac_per_sample_entropy": 0.5, "soft_clamp_input_value": 2.0, "commitment_loss_weight": 1.0}


@pytest.mark.parametrize(
    ("options", "shape", "masked"),
    [({"dim": 6}, (2, 9, 6), False), (TWO, (2, 10, 3, 3), True), (SAMPLED, (2, 9, 6), True)],
)
def test_compiled_whole(options, shape, masked):
    torch.compiler.reset()
    layer = LFQ(**options)
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(shape)
    arguments = {"mask": torch.rand(2, 9) > 0.3} if masked else {}
    for train in (True, False):
        layer.train(train)
        results = []
        for run in (layer, whole):
            torch.manual_seed(0)
            inputs = x.clone().requires_grad_()
            quantized, indices, loss = run(inputs, **arguments)
            if train:
                (quantized.square().sum() + loss).backward()
            results.append((quantized, indices, loss, inputs.grad))
        torch.testing.assert_close(*results)


def test_exports():
    layer = LFQ(dim=10, codebook_size=16, spherical=True).eval()
    x = torch.randn(2, 9, 10)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    copy = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(copy(x), layer(x))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "LFQ: neither dim nor codebook_size is given"),
        ({"codebook_size": 24}, "LFQ: codebook_size is 24, expected a power of 2, such as 32"),
        ({"codebook_size": 1}, "LFQ: a codebook has 0 bits, expected 1 to 62"),
        ({"dim": 63}, "LFQ: a codebook has 63 bits"),
        ({"dim": 6, "codebook_size": 8, "has_projections": False}, "LFQ: has_projections=False needs dim = 3"),
        ({"dim": 4, "num_codebooks": 2, "keep_num_codebooks_dim": False}, "LFQ: num_codebooks=2 excludes"),
        ({"dim": 4, "num_codebooks": 0}, "LFQ: num_codebooks is 0"),
        ({"dim": 4, "codebook_scale": 0.0}, "LFQ: codebook_scale is 0.0"),
        ({"dim": 4, "frac_per_sample_entropy": 0.0}, "LFQ: frac_per_sample_entropy is 0.0"),
        ({"dim": 4, "soft_clamp_input_value": 0.5}, "LFQ: soft_clamp_input_value is 0.5, expected at least"),
    ],
)
def test_complaints_about_options(options, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        LFQ(**options)


def test_complaints_about_inputs():
    layer = LFQ(dim=4)
    x = torch.randn(2, 9, 4)
    with pytest.raises(ValueError, match=re.escape("LFQ: x is (2, 9, 3), expected (B, ..., 4)")):
        layer(x[..., :3])
    with pytest.raises(ValueError, match=re.escape("LFQ: x is (2, 3, 3, 4), expected (B, 4, ...)")):
        layer(torch.randn(2, 3, 3, 4))
    with pytest.raises(ValueError, match=re.escape("LFQ: x is (4,), expected (B, ..., 4)")):
        layer(x[0, 0])
    with pytest.raises(TypeError, match=r"LFQ: x is torch.int64"):
        layer(x.long())
    with pytest.raises(ValueError, match=re.escape("LFQ: mask is (9,), expected (2, 9)")):
        layer(x, mask=torch.ones(9, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"LFQ: mask is torch.float32, expected torch.bool"):
        layer(x, mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"LFQ: inv_temperature is 0.0, expected a positive number"):
        layer(x, 0.0)
    with pytest.raises(ValueError, match="LFQ: indices run from -1 to 3, expected 0 to 15"):
        layer.indices_to_codes(torch.tensor([[-1, 3]]))
    with pytest.raises(TypeError, match=r"LFQ: indices is torch.float32"):
        layer.indices_to_codes(torch.ones(2, 3))
