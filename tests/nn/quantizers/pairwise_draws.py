"""Random numbers that our layers and the library's share in the tests over pairs of options."""

from __future__ import annotations

import random

import torch

from ferrovae.nn.quantizers import quantizer_dropout


class SharedDraws:
    """Stands for `torch` in a module of ours and one of the library's: both draw the same numbers for an element.

    Bernoulli draws have the probability asked for; the library's would have 1/2 whatever it asks for.
    """

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def rand_like(self, x):
        # What bfloat16 holds, or a comparison with these numbers would depend on the dtype.
        return ((torch.randint(128, x.shape, generator=self.generator) + 0.5) / 128).to(x.dtype)

    def full_like(self, x, value):
        return Coins(torch.rand(x.shape, generator=self.generator), value)

    def empty_like(self, x):
        return Coins(torch.rand(x.shape, generator=self.generator), None)

    def __getattr__(self, name):
        return getattr(torch, name)


class Coins:
    """What a Bernoulli draw is asked of: a tensor of its probability, or one of nothing."""

    def __init__(self, uniform, probability) -> None:
        self.uniform, self.probability = uniform, probability

    def bernoulli_(self, probability=None):
        return self.uniform < (self.probability if probability is None else probability)


def one_dropout(monkeypatch, module):
    """Ours and a stack of the library's module keep the same stages, drawn from the seed that the result holds."""
    seed = [0]

    def last_stage(low, high, *, seed, batch, device):
        return torch.tensor(random.Random(int(seed)).randrange(low, high))

    def dropout_seed(self, device):
        return torch.tensor(seed[0])

    monkeypatch.setattr(module, "get_maybe_sync_seed", lambda device: seed[0])
    monkeypatch.setattr(quantizer_dropout.QuantizerDropout, "dropout_seed", dropout_seed)
    monkeypatch.setattr(quantizer_dropout, "draw_last_stage", last_stage)
    return seed


def shared_draws(monkeypatch, *modules, draws=None):
    """The same draws in all of these modules."""
    draws = SharedDraws() if draws is None else draws
    for module in modules:
        monkeypatch.setattr(module, "torch", draws)
    return draws
