"""What an installed ferrovae must do, run by an interpreter that has nothing else of this repository.

`python smoke.py operations`: every operation on every backend that can run here, against the reference.
`python smoke.py all`: that, and a model trained for three steps, evaluated and loaded back.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import ferrovae as fv
from ferrovae.ops._registry import operations


def results() -> list[torch.Tensor]:
    """Every operation once, with a backward pass."""
    generator = torch.Generator().manual_seed(1)
    mean, logvar = (torch.randn(5, 3, generator=generator).requires_grad_() for _ in range(2))
    z, kl = fv.ops.reparameterize_kl(mean, logvar, seed=torch.tensor([7]))
    x = torch.rand(5, 40, generator=generator).round()
    logits = torch.randn(5, 40, generator=generator).requires_grad_()
    log_prob = fv.ops.bernoulli_log_prob(x, logits)
    (z.sum() + kl.sum() + log_prob.sum()).backward()
    indices = fv.ops.nearest_code(torch.randn(9, 4, generator=generator), torch.randn(6, 4, generator=generator))
    grads = [tensor.grad for tensor in (mean, logvar, logits) if tensor.grad is not None]
    return [z.detach(), kl.detach(), log_prob.detach(), indices, *grads]


def check_operations() -> None:
    with fv.use_backend("reference"):
        expected = results()
    for backend in ("rust", "triton"):
        reasons = {operation.obstacle(backend, "cpu") for operation in operations.values()} - {None}
        if reasons:
            print(f"{backend}: not here ({'; '.join(sorted(reasons))})")
            continue
        with fv.use_backend(backend):
            for ours, reference in zip(results(), expected, strict=True):
                torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
        print(f"{backend}: agrees with the reference")


def check_training() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "ferrovae"]
        sizes = ["--hidden", "8", "--latent-dim", "2", "--max-steps", "3"]
        subprocess.run([*command, "train", "vae", "--run-dir", str(run), *sizes], check=True)
        subprocess.run([*command, "evaluate", str(run), "--samples", "20", "--images", "5"], check=True)
        assert (run / "evaluation.json").is_file()
        assert (run / "report.html").is_file()
        assert fv.load(run).sample(2).shape == (2, 1, 8, 8)
    print("trained three steps, evaluated, loaded")


if __name__ == "__main__":
    print(f"ferrovae {fv.__version__} from {Path(fv.__file__).parent}, torch {torch.__version__}")
    check_operations()
    if sys.argv[1:] == ["all"]:
        check_training()
