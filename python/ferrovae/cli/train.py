"""`ferrovae train vae|vqvae [OPTIONS]` and `ferrovae train --resume RUN`: the configuration is the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ferrovae.training.progress import Progress, for_terminal
from ferrovae.training.serialization import KINDS

if TYPE_CHECKING:
    from ferrovae.training.loop import Outcome


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run that was stopped or killed; it ends with the numbers an uninterrupted run would have had."""

    resume: str
    """The run directory."""
    data: str | None = None
    """Where the data are, if they have moved since."""


def main(prog: str, arguments: list[str]) -> int:
    """Parse the configuration, train, and say how it ended."""
    if prog == "ferrovae train":
        resumed = tyro.cli(Resume, args=arguments, prog=prog)
        return _report(lambda progress: _resume(resumed, progress))
    config = tyro.cli(
        KINDS[prog.split()[-1]],
        args=arguments,
        prog=prog,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )
    config.validate()
    return _report(lambda progress: _train(config, progress))


def _train(config: object, progress: Progress) -> Outcome:
    from ferrovae.training.loop import train

    return train(config, progress)  # type: ignore[arg-type]


def _resume(resumed: Resume, progress: Progress) -> Outcome:
    from ferrovae.training.loop import resume

    return resume(Path(resumed.resume), data=resumed.data, progress=progress)


def _report(run: Callable[[Progress], Outcome]) -> int:
    first = os.environ.get("RANK", "0") == "0"
    outcome = run(for_terminal(speaks=first))
    if first:
        text = f"{outcome.run_dir}: trained {outcome.step} steps, {outcome.epoch} epochs"
        if outcome.validation is not None:
            found = outcome.validation
            text += f"; on held-out images the ELBO is {found['elbo']:.2f} nats (KL {found['kl']:.2f})"
        print(f"{text}\nevaluate it with: ferrovae evaluate {outcome.run_dir}")
    return 0
