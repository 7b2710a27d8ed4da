"""The arguments of `VectorQuantize` that cannot be, or exclude each other: every rule in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ferrovae.nn.quantizers.checks import require

_AT_LEAST_ONE = ("dim", "codebook_size", "codebook_dim", "heads", "kmeans_iters")
_NOT_NEGATIVE = (
    "commitment_weight",
    "threshold_ema_dead_code",
    "orthogonal_reg_weight",
    "codebook_diversity_loss_weight",
    "directional_reparam_variance",
)
_SHARES = ("decay", "affine_param_batch_decay", "affine_param_codebook_decay", "sync_update_v")
_POSITIVE = ("eps", "codebook_diversity_temperature", "sync_timeout")


def check_options(layer: str, given: Mapping[str, Any]) -> None:
    """`ValueError` for a value out of range, or two arguments that exclude each other.

    given: the arguments by name, those that default to others resolved.
    """
    for name in _AT_LEAST_ONE:
        require(layer, given[name] >= 1, f"{name} is {given[name]}, expected at least 1")
    for name in _NOT_NEGATIVE:
        require(layer, given[name] >= 0, f"{name} is {given[name]}, expected a number >= 0")
    for name in _SHARES:
        require(layer, 0 <= given[name] <= 1, f"{name} is {given[name]}, expected a number from 0 to 1")
    for name in _POSITIVE:
        require(layer, 0 < given[name] < math.inf, f"{name} is {given[name]}, expected a positive number")
    most = given["orthogonal_reg_max_codes"]
    require(layer, most is None or most >= 1, f"orthogonal_reg_max_codes is {most}, expected at least 1")
    for condition, complaint in _exclusions(given):
        require(layer, not condition, complaint)


def _exclusions(given: Mapping[str, Any]) -> list[tuple[bool, str]]:
    learnable, bridge = given["learnable_codebook"], given["vq_bridge"] is not None
    routes = [name for name in ("straight_through", "rotation_trick", "directional_reparam") if given[name]]
    rotates = given["rotation_trick"] and given["straight_through"]
    parameter = learnable or given["orthogonal_reg_weight"] > 0
    return [
        (rotates, "straight_through=True excludes the rotation trick: pass rotation_trick=False"),
        (len(routes) > 1, f"{' and '.join(routes)} exclude each other, expected one of them"),
        (
            given["directional_reparam"] and given["threshold_ema_dead_code"] == 0,
            "directional_reparam=True needs dead codes to be replaced: pass threshold_ema_dead_code > 0",
        ),
        (
            learnable and given["use_cosine_sim"],
            "learnable_codebook=True excludes use_cosine_sim=True",
        ),
        (learnable and given["straight_through"], "learnable_codebook=True excludes straight_through=True"),
        (learnable and given["ema_update"], "learnable_codebook=True excludes ema_update: pass ema_update=False"),
        (bridge and not learnable, "vq_bridge needs learnable_codebook=True"),
        (
            given["sync_update_v"] > 0 and not learnable,
            "sync_update_v > 0 needs learnable_codebook=True",
        ),
        (
            given["affine_param"] and given["use_cosine_sim"],
            "affine_param=True excludes use_cosine_sim=True",
        ),
        (
            given["in_place_codebook_optimizer"] is not None and not parameter,
            "in_place_codebook_optimizer needs a codebook that is a parameter: pass learnable_codebook=True and "
            "ema_update=False",
        ),
        (
            given["accept_image_fmap"] and given["accept_3d_fmap"],
            "accept_image_fmap=True excludes accept_3d_fmap=True",
        ),
    ]
