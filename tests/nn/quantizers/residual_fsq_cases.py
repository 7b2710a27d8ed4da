"""Options of the residual FSQ that are held pairwise against vector-quantize-pytorch, and which exclude each other.

A level of a factor is a part of the constructor's options, but for the factors that say how the layer is called.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at
from nn.quantizers.pairwise_parity import each

DROPS = {"quantize_dropout": True}
SOFT = {"bound_hard_clamp": False}

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "levels": {
        "8 5 3": {"levels": [8, 5, 3]},
        "equal": {"levels": (5, 5, 5)},
        "two": {"levels": [2, 2]},
        "one": {"levels": [7]},
    },
    "stages": {"3": {"num_quantizers": 3}, "1": {"num_quantizers": 1}, "5": {"num_quantizers": 5}},
    "groups": {"none": {}, "one": {"groups": 1}, "two": {"groups": 2}},
    "dim": {"of the codes": {}, "given": {}},
    "channels": {"last": {}, "first": {"is_channel_first": True}},
    "maps": {"no": {}, "yes": {"accept_image_fmap": True}},
    "dropout": {
        "none": {},
        "some": DROPS,
        "cut off": {**DROPS, "quantize_dropout_cutoff_index": 1},
        "multiple": {**DROPS, "quantize_dropout_multiple_of": 2},
        "both": {**DROPS, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 3},
        "off": {"quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 2},
    },
    "clamp": {
        "hard": {},
        "none": SOFT,
        "number": {**SOFT, "soft_clamp_input_value": 1.5},
        "list": {**SOFT, "soft_clamp_input_value": [1.5, 2.0, 1.0]},
        "tensor": {**SOFT, "soft_clamp_input_value": torch.tensor([1.2, 0.8, 2.5])},
    },
    "noise": {"none": {}, "half": {"noise_dropout": 0.5}, "all": {"noise_dropout": 1.0}},
    "rotation": {"no": {}, "yes": {"orthogonal_rotation": True}},
    "books": {"one": {}, "kept": {"keep_num_codebooks_dim": True}, "not kept": {"keep_num_codebooks_dim": False}},
    "allowed": {
        "wide": {},
        "float64": {"allowed_dtypes": (torch.float64,)},
        "float32": {"allowed_dtypes": (torch.float32,)},
    },
    "quantized in": {"float32": {}, "any dtype": {"force_quantization_f32": False}},
    # Of no effect: the stages do not project.
    "stage": {"plain": {}, "scaled": {"scale": 2.0}, "unbiased": {"projection_has_bias": False}},
}
CALLS = {
    "layout": ("sequence", "image", "video", "rows"),
    "dtype": ("float32", "float64", "bfloat16", "bfloat16 input", "autocast"),
    "input": ("learnt", "fixed", "without gradients"),
    "call": ("plain", "all codes"),
    "seed": ("drawn", "given"),
}
# What the constructors of both refuse, or the calls.
REFUSED: list[Case] = [
    {"groups": "none", "maps": "yes"},
    {"maps": "yes", "layout": "rows", "channels": "last"},
    {"dtype": "bfloat16 input", "dim": "given"},
]
# Where the library raises or has no right answer to compare with, and which test has the right value.
DIFFERENT: dict[str, list[Case]] = {
    "stages dropped beside a kept axis: the library raises; `test_the_peer_cannot_drop_stages_and_keep_an_axis`": [
        *each("dropout", ("some", "cut off", "multiple", "both"), books="kept"),
    ],
    "a number that clamps half precision: the library clamps in it; `test_the_peer_clamps_in_half_precision`": [
        {"dtype": "bfloat16 input", "clamp": "number"},
        {"dtype": "autocast", "clamp": "number", "dim": "given"},
    ],
    "a rotation under autocast: the library rotates in bfloat16; "
    "`test_fsq_upstream.test_the_peer_rotates_in_half_precision_under_autocast`": [
        {"dtype": "autocast", "rotation": "yes"},
    ],
    "a rotation of what is not quantized in its dtype: the library raises; "
    "`test_fsq_upstream.test_the_peer_cannot_rotate_what_it_rounded_to_float32`": [
        {"dtype": "float64", "allowed": "float32", "quantized in": "float32", "rotation": "yes"},
    ],
}
EXCLUDED = [*REFUSED, *chain(*DIFFERENT.values())]
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
CASES, OTHERS = in_two_companies(LEVELS, EXCLUDED)
name_of = naming(LEVELS)


def options_of(case: Case) -> dict[str, Any]:
    """The constructor's options."""
    options = options_at(case, OPTIONS)
    channels = len(options["levels"])
    if case["clamp"] in ("list", "tensor"):
        options["soft_clamp_input_value"] = options["soft_clamp_input_value"][:channels]
    groups = options.get("groups", 1)
    if case["dim"] == "given":
        options["dim"] = 5 * groups
    elif "groups" in options:
        options["dim"] = channels * groups
    return options
