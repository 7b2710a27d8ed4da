"""The rows that our `LFQ` layers draw for their entropies, handed to those of vector-quantize-pytorch."""

from __future__ import annotations

import torch

from ferrovae.nn.quantizers import lfq


class DrawnRows:
    """What ours draws, layer after layer; the library's layers of `follow` then take the same.

    It also frees the library of its floor under the logarithm: probabilities under 1e-5 count as they are.
    """

    def __init__(self, monkeypatch, module):
        self.drawn, self.turn, draw = [], 0, lfq.random_share
        self._monkeypatch, self._module = monkeypatch, module

        def recorded(rows, *arguments):
            chosen = draw(rows, *arguments)
            self.drawn.append(chosen if rows is None else chosen[rows])
            return chosen

        monkeypatch.setattr(lfq, "random_share", recorded)
        monkeypatch.setattr(module, "log", lambda t: t.clamp(min=torch.finfo(t.dtype).tiny).log())

    def follow(self, peer):
        """To be called with a finished layer: its constructor may draw weights."""
        draws = self

        class Torch:
            """The library's torch."""

            randn = staticmethod(self._ranks)

            def __getattr__(self, name):
                return getattr(torch, name)

        def takes(number):
            def hook(*_):
                draws.turn = number

            return hook

        layers = [layer for layer in peer.modules() if isinstance(layer, self._module.LFQ)]
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(takes(number))
        self._monkeypatch.setattr(self._module, "torch", Torch())

    def _ranks(self, number):
        """Numbers in whose argsort a small value stands at each chosen row."""
        chosen = self.drawn[self.turn]
        if len(chosen) != number:  # a call whose loss is not looked at
            return torch.zeros(number)
        places = torch.empty(number)
        places[chosen] = torch.arange(int(chosen.sum()), dtype=torch.float32)
        places[~chosen] = torch.arange(int(chosen.sum()), number, dtype=torch.float32)
        return places.argsort().float()
