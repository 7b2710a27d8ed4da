"""Options of `LFQ` that are held pairwise against vector-quantize-pytorch, and which exclude each other.

A level of a factor is a part of the constructor's options, but for the factors that say how the layer is called.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn

from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at

DIM = 10

PROJECTED = {"has_projections": True}
# A function makes its value anew for each layer.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "codes": {"16": {"codebook_size": 16}, "2": {"codebook_size": 2}, "32": {"codebook_size": 32}, "512": {}},
    "books": {"one": {}, "kept": {"keep_num_codebooks_dim": True}, "two": {"num_codebooks": 2}},
    "dim": {"given": {"dim": DIM}, "of the codes": {}, "alone": {}},
    "projections": {
        "where needed": {},
        "always": PROJECTED,
        "never": {"has_projections": False},
        "unbiased": {**PROJECTED, "projection_has_bias": False},
        "cosine": {**PROJECTED, "cosine_sim_project_in": True},
        "cosine, scaled": {**PROJECTED, "cosine_sim_project_in": True, "cosine_sim_project_in_scale": 3.0},
    },
    "scale": {"1": {}, "0.5": {"codebook_scale": 0.5}, "2": {"codebook_scale": 2.0}},
    "clamp": {"none": {}, "soft": {"soft_clamp_input_value": 2.5}},
    "sphere": {"no": {}, "yes": {"spherical": True}},
    "rotation": {"no": {}, "yes": {"orthogonal_rotation": True}},
    "activation": {
        "none": {},
        "tanh": {"straight_through_activation": nn.Tanh},
        "learnt": {"straight_through_activation": nn.PReLU},
    },
    "entropies": {"tenth": {}, "none": {"entropy_loss_weight": 0.0}, "whole": {"entropy_loss_weight": 1.0}},
    "commitment": {"none": {}, "quarter": {"commitment_loss_weight": 0.25}},
    "diversity": {"one": {}, "none": {"diversity_gamma": 0.0}, "more": {"diversity_gamma": 2.5}},
    "softplus": {
        "no": {},
        "yes": {"experimental_softplus_entropy_loss": True},
        "offset": {"experimental_softplus_entropy_loss": True, "entropy_loss_offset": 1.0},
    },
    "share": {"all": {}, "half": {"frac_per_sample_entropy": 0.5}, "some": {"frac_per_sample_entropy": 0.3}},
    "quantized in": {"float32": {}, "any dtype": {"force_quantization_f32": False}},
}
CALLS = {
    "layout": (
        "sequence",
        "image",
        "video",
        "rows",
        "sequence, channels last",
        "image, channels last",
        "sequence, channels first",
        "image, channels first",
        "rows, channels first",
    ),
    "mask": ("none", "of positions", "as the indices"),
    "dtype": ("float32", "float64", "bfloat16"),
    "temperature": ("default", "0.5", "learnt"),
    "breakdown": ("yes", "no"),
    "input": ("learnt", "fixed"),
}
# What the constructors of both refuse, and what no layer can do.
REFUSED: list[Case] = [
    {"projections": "never", "dim": "given"},
    {"projections": "never", "dim": "alone", "books": "two"},
    # Its weight meets float32.
    {"activation": "learnt", "dtype": "bfloat16"},
    {"activation": "learnt", "dtype": "float64", "quantized in": "float32"},
]
# Where the library raises or has no right answer to compare with, and which test has the right value.
DIFFERENT: dict[str, list[Case]] = {
    "bfloat16 throughout: the library's entropies are bfloat16, ours float32; `test_lfq.test_precision`": [
        {"dtype": "bfloat16", "quantized in": "any dtype"},
    ],
    "bfloat16 on a sphere: the library rounds the direction to bfloat16; `test_a_bfloat16_direction_is_not_rounded`": [
        {"dtype": "bfloat16", "sphere": "yes"},
    ],
}
EXCLUDED = [*REFUSED, *chain(*DIFFERENT.values())]
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
name_of = naming(LEVELS)
CASES, OTHERS = in_two_companies(LEVELS, EXCLUDED)


def options_of(case: Case) -> dict[str, Any]:
    """The constructor's options, new ones at each call."""
    options = options_at(case, OPTIONS)
    bits = {"16": 4, "2": 1, "32": 5, "512": 9}[case["codes"]]
    if case["dim"] == "alone":  # the codes are then 2^dim
        options |= {"codebook_size": None, "dim": bits}
    else:
        options["codebook_size"] = 2**bits
    if "channels" in case["layout"]:
        options["channel_first"] = case["layout"].endswith("first")
    return options
