"""Checkpoints on disk: written beside their place, fsynced, renamed; safetensors and JSON, never pickle.

A checkpoint is `checkpoints/step-00001234/` with `model.safetensors`, `ema.safetensors` (when weights are averaged),
`optimizer.safetensors` and `state.json`, which holds the size and SHA-256 of the others: whatever was cut short or
damaged is seen before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ferrovae.training.errors import CheckpointError, ConfigurationError
from ferrovae.training.serialization import read_json

Tensors = dict[str, torch.Tensor]
PARTS = ("model", "ema", "optimizer")
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named tensors by part ("model", "ema", "optimizer"), and the state."""

    tensors: dict[str, Tensors]
    state: dict[str, Any]


def directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first. Half-written ones never carry the name, so are not among them."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def write(run_dir: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint of `step`: all of it, or nothing that `steps` would list.

    Raises:
        CheckpointError: it could not be written (a full disk, say); earlier checkpoints are untouched.
    """
    final = directory(run_dir, step)
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        files = {}
        for part, tensors in checkpoint.tensors.items():
            path = partial / f"{part}.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        write_file(partial / "state.json", json.dumps({**checkpoint.state, "files": files}, indent=1))
        _sync(partial)
        if final.exists():  # damaged, or of a run that was resumed from an earlier one: what is new is right
            stale = final.with_name(f".{final.name}.stale")
            _remove(stale)
            final.rename(stale)
            partial.rename(final)
            _remove(stale)
        else:
            partial.rename(final)
        _sync(final.parent)
    except Exception as error:  # safetensors raises its own type for a failed write
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final}: the checkpoint could not be written ({error})") from error
    return final


def read(run_dir: Path, step: int, parts: tuple[str, ...] = PARTS) -> Checkpoint:
    """The checkpoint of `step`, verified; of the tensors only the `parts` it has among those asked for.

    Raises:
        CheckpointError: something is missing, cut short or damaged; names the file.
    """
    folder = directory(run_dir, step)
    try:
        state = read_json(folder / "state.json")
    except (ConfigurationError, OSError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: cannot be read ({error})") from None
    files = state.get("files")
    if not isinstance(files, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{folder / 'state.json'}: has no step or list of files, expected both")
    tensors = {}
    for part in parts:
        path = folder / f"{part}.safetensors"
        if path.name not in files:
            continue
        expected = files[path.name]
        try:
            size = path.stat().st_size
            if not isinstance(expected, dict) or size != expected.get("bytes"):
                wanted = expected.get("bytes") if isinstance(expected, dict) else expected
                raise CheckpointError(f"{path}: has {size} bytes, expected {wanted}")
            if _digest(path) != expected.get("sha256"):
                raise CheckpointError(f"{path}: is damaged (its SHA-256 is not the one in state.json)")
            tensors[part] = load_file(path)
        except CheckpointError:
            raise
        except Exception as error:  # OSError, or safetensors' own type for a bad header
            raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return Checkpoint(tensors, state)


def read_newest(run_dir: Path, say: Callable[[str], None], parts: tuple[str, ...] = PARTS) -> Checkpoint | None:
    """The newest checkpoint that is whole; `say` hears of each one skipped. None: there are none at all.

    Raises:
        CheckpointError: there are checkpoints, but none that is whole; names a file of the oldest.
    """
    failure: CheckpointError | None = None
    for step in reversed(steps(run_dir)):
        try:
            return read(run_dir, step, parts)
        except CheckpointError as error:
            failure = error
            say(f"skipping a checkpoint: {error}")
    if failure is not None:
        raise failure
    return None


def prune(run_dir: Path, keep: int, also: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and that of step `also`, and what a killed run left half-written."""
    for step in steps(run_dir)[:-keep]:
        if step != also:
            shutil.rmtree(directory(run_dir, step), ignore_errors=True)
    for path in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file and have it on the disk before returning."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a text file beside `path`, then rename: a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    write_file(partial, text)
    partial.rename(path)
    _sync(path.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
