"""How the codebook starts and how unused codes are replaced."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from ferrovae.nn import VectorQuantize
from ferrovae.nn.quantizers.keyed_sampling import key_of, stratified_rows
from ferrovae.nn.quantizers.kmeans import kmeans


def clusters(size=8, dim=5, each=40, spread=0.01):
    centres = torch.randn(size, dim) * 10
    return centres, (centres[:, None] + spread * torch.randn(size, each, dim)).flatten(0, 1)


def potential(x, means):
    return (x.double()[:, None] - means.double()).square().sum(-1).amin(-1).sum()


def test_kmeans_takes_the_steps_of_lloyd():
    _, x = clusters(spread=2.0)
    valid, key = torch.ones(len(x), dtype=torch.bool), torch.tensor(7)
    one_step, counts = (found[0] for found in kmeans(x[None], valid[None], 6, 1, key=key, cosine=False))
    assert counts.sum() == len(x)
    means = one_step.double()
    for _ in range(9):
        nearest = (x.double()[:, None] - means).square().sum(-1).argmin(-1)
        means = torch.stack([x.double()[nearest == k].mean(0) if (nearest == k).any() else means[k] for k in range(6)])
    many_steps = kmeans(x[None], valid[None], 6, 10, key=key, cosine=False)[0][0]
    torch.testing.assert_close(many_steps.double(), means, rtol=1e-5, atol=1e-5)
    assert potential(x, many_steps) <= potential(x, one_step)


def test_kmeans_ignores_rows_that_do_not_count_and_starts_from_the_rest():
    _, x = clusters()
    poisoned = torch.cat([x, torch.full((7, 5), math.nan)])
    valid = torch.arange(len(poisoned)) < len(x)
    first = kmeans(poisoned[None], valid[None], 8, 3, key=torch.tensor(1), cosine=False)
    second = kmeans(x[None], torch.ones(1, len(x), dtype=torch.bool), 8, 3, key=torch.tensor(1), cosine=False)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert kmeans(x[None], torch.zeros(1, len(x), dtype=torch.bool), 8, 3, key=torch.tensor(1), cosine=False) is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
def test_the_first_batch_starts_the_codebook_in_training_or_not(training, cosine):
    _, x = clusters()
    layer = VectorQuantize(5, 8, kmeans_init=True, use_cosine_sim=cosine).train(training)
    assert not layer._codebook.initted
    assert (layer.codebook == 0).all()
    _, indices, _ = layer(x, freeze_codebook=True)
    assert layer._codebook.initted
    codebook = layer.codebook.clone()
    assert len(indices.unique()) > 1
    # converged: every code is the mean of what it attracts, up to the Laplace smoothing
    rows = torch.nn.functional.normalize(x, dim=-1) if cosine else x
    for code in indices.unique():
        mean = rows[indices == code].mean(0)
        mean = torch.nn.functional.normalize(mean, dim=-1) if cosine else mean
        torch.testing.assert_close(codebook[code], mean, rtol=1e-4, atol=1e-4)
    layer.eval()(torch.randn(4, 5))
    assert torch.equal(layer.codebook, codebook)


def test_an_empty_first_batch_leaves_the_start_to_the_next():
    layer = VectorQuantize(5, 8, kmeans_init=True)
    layer(torch.full((3, 5), math.nan))
    layer(torch.zeros(0, 5))
    assert not layer._codebook.initted
    layer(clusters()[1])
    assert layer._codebook.initted
    assert layer.codebook.isfinite().all()


def test_fewer_vectors_than_codes_start_with_a_warning():
    layer = VectorQuantize(5, 8, kmeans_init=True).eval()
    x = torch.randn(3, 5)
    with pytest.warns(UserWarning, match="3 vectors for a codebook of 8"):
        quantized, _, _ = layer(x)
    torch.testing.assert_close(quantized, x, rtol=1e-4, atol=1e-4)


def test_a_started_codebook_starts_no_other_that_takes_its_state():
    _, x = clusters()
    source, fresh, copied = (VectorQuantize(5, 8, kmeans_init=True) for _ in range(3))
    source(x)
    fresh.load_state_dict(source.state_dict())
    with torch.no_grad():
        for target, value in zip(copied.buffers(), source.buffers(), strict=True):
            target.copy_(value)
    for layer in (fresh, copied, copy.deepcopy(source)):
        layer.eval()(x + 100)
        assert torch.equal(layer.codebook, source.codebook)
    source.load_state_dict(VectorQuantize(5, 8, kmeans_init=True).state_dict())
    source.eval()(x + 100)
    assert (source.codebook.mean(0) > 50).all()


def test_unused_codes_become_rows_of_the_batch():
    layer = VectorQuantize(5, 16, threshold_ema_dead_code=2, decay=0.5)
    layer.codebook = torch.cat([torch.zeros(1, 5), torch.full((15, 5), 1e6)])
    x = torch.randn(3, 50, 5)
    layer(x)
    book = layer._codebook
    rows = x.flatten(0, 1)
    for code in range(1, 16):
        assert (rows == layer.codebook[code]).all(-1).any()
        assert book.cluster_size[0, code] == 2
        assert torch.equal(book.embed_avg[0, code], 2 * layer.codebook[code])
    assert layer.codebook[1:].unique(dim=0).shape[0] == 15
    assert book.cluster_size[0, 0] == 0.5 * 1 + 0.5 * 150


def test_no_code_is_replaced_in_eval_or_at_threshold_zero():
    x = torch.randn(100, 5)
    for layer in (VectorQuantize(5, 16, threshold_ema_dead_code=2).eval(), VectorQuantize(5, 16, decay=1.0)):
        layer.codebook = torch.full((16, 5), 1e6)
        layer._codebook.embed_avg.copy_(layer._codebook.embed)
        layer(x)
        torch.testing.assert_close(layer.codebook, torch.full((16, 5), 1e6))


def test_more_dead_codes_than_rows_wait_for_the_next_step():
    layer = VectorQuantize(5, 64, threshold_ema_dead_code=0.95)
    far = torch.full((64, 5), 1e6)
    layer.codebook = far
    x = torch.randn(10, 5)
    layer(x)
    replaced = (layer._codebook.cluster_size == layer._codebook.options.threshold_ema_dead_code).sum()
    assert replaced == 10 or replaced == 9  # one row's own code lives
    rows = [tuple(row) for row in layer.codebook.tolist() if tuple(row) in {tuple(row) for row in x.tolist()}]
    assert len(rows) == len(set(rows))


def test_codes_without_moving_average_are_replaced_too():
    layer = VectorQuantize(5, 16, threshold_ema_dead_code=0.5, ema_update=False, decay=0.1)
    before = layer.codebook.clone()
    x = torch.randn(100, 5)
    layer(x)
    changed = (layer.codebook != before).any(-1)
    assert changed.any()
    assert torch.equal(changed, layer._codebook.cluster_size[0] == 0.5)


def test_replacement_draws_no_random_numbers_and_repeats():
    layers = [VectorQuantize(5, 16, threshold_ema_dead_code=2) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    batches = torch.randn(4, 30, 5)
    for seed, layer in enumerate(layers):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        for batch in batches:
            layer(batch)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layers[0].codebook, layers[1].codebook)


def test_dead_codes_come_back_to_life():
    """Data that move away from the codebook are followed: all codes are used again."""
    layer = VectorQuantize(4, 32, threshold_ema_dead_code=1)
    for _ in range(30):
        layer(torch.randn(256, 4) + 30)
    used = layer.eval()(torch.randn(2000, 4) + 30)[1].unique()
    assert len(used) >= 30


def test_sampled_rows_are_distinct_valid_and_even():
    valid = torch.rand(103) > 0.3
    hits = torch.zeros(103)
    for key in range(400):
        rows, filled = stratified_rows(valid, 8, torch.tensor(key), offset=0, total=valid.sum(), distinct=True)
        assert filled.all()
        assert valid[rows].all()
        assert len(rows.unique()) == 8
        hits += torch.bincount(rows, minlength=103)
    expected = 400 * 8 / int(valid.sum())
    chi_square = ((hits[valid] - expected) ** 2 / expected).sum()
    degrees = int(valid.sum()) - 1
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


def test_ranks_together_choose_what_one_process_would():
    valid = torch.rand(60) > 0.2
    held = [int(part.sum()) for part in valid.split(20)]
    whole, _ = stratified_rows(valid, 12, torch.tensor(3), offset=0, total=sum(held), distinct=True)
    chosen = torch.full((12,), -1)
    for rank, part in enumerate(valid.split(20)):
        rows, filled = stratified_rows(
            part, 12, torch.tensor(3), offset=sum(held[:rank]), total=sum(held), distinct=True
        )
        assert (chosen[filled] == -1).all()
        chosen[filled] = rows[filled] + 20 * rank
    assert torch.equal(chosen, whole)


def test_keys_follow_the_bits():
    state = torch.ones(8)
    other = state.clone()
    other[3] = torch.nextafter(other[3], torch.tensor(2.0))
    assert key_of(state) == key_of(state.clone())
    assert len({int(key_of(tensor)) for tensor in (state, other, other.flip(0), state * 2)}) == 4
