"""A run directory: `config.json`, `metrics.jsonl`, `checkpoints/`, and what `evaluate` adds. A run back as a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ferrovae.training import checkpoint
from ferrovae.training.build import Model, build_model
from ferrovae.training.configuration import Configuration
from ferrovae.training.errors import CheckpointError, ConfigurationError
from ferrovae.training.serialization import load_configuration, to_dict


def load(
    run_dir: str | os.PathLike[str],
    *,
    step: int | None = None,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Model:
    """The trained model of a run, in eval mode: with its averaged weights, when it has any.

    Args:
        run_dir: what `ferrovae train --run-dir` was given.
        step: which checkpoint; by default the best one when `patience` was set, else the newest that is whole.
        device: where the model goes.
        say: hears of checkpoints that are skipped because they are damaged.

    Raises:
        ConfigurationError: `run_dir` is not a run, or its config.json is not valid.
        CheckpointError: there is no checkpoint, or none that is whole.
    """
    path = Path(run_dir)
    config = load_configuration(path)
    found = _find(path, config, step, say)
    model = build_model(config, tuple(found.state["data"]["shape"]))
    restore_model(model, found.tensors.get("ema", found.tensors["model"]), path)
    return model.eval().to(device)


def restore_model(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Load a checkpoint's tensors into `model`, all of them or an error that names what differs."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the checkpoint does not fit its config.json ({error})") from None


def create(run_dir: Path, config: Configuration) -> None:
    """Make the directory of a new run.

    Raises:
        ConfigurationError: there is a run already.
    """
    if (run_dir / "config.json").exists():
        raise ConfigurationError(
            f"{run_dir} already holds a run: choose another --run-dir, "
            f"or go on with it by `ferrovae train --resume {run_dir}`"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)
    checkpoint.replace_file(run_dir / "config.json", json.dumps(to_dict(config), indent=1))


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def rewind_metrics(run_dir: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again."""
    kept = [json.dumps(record) for record in read_metrics(run_dir) if record.get("step", 0) <= step]
    if (run_dir / "metrics.jsonl").exists():
        checkpoint.replace_file(run_dir / "metrics.jsonl", "\n".join(kept) if kept else "")


def _find(path: Path, config: Configuration, step: int | None, say: Callable[[str], None]) -> checkpoint.Checkpoint:
    parts = ("model", "ema")
    if step is not None:
        return checkpoint.read(path, step, parts)
    newest = checkpoint.read_newest(path, say, parts)
    if newest is None:
        raise CheckpointError(f"{path}: has no checkpoint yet")
    best = newest.state.get("best_step")
    if config.patience is None or best is None or best == newest.state["step"]:
        return newest
    try:
        return checkpoint.read(path, best, parts)
    except CheckpointError as error:
        say(f"skipping the best checkpoint: {error}")
        return newest
