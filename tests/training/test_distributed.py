"""torchrun with two processes on gloo: the numbers of one process, the same on both ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ferrovae.training import TrainVAE, checkpoint, loop
from ferrovae.training.distributed import choose_device
from ferrovae.training.errors import ConfigurationError
from ferrovae.training.serialization import to_dict


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = TrainVAE(
        run_dir=str(tmp_path / "two"), latent_dim=2, hidden=(16,), batch_size=90, epochs=2, threads=1, log_every=5,
        device="cpu", validation_fraction=0.0341,  # 49 images: the ranks' shares differ
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("ranks.py")
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for record in [*first, *second]:
        record.pop("images_per_second", None)
    assert first == second
    loop.train(replace(config, run_dir=str(tmp_path / "one")))
    one = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["split"]) for record in one] == [
        (record["step"], record["split"]) for record in first
    ]
    for mine, theirs in zip(one, first, strict=True):
        for key in ("elbo", "reconstruction", "kl", "loss"):
            assert theirs[key] == pytest.approx(mine[key], rel=2e-5), (mine, theirs)
    step = checkpoint.steps(tmp_path / "one")[-1]
    whole, shared = (checkpoint.read(tmp_path / name, step).tensors["model"] for name in ("one", "two"))
    for name, value in whole.items():
        assert torch.allclose(value, shared[name], rtol=1e-3, atol=1e-4), name


def test_the_batch_is_shared_equally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ferrovae.training import session
    from ferrovae.training.distributed import Ranks

    config = TrainVAE(batch_size=10)
    with pytest.raises(ConfigurationError, match="batch_size is 10, expected a multiple of the 3 ranks"):
        session.Session(config, tmp_path, Ranks(0, 3, torch.device("cpu")))


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'abacus'"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="torch sees no GPU"):
            choose_device("cuda")
