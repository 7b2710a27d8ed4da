"""Options of `SimVQ` that are held pairwise against vector-quantize-pytorch, alone and as stages of `ResidualSimVQ`."""

from __future__ import annotations

from typing import Any

from torch import nn

DIM = 8


def network(width):
    return nn.Sequential(nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, DIM))


def all_codes_meet(width):
    """A map that looks at more than one code."""
    return nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, DIM))


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "codes": {"24": {"codebook_size": 24}, "1": {"codebook_size": 1}, "70": {"codebook_size": 70}},
    "frozen": {"as the input": {}, "less": {"frozen_codebook_dim": 5}, "more": {"frozen_codebook_dim": 11}},
    "map": {
        "linear": {},
        "with bias": {"codebook_transform": lambda width: nn.Linear(width, DIM)},
        "network": {"codebook_transform": network},
        "of all codes": {"codebook_transform": all_codes_meet},
        "fixed": {"codebook_transform": lambda width: nn.Linear(width, DIM).requires_grad_(False)},
    },
    "start": {
        "normal": {},
        "apart": {"init_fn": lambda codes: codes + 0.5 * codes.sign()},
        "double": {"init_fn": lambda codes: codes * 2},
    },
    "gradient": {"rotated": {}, "straight": {"rotation_trick": False}},
    "to the input": {
        "quarter": {},
        "none": {"input_to_quantize_commit_loss_weight": 0.0},
        "more": {"input_to_quantize_commit_loss_weight": 1.5},
    },
    "commitment": {"one": {}, "none": {"commitment_weight": 0.0}, "more": {"commitment_weight": 3.0}},
    "channels": {"last": {}, "first": {"channel_first": True}},
}


def moments_kept(layer, codes_of):
    """What a function gives, with the state of the layer left as it was."""
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    codes = codes_of()
    layer.load_state_dict(state)
    return codes
