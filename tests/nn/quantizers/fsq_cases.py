"""Options of `FSQ` that are held pairwise against vector-quantize-pytorch, and which exclude each other.

A level of a factor is a part of the constructor's options, but for the factors that say how the layer is called.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at
from nn.quantizers.pairwise_parity import each

DIM = 7

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "levels": {
        "8 5 4": {"levels": [8, 5, 4]},
        "odd": {"levels": (5, 3, 7)},
        "equal": {"levels": [6, 6, 6]},
        "many": {"levels": [16, 11]},
        "one": {"levels": [9]},
        "two": {"levels": [2, 3, 2]},
    },
    "dim": {"of the codes": {}, "given": {"dim": DIM}},
    "books": {
        "one": {},
        "kept": {"keep_num_codebooks_dim": True},
        "not kept": {"keep_num_codebooks_dim": False},
        "two": {"num_codebooks": 2},
        "three, kept": {"num_codebooks": 3, "keep_num_codebooks_dim": True},
    },
    "scale": {"none": {}, "2": {"scale": 2.0}},
    "allowed": {
        "wide": {},
        "float64": {"allowed_dtypes": (torch.float64,)},
        "float32": {"allowed_dtypes": (torch.float32,)},
        "all": {"allowed_dtypes": (torch.bfloat16, torch.float32, torch.float64)},
    },
    "channels": {"default": {}, "last": {"channel_first": False}, "first": {"channel_first": True}},
    "bias": {"yes": {}, "no": {"projection_has_bias": False}},
    "indices": {"yes": {}, "no": {"return_indices": False}},
    "quantized in": {"float32": {}, "any dtype": {"force_quantization_f32": False}},
    "symmetric": {"no": {}, "yes": {"preserve_symmetry": True}},
    "noise": {
        "none": {},
        "half": {"noise_dropout": 0.5},
        "all": {"noise_dropout": 1.0},
        "some": {"noise_dropout": 0.2},
    },
    "bound": {"tanh": {}, "clamp": {"bound_hard_clamp": True}},
    "rotation": {"no": {}, "yes": {"orthogonal_rotation": True}},
}
CALLS = {
    "layout": ("sequence", "image", "video", "rows"),
    "dtype": ("float32", "float64", "bfloat16", "autocast"),
    "input": ("learnt", "fixed"),
}
# What the constructors of both refuse.
REFUSED: list[Case] = [
    {"levels": "two", "symmetric": "no"},
    *each("noise", ("half", "all", "some"), symmetric="no"),
]
# Where the library raises or has no right answer to compare with, and which test has the right value.
DIFFERENT: dict[str, list[Case]] = {
    "a rotation of half precision: the library raises, or rotates the codes in bfloat16; "
    "`test_the_peer_fails_in_half_precision`, `test_the_peer_rotates_in_half_precision_under_autocast`": [
        *each("dtype", ("bfloat16", "autocast"), rotation="yes"),
    ],
    "a rotation of what is not quantized in its dtype: the library raises; "
    "`test_the_peer_cannot_rotate_what_it_rounded_to_float32`": [
        {"dtype": "float64", "allowed": "float32", "quantized in": "float32", "rotation": "yes"},
    ],
}
EXCLUDED = [*REFUSED, *chain(*DIFFERENT.values())]
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
CASES, OTHERS = in_two_companies(LEVELS, EXCLUDED)
name_of = naming(LEVELS)


def options_of(case: Case) -> dict[str, Any]:
    """The constructor's options."""
    return options_at(case, OPTIONS)
