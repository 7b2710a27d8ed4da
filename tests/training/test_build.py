"""Which images train, validate and test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ferrovae.training.build import open_data
from ferrovae.training.configuration import TrainVAE


@pytest.mark.parametrize("images", [2, 10, 57])
def test_a_single_file_keeps_its_last_tenth_for_the_test(images: int, tmp_path: Path) -> None:
    everything = np.arange(images * 4, dtype=np.uint8).reshape(images, 2, 2)
    np.save(tmp_path / "images.npy", everything)
    config = TrainVAE(data=str(tmp_path / "images.npy"), validation_fraction=0.0)
    train, test = open_data(config, "train"), open_data(config, "test")
    assert len(test) == max(images // 10, 1)
    joined = np.concatenate([train.data.numpy(), test.data.numpy()]).reshape(everything.shape)
    assert np.array_equal(joined, everything)


def test_a_source_with_a_test_split_keeps_it() -> None:
    config = TrainVAE(validation_fraction=0.0)
    assert (len(open_data(config, "train")), len(open_data(config, "test"))) == (1437, 360)
