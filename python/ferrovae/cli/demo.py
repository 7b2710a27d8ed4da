"""`ferrovae demo`: a VAE and a VQ-VAE on scikit-learn's handwritten digits, measured, with a report to look at."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from ferrovae.training.configuration import Configuration, TrainVAE, TrainVQVAE

_MARK = "made-by-demo"
_OURS = ("config.json", "metrics.jsonl", "checkpoints", "evaluation.json", "report.html", "vqvae", _MARK)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a VAE and a VQ-VAE on handwritten digits, estimate log p(x) of unseen ones, write a report."""

    run_dir: str = "runs/demo"
    """Where the runs are written; what an earlier demo wrote there is replaced."""
    samples: int = 2000
    """Draws of z per image in the estimate of log p(x)."""
    epochs: int = 80
    """Passes over the 1,365 training digits."""


def vae(demo: Demo) -> TrainVAE:
    """The demo's VAE: pixels drawn by their grey values, 8 latent dimensions."""
    return TrainVAE(
        run_dir=demo.run_dir,
        latent_dim=8,
        hidden=(128, 128),
        batch_size=65,
        epochs=demo.epochs,
        learning_rate=2e-3,
        final_learning_rate=2e-4,
        validate_every=5,
        checkpoint_every=10**9,
    )


def vqvae(demo: Demo) -> TrainVQVAE:
    """The demo's VQ-VAE: 4 x 4 codes of 64."""
    return TrainVQVAE(
        run_dir=str(Path(demo.run_dir) / "vqvae"),
        codebook_size=64,
        code_dim=16,
        downsample=2,
        width=32,
        batch_size=65,
        epochs=max(demo.epochs // 3, 1),
        learning_rate=2e-3,
        final_learning_rate=2e-4,
        validate_every=2,
        checkpoint_every=10**9,
    )


def main(prog: str, arguments: list[str]) -> int:
    """Train both, measure both, and say what was found."""
    demo = tyro.cli(Demo, args=arguments, prog=prog)
    run_dir = Path(demo.run_dir)
    clear(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / _MARK).touch()  # before anything else, so that a demo cut short can be run again
    from ferrovae import report
    from ferrovae.training.loop import train
    from ferrovae.training.progress import for_terminal

    start = time.perf_counter()
    configurations: list[Configuration] = [vae(demo), vqvae(demo)]
    evaluations = []
    for config in configurations:
        config.validate()
        outcome = train(config, for_terminal())
        evaluations.append(report.evaluate(outcome.run_dir, samples=demo.samples, images=None))
    written = report.write(evaluations)
    print(evaluations[0].table())
    print(f"\ntrained and measured two models in {time.perf_counter() - start:.0f} s")
    for evaluation in evaluations:
        print(f"{evaluation.title}: {evaluation.summary()}")
    print(f"look at {written}")
    return 0


def clear(run_dir: Path) -> None:
    """Remove what an earlier demo wrote, and only that.

    Raises:
        ValueError: the directory holds something that no demo made.
    """
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return
    if not (run_dir / _MARK).is_file():
        raise ValueError(f"demo: {run_dir} exists and was not made by the demo; choose another --run-dir")
    for name in _OURS:
        path = run_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
