"""What the options of a residual stack mean for its stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ferrovae.nn.quantizers.checks import require

_OWN = ("dim", "codebook_size", "codebook_dim", "accept_image_fmap")


def stage_options(given: Mapping[str, Any], *, shared: bool, implicit: bool, diveq: bool) -> dict[str, Any]:
    """The options of every stage's `VectorQuantize`: those given, and those that follow from the stack's.

    `ValueError` where they exclude each other.
    """
    for name in _OWN:
        require("ResidualVQ", name not in given, f"{name} is the stack's, it is no option of a stage")
    options = dict(given)
    if implicit or diveq:
        require("ResidualVQ", not given.get("ema_update"), "ema_update=True excludes codes that are learnt")
        options |= {"learnable_codebook": True, "ema_update": False}
    if shared:
        options |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
    if diveq:
        options |= {"route_gradients_to_input": False, "commitment_weight": 0.0}
    return options
