"""The quantizer of a configuration."""

from __future__ import annotations

from typing import Any

from torch import nn as torch_nn

from ferrovae import nn
from ferrovae.training.configuration import TrainVQVAE
from ferrovae.training.errors import ConfigurationError


def build_quantizer(config: TrainVQVAE) -> torch_nn.Module:
    """A layer from vectors of `config.code_dim` channels to codes.

    Raises:
        ConfigurationError: the peer library was asked for and is not installed.
    """
    size: dict[str, Any] = {"dim": config.code_dim, "codebook_size": config.codebook_size}
    learned: dict[str, Any] = {
        "decay": config.codebook_decay,
        "commitment_weight": config.commitment_weight,
        "threshold_ema_dead_code": config.dead_code_threshold,
        "kmeans_init": True,
        "rotation_trick": config.rotation_trick,
    }
    match config.quantizer:
        case "residual-vq":
            return nn.ResidualVQ(num_quantizers=config.num_quantizers, **size, **learned)
        case "fsq":
            return nn.FSQ(list(config.levels), dim=config.code_dim)
        case "lfq":
            return nn.LFQ(commitment_loss_weight=config.commitment_weight, **size)
        case "sim-vq":
            return nn.SimVQ(rotation_trick=config.rotation_trick, commitment_weight=config.commitment_weight, **size)
        case "vector-quantize-pytorch":
            return _peer()(**size, **learned)
        case _:
            return nn.VectorQuantize(**size, **learned)


def _peer() -> Any:
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError as error:
        raise ConfigurationError(
            "quantizer is 'vector-quantize-pytorch', which is not installed: pip install 'ferrovae[bench]'"
        ) from error
    return VectorQuantize
