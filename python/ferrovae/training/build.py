"""From a configuration to data, transforms and a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn as torch_nn

from ferrovae import data, likelihoods, models, nn
from ferrovae.training.configuration import Configuration, TrainVAE, TrainVQVAE
from ferrovae.training.errors import ConfigurationError
from ferrovae.training.keys import held_out
from ferrovae.training.quantizers import build_quantizer

Model: TypeAlias = models.VAE | models.VQVAE
Split = Literal["train", "validation", "test"]


def open_data(config: Configuration, split: Split) -> data.Dataset:
    """The images of `split`: "validation" is the end of the source's train split, which "train" then lacks.

    Which images those are depends on `validation_fraction` alone, so the curves of any two runs compare. A source
    that is a single file has no test split of its own: its last tenth is that, and is never trained on.

    Raises:
        DataError: the source is not what it should be.
        ConfigurationError: validation was asked for, but nothing is held out.
    """
    everything = data.open(config.data, split="test" if split == "test" else "train")
    if Path(config.data).is_file():
        end, tenth = len(everything), max(len(everything) // 10, 1)
        if end < 2:
            raise ConfigurationError(
                f"{config.data}: has {end} image, expected at least 2, of which one is for the test"
            )
        everything = everything.subset(end - tenth, end) if split == "test" else everything.subset(0, end - tenth)
    if split == "test":
        return everything
    if config.validation_fraction == 0:
        if split == "validation":
            raise ConfigurationError("validation_fraction is 0: this run holds no images out")
        return everything
    kept = len(everything) - held_out(len(everything), config.validation_fraction)
    if split == "train":
        return everything.subset(0, kept)
    if kept == len(everything):
        raise ConfigurationError(f"{config.data}: has {kept} training image, too few to hold one out")
    return everything.subset(kept, len(everything), split="validation")


def transform_for(config: Configuration) -> Any:
    """What the loader does to raw images so that they suit the likelihood; None: nothing, they stay integers."""
    if config.stochastic_binarization:
        return data.Binarize()
    if config.dequantize:
        return data.Dequantize()
    domain = _likelihood(config).data
    if domain == "integer":
        return None
    return data.Scale(-1.0, 1.0) if domain == "symmetric" else data.Scale()


def build_model(config: Configuration, data_shape: tuple[int, ...]) -> Model:
    """The untrained model for images of `data_shape` (C, H, W): the same weights for the same `config.seed`.

    torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _vae(config, data_shape) if isinstance(config, TrainVAE) else _vqvae(config, data_shape)


def start_at_the_mean(model: Model, dataset: data.Dataset) -> None:
    """Set the last bias of a preset decoder so that, whatever z says, p(x|z) starts near the mean of the images.

    For a Bernoulli likelihood: the log-odds of each pixel's mean (of each channel's, where the last layer is a
    convolution), as Burda et al. (2016) start theirs. Otherwise the first epochs are spent on learning the mean,
    while the KL switches latent units off for good.
    """
    head = getattr(model.decoder, "head", None)
    if not isinstance(model.likelihood_family, likelihoods.Bernoulli) or head is None or head.bias is None:
        return
    some = dataset.subset(0, min(len(dataset), 10_000))
    images = data.Loader(some, 500, shuffle=False, transform=data.Scale())
    mean = torch.stack([batch.x.double().sum(0) for batch in images]).sum(0) / len(some)
    if isinstance(head, torch_nn.Conv2d):
        mean = mean.flatten(1).mean(1)
    with torch.no_grad():
        head.bias.copy_(torch.logit(mean.flatten(), eps=1e-3))


def unit_images(images: torch.Tensor, likelihood: likelihoods.Likelihood) -> torch.Tensor:
    """Images in the likelihood's domain as float32 in [0, 1], for a person to look at."""
    images = images.detach().float().cpu()
    if likelihood.data == "symmetric":
        images = (images + 1) / 2
    elif likelihood.data == "integer":
        images = images / (getattr(likelihood, "classes", 256) - 1)
    return images.clamp(0, 1)


def _likelihood(config: Configuration) -> likelihoods.Likelihood:
    options = {"sigma": config.sigma} if config.likelihood == "gaussian" else {}
    return likelihoods.build(config.likelihood, **options)


def _vae(config: TrainVAE, data_shape: tuple[int, ...]) -> Model:
    likelihood = _likelihood(config)
    encoder: torch_nn.Module
    decoder: torch_nn.Module
    common: dict[str, Any] = {"activation": config.activation}
    if config.network == "mlp":
        encoder = nn.MLPEncoder(data_shape, config.latent_dim, hidden=config.hidden, **common)
        mirrored = tuple(reversed(config.hidden))
        decoder = nn.MLPDecoder(config.latent_dim, data_shape, hidden=mirrored, channels=likelihood.channels, **common)
    else:
        size: dict[str, Any] = {"width": config.width, "depth": config.depth}
        encoder = nn.ConvEncoder(data_shape, config.latent_dim, **size, **common)
        decoder = nn.ConvDecoder(config.latent_dim, data_shape, channels=likelihood.channels, **size, **common)
    return models.VAE(encoder, decoder, likelihood=likelihood, latent_shape=(config.latent_dim,), data_shape=data_shape)


def _vqvae(config: TrainVQVAE, data_shape: tuple[int, ...]) -> Model:
    likelihood = _likelihood(config)
    size: dict[str, Any] = {"downsample": config.downsample, "width": config.width}
    encoder = nn.ConvEncoder2d(data_shape, config.code_dim, **size)
    decoder = nn.ConvDecoder2d(config.code_dim, data_shape, channels=likelihood.channels, **size)
    quantizer = build_quantizer(config)
    return models.VQVAE(encoder, decoder, quantizer, likelihood=likelihood)
