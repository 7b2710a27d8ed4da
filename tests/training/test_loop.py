"""The loop on real digits: it learns, resumes to the same bits, and ends cleanly whatever happens."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ferrovae
from ferrovae.cli import main
from ferrovae.training import TrainVAE, TrainVQVAE, checkpoint, loop
from ferrovae.training.build import build_model, open_data, start_at_the_mean
from ferrovae.training.errors import CheckpointError, ConfigurationError, Interrupted, NonFiniteError
from ferrovae.training.progress import Silent
from ferrovae.training.run import load, read_metrics

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(run_dir: Path, **changes) -> TrainVAE:
    options = {
        "run_dir": str(run_dir), "latent_dim": 2, "hidden": (16,), "batch_size": 91, "epochs": 3, "threads": 1,
        "ema_decay": 0.9, "log_every": 5, "device": "cpu", "final_learning_rate": 1e-4, "kl_warmup_epochs": 1.0,
    }  # fmt: skip
    return TrainVAE(**{**options, **changes})


def final_bits(run_dir: Path) -> dict[str, bytes]:
    """Every tensor file of the last checkpoint, as bytes."""
    folder = checkpoint.directory(run_dir, checkpoint.steps(run_dir)[-1])
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def curves(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in read_metrics(run_dir)]


def test_training_raises_the_elbo_and_leaves_a_whole_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = loop.train(tiny(run_dir, epochs=12, learning_rate=5e-3, hidden=(32,)))
    assert outcome.step == 12 * 15  # (1437 - 72) // 91
    records = read_metrics(run_dir)
    validation = [record for record in records if record["split"] == "validation"]
    assert len(validation) == 12
    elbos = [record["elbo"] for record in validation]
    assert elbos == sorted(elbos)  # at every validation, though the start at the mean image leaves less to gain
    assert elbos[-1] > elbos[0] + 1.5
    for record in records:
        assert record["elbo"] == pytest.approx(record["reconstruction"] - record["kl"], rel=1e-5)
    assert validation[-1]["loss"] == pytest.approx(-validation[-1]["elbo"], rel=1e-5)
    assert outcome.validation == validation[-1]
    assert checkpoint.steps(run_dir) == [150, 165, 180]
    model = ferrovae.load(run_dir)
    assert not model.training
    saved = checkpoint.read(run_dir, 180)
    assert all(torch.equal(value, saved.tensors["ema"][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, saved.tensors["model"][name]) for name, value in model.state_dict().items())


def test_vqvae_trains_and_loads(tmp_path: Path) -> None:
    config = TrainVQVAE(
        run_dir=str(tmp_path / "run"), codebook_size=16, code_dim=4, downsample=2, width=8, batch_size=91, epochs=3,
        threads=1, device="cpu",
    )  # fmt: skip
    outcome = loop.train(config)
    assert outcome.validation is not None
    assert 1 <= outcome.validation["perplexity"] <= 16
    assert outcome.validation["kl"] == pytest.approx(16 * np.log(16), rel=1e-5)  # a 4 x 4 grid under a uniform prior
    model = load(tmp_path / "run")
    assert model.prior.sample((2,)).shape == (2, 4, 4)


def test_kill_9_and_resume_give_the_same_bits(tmp_path: Path) -> None:
    config = tiny(tmp_path / "whole", epochs=20, checkpoint_every=7)
    options = (
        "--latent-dim 2 --hidden 16 --batch-size 91 --epochs 20 --threads 1 --ema-decay 0.9 --log-every 5 --device cpu "
        "--final-learning-rate 1e-4 --kl-warmup-epochs 1 --checkpoint-every 7"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "ferrovae", "train", "vae", *options.split(), "--run-dir", str(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    target = random.randrange(10, 200)
    deadline = time.monotonic() + 300  # a busy machine needs a while to import torch
    while process.poll() is None and (checkpoint.steps(killed) or [0])[-1] < target and time.monotonic() < deadline:
        time.sleep(random.random() / 100)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    stopped = checkpoint.steps(killed)[-1]
    assert 7 <= stopped < 300

    outcome = loop.resume(killed)
    assert outcome.step == 300
    loop.train(config)
    assert final_bits(killed) == final_bits(tmp_path / "whole")
    assert curves(killed)[-1] == curves(tmp_path / "whole")[-1]
    steps = [(record["step"], record["split"]) for record in read_metrics(killed)]
    assert len(steps) == len(set(steps))


class InterruptAt(Silent):
    """Presses Ctrl-C when the training log reaches a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def metrics(self, record) -> None:
        if record["step"] == self.step and record["split"] == "train":
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("step", [10, 15, 20])  # within an epoch, at its end, within the next
def test_ctrl_c_saves_at_the_step_boundary(tmp_path: Path, step: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=rf"after step {step} of 45.*ferrovae train --resume .*/cut"):
        loop.train(tiny(tmp_path / "cut"), InterruptAt(step))
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.steps(tmp_path / "cut")[-1] == step
    loop.resume(tmp_path / "cut")
    loop.train(tiny(tmp_path / "whole"))
    assert final_bits(tmp_path / "cut") == final_bits(tmp_path / "whole")
    whole = [record for record in curves(tmp_path / "whole") if record["split"] == "validation"]
    assert [record for record in curves(tmp_path / "cut") if record["split"] == "validation"] == whole


