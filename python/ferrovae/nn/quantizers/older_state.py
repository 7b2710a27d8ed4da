"""Checkpoints of older versions of vector-quantize-pytorch, brought to the names and shapes of 1.32 as they load.

Versions are told apart by their keys. What would take a guess stays as it is, and `load_state_dict` names its keys.
K codes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def give_codebook_its_own(state: State, prefix: str) -> None:
    """Up to 0.3.0 a VectorQuantize had no `_codebook`: codes and sums (D, K) and counts (K) were the layer's.

    `initted` came with 0.3; before, there was no k-means to wait for.
    """
    required = {"embed", "embed_avg", "cluster_size"}
    old = {name: state[prefix + name] for name in (*required, "initted") if prefix + name in state}
    if not required <= old.keys() or old["embed"].ndim != 2:
        return
    for name, value in old.items():
        del state[prefix + name]
        state[f"{prefix}_codebook.{name}"] = value.mT if value.ndim == 2 else value
    state.setdefault(f"{prefix}_codebook.initted", torch.ones(1))


def add_axis_of_heads(state: State, prefix: str) -> None:
    """Up to 0.8 the tensors of a codebook had no such axis: (K, D) and (K)."""
    for name, axes in (("embed", 2), ("embed_avg", 2), ("cluster_size", 1)):
        value = state.get(prefix + name)
        if value is not None and value.ndim == axes:
            state[prefix + name] = value[None]


def complaints_about_cosines(state: State, prefix: str) -> list[str]:
    """Why the codebook of a cosine layer up to 1.2 cannot be loaded: it has codes of any length and no sums.

    It compared their directions and gave out the codes themselves; today's have length 1.
    """
    initted = state.get(f"{prefix}initted")
    older = (
        f"{prefix}embed" in state and f"{prefix}embed_avg" not in state and initted is not None and initted.ndim == 1
    )
    if not older:
        return []
    return [
        f"{prefix}embed is without embed_avg, from a version of vector-quantize-pytorch whose cosine codes have any "
        "length, expected codes of length 1 and embed_avg"
    ]


def rename(state: State, prefix: str, names: Mapping[str, str]) -> None:
    """Keys that begin with an older name get that of today, unless that is there too."""
    for old, new in names.items():
        for key in [key for key in state if key == prefix + old or key.startswith(f"{prefix}{old}.")]:
            today = prefix + new + key.removeprefix(prefix + old)
            if today not in state:
                state[today] = state.pop(key)


def drop_constants(state: State, prefix: str, constants: Mapping[str, Callable[[], Tensor]]) -> list[str]:
    """Take out what follows from the constructor's arguments; complaints about what disagrees with them."""
    complaints = []
    for name, constant in constants.items():
        found = state.pop(prefix + name, None)
        if found is None or found.is_meta:
            continue
        expected = constant()
        if found.shape != expected.shape or not torch.allclose(found.to(expected), expected):
            complaints.append(f"{prefix}{name} is not that of the layer's arguments")
    return complaints
