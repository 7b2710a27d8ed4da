"""`ferrovae sample RUN`: images drawn from a trained model, as a PNG sheet or a .npy array."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained model."""

    run: tyro.conf.Positional[str]
    """The run directory."""
    count: int = 64
    """How many images."""
    out: str = "samples.png"
    """Where they go: .png (a sheet) or .npy (float32, [count, channels, height, width], 0 to 1)."""
    seed: int = 0
    """Decides the draws."""


def main(prog: str, arguments: list[str]) -> int:
    """Draw and write."""
    options = tyro.cli(Sample, args=arguments, prog=prog)
    out = Path(options.out)
    if out.suffix not in (".png", ".npy"):
        raise ValueError(f"sample: out is {options.out!r}, expected a name that ends in .png or .npy")
    if options.count < 1:
        raise ValueError(f"sample: count is {options.count}, expected at least 1")
    write_png = _png_writer() if out.suffix == ".png" else None
    images = draw(Path(options.run), options.count, options.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    if write_png is None:
        import numpy as np

        np.save(out, images)
    else:
        write_png(out, sheet(images))
    print(f"{out}: {options.count} images")
    return 0


def draw(run_dir: Path, count: int, seed: int) -> np.ndarray:
    """Means of p(x|z) for z drawn from the prior: float32 [count, C, H, W] in [0, 1]."""
    import torch

    from ferrovae.training.build import unit_images
    from ferrovae.training.run import load

    model = load(run_dir)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        images = model.likelihood(model.prior.sample((count,))).mean
    return unit_images(images, model.likelihood_family).numpy()


def sheet(images: np.ndarray) -> np.ndarray:
    """[N, C, H, W] as one picture [rows (H + 1) + 1, columns (W + 1) + 1, 3], nearly square, on white."""
    import numpy as np

    count, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    picture = np.ones((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), np.float32)
    for position, image in enumerate(images):
        top, left = 1 + position // columns * (height + 1), 1 + position % columns * (width + 1)
        shown = image[:3] if channels >= 3 else np.repeat(image[:1], 3, axis=0)
        picture[top : top + height, left : left + width] = np.clip(shown.transpose(1, 2, 0), 0, 1)
    return picture


def _png_writer() -> Callable[[Path, np.ndarray], None]:
    try:
        from matplotlib.image import imsave
    except ImportError:
        raise ImportError(
            "sample: a .png needs matplotlib, which is not installed (pip install 'ferrovae[plot]'); or write .npy"
        ) from None
    return lambda path, picture: imsave(path, picture)
