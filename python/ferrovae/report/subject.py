"""What an evaluation and its report look at: a run's model, and the test images it is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ferrovae.data import Dataset, Loader
from ferrovae.training.build import open_data, transform_for, unit_images
from ferrovae.training.configuration import Configuration
from ferrovae.training.run import load
from ferrovae.training.serialization import load_configuration

BATCH_SIZE = 500


@dataclass(frozen=True)
class Subject:
    """A trained model in eval mode, its configuration and its test images."""

    run_dir: Path
    config: Configuration
    model: Any
    dataset: Dataset
    device: torch.device

    @classmethod
    def open(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        images: int | None = None,
        data: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Subject:
        """The run's model with the first `images` test images (all of them by default) of its own data, or `data`.

        Raises:
            ConfigurationError, CheckpointError: `run_dir` is not a whole run.
            DataError: the test images are not what they should be.
            ValueError: `images` is below 1, or the images have another shape than those trained on.
        """
        path = Path(run_dir)
        config = load_configuration(path)
        if data is not None:
            config = replace(config, data=data)
        if images is not None and images < 1:
            raise ValueError(f"evaluate: images is {images}, expected at least 1")
        model = load(path, device=device)
        dataset = open_data(config, "test")
        if images is not None and images < len(dataset):
            dataset = dataset.subset(0, images)
        expected = tuple(getattr(model.encoder, "data_shape", dataset.shape))
        if tuple(dataset.shape) != expected:
            raise ValueError(f"evaluate: {dataset.name} has images {tuple(dataset.shape)}, the run's are {expected}")
        return cls(path, config, model, dataset, torch.device(device))

    def loader(self, batch_size: int = BATCH_SIZE) -> Loader:
        """The test images in order, each drawn once and for all: the same pixels at every call."""
        transform = transform_for(self.config)
        device = None if self.device.type == "cpu" else self.device
        size = min(batch_size, len(self.dataset))
        return Loader(self.dataset, size, shuffle=False, transform=transform, fixed_epoch=0, device=device)

    def batches(self) -> Iterator[torch.Tensor]:
        """The images a batch at a time, as the model sees them."""
        for batch in self.loader():
            yield batch.x

    def images(self, indices: list[int]) -> torch.Tensor:
        """These test images, as the model sees them: the same pixels as in `batches`."""
        rows: dict[int, torch.Tensor] = {}
        for batch in self.loader():
            rows |= {index: batch.x[row] for row, index in enumerate(batch.index.tolist()) if index in indices}
        return torch.stack([rows[index] for index in indices])

    def displayable(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], from the scale the likelihood works on."""
        return unit_images(x, self.model.likelihood_family)
