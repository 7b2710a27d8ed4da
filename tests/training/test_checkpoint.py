"""Checkpoints: whole or not there, whatever happens while they are written; damage is seen before use."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from ferrovae.training import checkpoint
from ferrovae.training.checkpoint import Checkpoint
from ferrovae.training.errors import CheckpointError


def saved(value: float, step: int) -> Checkpoint:
    tensors = {"model": {"w": torch.full((3, 2), value)}, "optimizer": {"w/step": torch.tensor(float(step))}}
    return Checkpoint(tensors, {"step": step, "note": "x"})


def nothing(_: str) -> None:
    return None


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 12, saved(1.5, 12))
    read = checkpoint.read(tmp_path, 12)
    assert read.state["note"] == "x"
    assert set(read.tensors) == {"model", "optimizer"}
    assert torch.equal(read.tensors["model"]["w"], torch.full((3, 2), 1.5))
    assert (tmp_path / "checkpoints" / "step-00000012").is_dir()


def test_views_that_share_memory_are_kept(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    tensors = {"model": {"a": base[:3], "b": base.view(2, 3).T}}
    checkpoint.write(tmp_path, 1, Checkpoint(tensors, {"step": 1}))
    read = checkpoint.read(tmp_path, 1).tensors["model"]
    assert torch.equal(read["a"], base[:3])
    assert torch.equal(read["b"], base.view(2, 3).T)


def test_a_crash_before_the_rename_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path, 1, saved(1.0, 1))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt  # like a kill: no handler of ours runs

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(tmp_path, 2, saved(2.0, 2))
    assert list((tmp_path / "checkpoints").glob(".step-*"))  # it really was half-way
    assert checkpoint.steps(tmp_path) == [1]
    newest = checkpoint.read_newest(tmp_path, nothing)
    assert newest is not None
    assert newest.state["step"] == 1
    checkpoint.write(tmp_path, 2, saved(2.0, 2))  # the leftovers are no obstacle
    checkpoint.prune(tmp_path, keep=5)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("call", ["save_file", "_sync", "write_file"])
def test_a_full_disk_is_an_error_that_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint.write(tmp_path, 1, saved(1.0, 1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, call, full)
    with pytest.raises(CheckpointError, match=r"step-00000002: the checkpoint could not be written \(.*No space"):
        checkpoint.write(tmp_path, 2, saved(2.0, 2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert torch.equal(checkpoint.read(tmp_path, 1).tensors["model"]["w"], torch.ones(3, 2))


def damage(folder: Path, how: str) -> str:
    model = folder / "model.safetensors"
    if how == "cut":
        model.write_bytes(model.read_bytes()[:-5])
    elif how == "flipped":
        content = bytearray(model.read_bytes())
        content[-1] ^= 1
        model.write_bytes(content)
    elif how == "missing":
        model.unlink()
    elif how == "state":
        (folder / "state.json").write_text("{")
        return "state.json"
    elif how == "state gone":
        (folder / "state.json").unlink()
        return "state.json"
    elif how == "huge state":
        (folder / "state.json").write_bytes(b" " * (2 << 20))
        return "state.json"
    elif how == "bad header":
        model.write_bytes(b"\xff" * 100)
        state = json.loads((folder / "state.json").read_text())
        state["files"]["model.safetensors"] = {"bytes": 100, "sha256": checkpoint._digest(model)}
        (folder / "state.json").write_text(json.dumps(state))
    return "model.safetensors"


@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "state", "state gone", "huge state", "bad header"])
def test_damage_is_seen_named_and_skipped(tmp_path: Path, how: str) -> None:
    for step in (1, 2):
        checkpoint.write(tmp_path, step, saved(float(step), step))
    name = damage(checkpoint.directory(tmp_path, 2), how)
    with pytest.raises(CheckpointError, match=f"step-00000002/{name}: "):
        checkpoint.read(tmp_path, 2)
    heard: list[str] = []
    newest = checkpoint.read_newest(tmp_path, heard.append)
    assert newest is not None
    assert newest.state["step"] == 1
    assert len(heard) == 1
    assert "step-00000002" in heard[0]
    damage(checkpoint.directory(tmp_path, 1), how)
    with pytest.raises(CheckpointError, match="step-00000001"):
        checkpoint.read_newest(tmp_path, nothing)


def test_file_names_in_the_state_are_not_followed(tmp_path: Path) -> None:
    """Only the three known names are ever opened, whatever state.json lists."""
    checkpoint.write(tmp_path, 1, saved(1.0, 1))
    path = checkpoint.directory(tmp_path, 1) / "state.json"
    state = json.loads(path.read_text())
    state["files"]["../../../secret.safetensors"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(state))
    assert set(checkpoint.read(tmp_path, 1).tensors) == {"model", "optimizer"}


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.write(tmp_path, step, saved(0.0, step))
    checkpoint.prune(tmp_path, keep=2, also=3)
    assert checkpoint.steps(tmp_path) == [3, 5, 6]


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, saved(1.0, 1))
    checkpoint.write(tmp_path, 1, saved(2.0, 1))
    assert torch.equal(checkpoint.read(tmp_path, 1).tensors["model"]["w"], torch.full((3, 2), 2.0))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.read_newest(tmp_path, nothing) is None
