"""A chain of layers around one quantizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import require


class Sequential(nn.Module):
    """Layers one after another, exactly one of them a quantizer: its first result goes on, the others come out last.

    Args:
        fns: the layers.

    Raises:
        ValueError: none or several of the layers are quantizers.
    """

    def __init__(self, *fns: nn.Module) -> None:
        super().__init__()
        kinds = _quantizer_classes()
        count = sum(isinstance(fn, kinds) for fn in fns)
        require(self, count == 1, f"{count} of {len(fns)} layers are quantizers, expected exactly one")
        self.fns = nn.ModuleList(fns)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """Returns (output of the last layer, further results of the quantizer); kwargs go to the quantizer."""
        kinds, rest = _quantizer_classes(), ()
        for fn in self.fns:
            if not isinstance(fn, kinds):
                x = fn(x)
                continue
            result = fn(x, **kwargs)
            x, *others = result if isinstance(result, tuple) else (result,)
            rest = tuple(others)
        return (x, *rest)


def _quantizer_classes() -> tuple[type[nn.Module], ...]:
    """Every layer of this room but the chain itself."""
    from ferrovae.nn import quantizers

    members = (getattr(quantizers, name) for name in quantizers.__all__)
    return tuple(
        member
        for member in members
        if isinstance(member, type) and issubclass(member, nn.Module) and member is not Sequential
    )
