"""`ferrovae evaluate RUN`: the evidence table on stdout, `evaluation.json` and `report.html` in the run."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ferrovae.training.serialization import load_configuration


@dataclass(frozen=True)
class Evaluate:
    """Estimate log p(x) of test images, write evaluation.json and report.html into the run."""

    run: tyro.conf.Positional[str]
    """The run directory."""
    samples: int = 5000
    """Draws of z per image."""
    images: int = 500
    """How many test images, the first ones."""
    seed: int = 0
    """Decides the draws."""
    data: str | None = None
    """Where the data are, if they have moved since the training."""
    json: bool = False
    """Print the means as JSON instead of the table."""


def main(prog: str, arguments: list[str]) -> int:
    """Evaluate, print, and write the report."""
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    options = tyro.cli(Evaluate, args=arguments, prog=prog, config=config)
    for name in ("samples", "images"):
        if getattr(options, name) < 1:
            raise ValueError(f"evaluate: {name} is {getattr(options, name)}, expected at least 1")
    run_dir = Path(options.run)
    load_configuration(run_dir)  # a wrong directory is told before torch is imported
    from ferrovae import report

    evaluation = report.evaluate(
        run_dir, samples=options.samples, images=options.images, seed=options.seed, data=options.data
    )
    written = report.write(evaluation)
    print(json.dumps(evaluation.to_dict()) if options.json else evaluation.table())
    print(f"report: {written}", file=sys.stderr)
    return 0
