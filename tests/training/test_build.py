"""Which images train, validate and test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ferrovae.training.build import build_model, open_data, start_at_the_mean
from ferrovae.training.configuration import TrainVAE, TrainVQVAE


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


def test_a_bernoulli_decoder_starts_at_the_mean_image() -> None:
    for config in (TrainVAE(network="mlp"), TrainVAE(network="conv"), TrainVQVAE(likelihood="bernoulli")):
        dataset = open_data(config, "train")
        model = build_model(config, tuple(dataset.shape))
        start_at_the_mean(model, dataset)
        head = model.decoder.head
        mean = torch.from_numpy(dataset.data.numpy().astype(np.float64) / 255).mean(0)
        expected = mean.flatten() if isinstance(head, torch.nn.Linear) else mean.mean((1, 2))
        torch.testing.assert_close(head.bias.double().sigmoid(), expected.clamp(1e-3, 1 - 1e-3), rtol=1e-5, atol=1e-6)


def test_other_likelihoods_start_as_they_are_built() -> None:
    config = TrainVAE(likelihood="gaussian")
    dataset = open_data(config, "train")
    model = build_model(config, tuple(dataset.shape))
    before = model.decoder.head.bias.clone()
    start_at_the_mean(model, dataset)
    assert torch.equal(model.decoder.head.bias, before)
