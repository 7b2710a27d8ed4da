"""What the steps since the last check gave: their means for the log, and which step was the first to be not finite.

Nothing is read from the device at a step; a check reads all at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ferrovae.training.distributed import Ranks
from ferrovae.training.errors import NonFiniteError

_NEVER = 2**62


@dataclass
class Watch:
    """The record of the steps since the last check."""

    ranks: Ranks
    _steps: list[int] = field(default_factory=list)
    _losses: list[torch.Tensor] = field(default_factory=list)
    _elbos: list[Any] = field(default_factory=list)
    _extras: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _indices: list[torch.Tensor] = field(default_factory=list)

    def record(self, step: int, index: torch.Tensor, objective: Any) -> None:
        """Remember an `Objective` and the dataset indices of its examples."""
        self._steps.append(step)
        self._losses.append(objective.loss.detach())
        self._elbos.append(objective.elbo)
        self._extras.append(objective.extra)
        self._indices.append(index.clone())  # keeping the batch's own would keep its memory from the loader

    def check(self) -> dict[str, float]:
        """The means over the recorded steps and all ranks, which are then forgotten; {} when there are none.

        Raises:
            NonFiniteError: a loss was not finite. All ranks raise, with the same message.
        """
        if not self._steps:
            return {}
        losses = torch.stack(self._losses).double()
        self._raise_if_not_finite(losses.isfinite().cpu())
        names = ("elbo", "reconstruction", "kl")
        sums = [
            losses.mean(),
            *(torch.cat([getattr(elbo, name) for elbo in self._elbos]).double().mean() for name in names),
        ]
        extras = [name for name, value in self._extras[0].items() if _is_scalar(value)]
        sums += [torch.stack([torch.as_tensor(e[name]).double() for e in self._extras]).mean() for name in extras]
        device = losses.device
        means = self.ranks.sum(torch.stack([value.to(device) for value in sums])) / self.ranks.world_size
        self._forget()
        return dict(zip(("loss", *names, *extras), means.tolist(), strict=True))

    def _raise_if_not_finite(self, finite: torch.Tensor) -> None:
        bad = (~finite).nonzero()
        first = self._steps[int(bad[0])] if len(bad) else _NEVER
        # The smallest step over the ranks, by sums: a rank that found none says "never".
        firsts = self.ranks.gather(first) if self.ranks.sum(torch.tensor([float(len(bad))])).item() > 0 else [_NEVER]
        step = min(int(str(value)) for value in firsts)
        if step == _NEVER:
            return
        position = self._steps.index(step)
        elbo = self._elbos[position].elbo.cpu()
        mine = self._indices[position].cpu()[~elbo.isfinite()].tolist()
        loss = float(self._losses[position])
        found = self.ranks.gather((loss, len(elbo), mine))
        losses = [entry[0] for entry in found]  # type: ignore[index]
        examples = [index for entry in found for index in entry[2]]  # type: ignore[index]
        total = sum(entry[1] for entry in found)  # type: ignore[index]
        worst = next((value for value in losses if value != value or abs(value) == float("inf")), float("nan"))
        self._forget()
        raise NonFiniteError(f"step {step}: the loss is {worst}; {_describe(examples, total)}")

    def _forget(self) -> None:
        for record in (self._steps, self._losses, self._elbos, self._extras, self._indices):
            record.clear()


def _is_scalar(value: object) -> bool:
    return isinstance(value, float | int) or (isinstance(value, torch.Tensor) and value.ndim == 0)


def _describe(examples: list[int], total: int) -> str:
    if not examples:
        return "every example's ELBO is finite, so it comes from another term of the loss"
    shown = ", ".join(map(str, examples[:20])) + (f" and {len(examples) - 20} more" if len(examples) > 20 else "")
    return f"its ELBO is not finite for {len(examples)} of {total} examples, with the indices {shown}"