def test_ctrl_c_exits_with_130(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ferrovae.cli.train.for_terminal", lambda speaks: InterruptAt(50))
    assert main(["train", "vae", "--run-dir", str(tmp_path / "run"), "--threads", "1", "--device", "cpu"]) == 130
    assert "go on with: ferrovae train --resume" in capsys.readouterr().err


def test_resume_uses_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        loop.train(tiny(tmp_path / "cut"), InterruptAt(20))
    newest = checkpoint.directory(tmp_path / "cut", 20) / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    heard: list[str] = []

    class Listener(Silent):
        def say(self, text: str) -> None:
            heard.append(text)

    loop.resume(tmp_path / "cut", progress=Listener())
    assert any("step-00000020/optimizer.safetensors" in text for text in heard)
    loop.train(tiny(tmp_path / "whole"))
    assert final_bits(tmp_path / "cut") == final_bits(tmp_path / "whole")


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = loop.train(tiny(tmp_path / "run", epochs=1))
    bits, lines = final_bits(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert loop.resume(tmp_path / "run") == first
    assert final_bits(tmp_path / "run") == bits
    assert read_metrics(tmp_path / "run") == lines


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    loop.train(tiny(tmp_path / "run", max_steps=1, kl_warmup_epochs=0.0))
    with pytest.raises(ConfigurationError, match="already holds a run: choose another --run-dir"):
        loop.train(tiny(tmp_path / "run"))


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    class Second(Silent):
        def metrics(self, record) -> None:
            if record["step"] == 20:
                done = subprocess.run(
                    [sys.executable, "-m", "ferrovae", "train", "--resume", str(run_dir)],
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
                refused.append((done.returncode, done.stderr))

    refused: list = []
    loop.train(tiny(run_dir), Second())
    loop.train(tiny(tmp_path / "alone"))
    code, message = refused[0]
    assert code == 2
    assert f"is being trained by process {os.getpid()}: wait for it" in " ".join(message.split())
    assert curves(run_dir) == curves(tmp_path / "alone")
    assert loop.resume(run_dir).step == 45


def test_other_data_are_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (64, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "one.npy", images)
    np.save(tmp_path / "other.npy", images[::-1])
    config = tiny(tmp_path / "run", data=str(tmp_path / "one.npy"), batch_size=20, epochs=4, log_every=1)
    with pytest.raises(Interrupted):
        loop.train(config, InterruptAt(2))
    with pytest.raises(CheckpointError, match="was trained on other data"):
        loop.resume(tmp_path / "run", data=str(tmp_path / "other.npy"))


def test_a_diverged_loss_stops_with_step_examples_and_last_good_checkpoint(tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    options = "--learning-rate 1e30 --hidden 16 --latent-dim 2 --checkpoint-every 1 --log-every 7 --device cpu"
    assert main(["train", "vae", *options.split(), "--run-dir", str(run_dir)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("ferrovae: step 2: ")
    assert str(checkpoint.directory(run_dir, 1)) in message
    assert checkpoint.steps(run_dir) == [1]
    saved = checkpoint.read(run_dir, 1)
    assert all(tensor.isfinite().all() for tensor in saved.tensors["model"].values())


def test_the_first_bad_step_is_named_though_it_is_seen_later(tmp_path: Path, monkeypatch) -> None:
    """Two of the examples of step 8 get an infinite ELBO; the check comes at step 10."""
    from ferrovae.models import VAE

    original, calls, seen = VAE.objective, [0], {}

    def objective(self, x, **options):
        result = original(self, x, **options)
        if self.training:
            calls[0] += 1
            if calls[0] == 8:
                seen["indices"] = options["example_ids"][[3, 5]].tolist()
                result.elbo.elbo[[3, 5]] = -float("inf")
                return result._replace(loss=result.loss + float("inf"))
        return result

    monkeypatch.setattr(VAE, "objective", objective)
    with pytest.raises(NonFiniteError) as caught:
        loop.train(tiny(tmp_path / "run"))
    message = str(caught.value)
    assert message.startswith("step 8: the loss is inf")
    assert f"2 of 91 examples, with the indices {seen['indices'][0]}, {seen['indices'][1]};" in message
    assert message.endswith("the last good checkpoint does not exist: none was written")


def test_nan_in_the_data_is_reported_with_its_index(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((40, 1, 4, 4), dtype=np.float32)
    images[17, 0, 2, 2] = np.nan
    np.save(tmp_path / "images.npy", images)
    config = tiny(
        tmp_path / "run",
        data=str(tmp_path / "images.npy"),
        likelihood="gaussian",
        batch_size=10,
        validation_fraction=0.0,
    )
    with pytest.raises(ferrovae.data.DataError, match=r"images\.npy: example 17 holds a NaN"):
        loop.train(config)


def test_early_stopping_keeps_the_best(tmp_path: Path, monkeypatch) -> None:
    elbos = iter([-5.0, -3.0, -4.0, -3.5, -1.0])
    monkeypatch.setattr(loop, "validate", lambda *_: {"elbo": next(elbos), "reconstruction": 0.0, "kl": 0.0})
    outcome = loop.train(tiny(tmp_path / "run", epochs=9, patience=2, keep_checkpoints=1))
    assert (outcome.epoch, outcome.best_step) == (4, 30)
    assert checkpoint.steps(tmp_path / "run") == [30, 60]
    best = checkpoint.read(tmp_path / "run", 30).tensors["ema"]
    assert all(torch.equal(value, best[name]) for name, value in load(tmp_path / "run").state_dict().items())
    assert loop.resume(tmp_path / "run").step == 60


def test_the_validation_images_are_the_last_and_never_trained_on() -> None:
    config = TrainVAE()
    everything = ferrovae.data.open("digits")[:]
    train, validation = open_data(config, "train")[:], open_data(config, "validation")[:]
    assert torch.equal(torch.cat([train, validation]), everything)
    assert len(validation) == 72
    assert len(open_data(config, "test")) == 360
    with pytest.raises(ConfigurationError, match="validation_fraction is 0"):
        open_data(replace(config, validation_fraction=0.0), "validation")


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    """With gradients of norm <= 1e-12, far below Adam's epsilon of 1e-8, weights hardly move."""
    loop.train(tiny(tmp_path / "free", epochs=1))
    loop.train(tiny(tmp_path / "tight", epochs=1, clip_norm=1e-12))
    start = checkpoint.read(tmp_path / "free", 15).tensors["model"]
    moved = []
    config = tiny(tmp_path)
    model = build_model(config, (1, 8, 8))
    start_at_the_mean(model, open_data(config, "train"))
    initial = model.state_dict()
    for name in ("free", "tight"):
        end = checkpoint.read(tmp_path / name, 15).tensors["model"]
        moved.append(max(float((end[key] - initial[key]).abs().max()) for key in start))
    assert moved[0] > 1e-3
    assert moved[1] < 1e-5


def test_bf16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    outcome = loop.train(tiny(tmp_path / "run", precision="bf16", epochs=6, learning_rate=5e-3))
    saved = checkpoint.read(tmp_path / "run", outcome.step).tensors["model"]
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    validation = [record["elbo"] for record in read_metrics(tmp_path / "run") if record["split"] == "validation"]
    assert validation[-1] > validation[0]


def test_sample_writes_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.train(tiny(tmp_path / "run", max_steps=2, kl_warmup_epochs=0.0))
    for name in ("a.npy", "b.npy"):
        assert main(["sample", str(tmp_path / "run"), "--count", "5", "--out", str(tmp_path / name)]) == 0
    images = np.load(tmp_path / "a.npy")
    assert images.shape == (5, 1, 8, 8)
    assert images.dtype == np.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert np.array_equal(images, np.load(tmp_path / "b.npy"))
    pytest.importorskip("matplotlib")
    assert main(["sample", str(tmp_path / "run"), "--count", "5", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_directory_holds_what_is_promised(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    loop.train(replace(tiny(run_dir, epochs=1)))
    config = json.loads((run_dir / "config.json").read_text())
    assert config["model"] == "vae"
    assert config["hidden"] == [16]
    folder = checkpoint.directory(run_dir, 15)
    names = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert os.listdir(run_dir / "checkpoints") == [folder.name]
