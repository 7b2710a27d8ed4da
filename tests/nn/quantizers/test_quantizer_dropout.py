"""Quantizer dropout: which stages a step keeps, as a law of the seed."""

from __future__ import annotations

import random
from math import ceil

import pytest
import torch

from ferrovae.nn.quantizers import quantizer_dropout
from ferrovae.nn.quantizers.quantizer_dropout import QuantizerDropout, draw_last_stage, stage_mask


def stack(stages=8, kind=QuantizerDropout, **options):
    defaults = {
        "quantize_dropout": True,
        "quantize_dropout_cutoff_index": 0,
        "quantize_dropout_multiple_of": 1,
        "quantize_dropout_per_sample": False,
    }
    return kind(stages, **(defaults | options))


@pytest.mark.parametrize(("low", "high"), [(0, 8), (3, 8), (7, 8), (2, 5)])
def test_last_stages_are_uniform(low, high):
    draws = draw_last_stage(low, high, seed=3, batch=20_000, device=None)
    assert draws.dtype == torch.int64
    counts = torch.bincount(draws, minlength=high)
    assert counts[:low].sum() == 0
    expected = 20_000 / (high - low)
    # chi-square under five standard deviations of its mean
    statistic = ((counts[low:] - expected) ** 2 / expected).sum()
    freedom = high - low - 1
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5


def test_draws_of_successive_seeds_are_uniform_too():
    draws = torch.stack([draw_last_stage(0, 4, seed=seed, batch=None, device=None) for seed in range(4000)])
    counts = torch.bincount(draws, minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 3 + 5 * 6**0.5


@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("cutoff", [0, 2, 7])
def test_kept_stages_are_the_last_one_rounded_up(monkeypatch, cutoff, multiple):
    layer = stack(quantize_dropout_cutoff_index=cutoff, quantize_dropout_multiple_of=multiple)
    for last in range(cutoff, 8):
        monkeypatch.setattr(quantizer_dropout, "draw_last_stage", lambda *_, last=last, **__: torch.tensor(last))
        assert int(layer.kept_stages(5, None, 0)) == min(8, ceil((last + 1) / multiple) * multiple)


def test_a_seed_fixes_the_draw_as_an_int_or_a_tensor():
    layer = stack()
    seeds = [0, 1, 17, 2**31 - 1, -1, 2**40 + 3]
    kept = [int(layer.kept_stages(4, None, seed)) for seed in seeds]
    assert kept == [int(layer.kept_stages(4, None, torch.tensor(seed))) for seed in seeds]
    assert len({int(layer.kept_stages(4, None, seed)) for seed in range(64)}) == 8


def test_without_a_seed_torch_decides():
    layer = stack()
    torch.manual_seed(4)
    first = [int(layer.kept_stages(4, None)) for _ in range(20)]
    torch.manual_seed(4)
    assert first == [int(layer.kept_stages(4, None)) for _ in range(20)]
    assert len(set(first)) > 1


def test_each_sample_has_its_own_draw():
    layer = stack(quantize_dropout_per_sample=True, quantize_dropout_multiple_of=2)
    kept = layer.kept_stages(64, None, 5)
    assert kept.shape == (64,)
    assert set(kept.tolist()) == {2, 4, 6, 8}
    # a sample's draw does not depend on how many stand beside it
    assert torch.equal(layer.kept_stages(7, None, 5), kept[:7])


def test_ranks_take_the_seed_from_what_they_share(monkeypatch):
    monkeypatch.setattr(quantizer_dropout, "rank_and_world_size", lambda: (0, 2))

    class Shared(QuantizerDropout):
        state = torch.arange(6.0)

        def dropout_state(self):
            return self.state.to(torch.bfloat16)

    layer = stack(kind=Shared)
    torch.manual_seed(1)
    seed = layer.dropout_seed(None)
    torch.manual_seed(2)
    assert torch.equal(layer.dropout_seed(None), seed)
    layer.state = layer.state + 1
    assert not torch.equal(layer.dropout_seed(None), seed)
    # draws for each sample differ between ranks, a draw for all does not
    ours = [draw_last_stage(0, 8, seed=seed, batch=n, device=None) for n in (None, 50)]
    monkeypatch.setattr(quantizer_dropout, "rank_and_world_size", lambda: (1, 2))
    theirs = [draw_last_stage(0, 8, seed=seed, batch=n, device=None) for n in (None, 50)]
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[1], theirs[1])


def test_masks_broadcast_from_the_samples():
    assert stage_mask(torch.tensor(3), 2, 4).tolist() is True
    assert stage_mask(torch.tensor(3), 3, 4).tolist() is False
    mask = stage_mask(torch.tensor([1, 3]), 1, 3)
    assert mask.shape == (2, 1, 1)
    assert mask.flatten().tolist() == [False, True]


def test_missing_stages_are_completed():
    indices = torch.randint(9, (2, 3, 4))
    assert torch.equal(stack(4).complete_stages(indices), indices)
    complete = stack(6).complete_stages(indices)
    assert torch.equal(complete[..., :4], indices)
    assert torch.equal(complete[..., 4:], torch.full((2, 3, 2), -1))
    with pytest.raises(ValueError, match="indices has 4 of 6 stages"):
        stack(6, quantize_dropout=False).complete_stages(indices)
    with pytest.raises(ValueError, match="at most 3 stages"):
        stack(3).complete_stages(indices)
    with pytest.raises(TypeError, match=r"indices is torch\.float32"):
        stack(4).complete_stages(indices.float())


def test_one_stage_never_drops():
    assert not stack(1).quantize_dropout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"stages": 0}, "num_quantizers is 0"),
        ({"quantize_dropout_cutoff_index": -1}, "quantize_dropout_cutoff_index is -1"),
        ({"quantize_dropout_cutoff_index": 8}, "expected less than the 8 stages"),
        ({"quantize_dropout_multiple_of": 0}, "quantize_dropout_multiple_of is 0"),
    ],
)
def test_bad_options(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        stack(**options)


def test_upstream_draws_within_the_same_bounds():
    # the peer's draw, which its tests of parity put in place of ours
    low, high = 2, 8
    theirs = {random.Random(seed).randrange(low, high) for seed in range(200)}
    ours = {int(draw_last_stage(low, high, seed=seed, batch=None, device=None)) for seed in range(200)}
    assert ours == theirs == set(range(low, high))


def test_draws_compile_into_one_graph():
    layer = stack(quantize_dropout_per_sample=True)
    compiled = torch.compile(
        lambda x, seed: layer.kept_stages(x.shape[0], x.device, seed), fullgraph=True, backend="aot_eager"
    )
    for seed in (3, 4, 5):
        assert torch.equal(compiled(torch.zeros(9, 2), seed), layer.kept_stages(9, None, seed))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer.kept_stages(x.shape[0], x.device), fullgraph=True, backend="aot_eager")
    assert set(torch.cat([compiled(torch.zeros(9, 2)) for _ in range(10)]).tolist()) <= set(range(1, 9))
