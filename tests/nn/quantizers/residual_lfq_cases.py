"""Options of `ResidualLFQ` and its groups that are held pairwise against vector-quantize-pytorch.

A level of a factor is a part of the constructor's options, but for the factors that say how the layer is called.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from nn.quantizers import lfq_cases
from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at
from nn.quantizers.pairwise_parity import each

BATCH, PROJECTED_DIM = 3, 10
GRIDS = {"sequence": (12,), "image": (3, 4), "video": (2, 2, 3), "rows": ()}
BITS = {"16": 4, "2": 1, "32": 5, "512": 9}
DROPS = {"quantize_dropout": True}

OF_A_STAGE = (
    "clamp",
    "sphere",
    "rotation",
    "activation",
    "entropies",
    "commitment",
    "diversity",
    "softplus",
    "share",
    "quantized in",
)
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "codes": {codes: {"codebook_size": int(codes)} for codes in BITS},
    "groups": {"none": {}, "two": {"groups": 2}, "one": {"groups": 1}},
    "stages": {"three": {"num_quantizers": 3}, "one": {"num_quantizers": 1}, "four": {"num_quantizers": 4}},
    "dim": {"of the codes": {}, "projected": {}},
    "books": {"one": {}, "kept": {"keep_num_codebooks_dim": True}, "given": {"num_codebooks": 1}},
    # A stage has no projection that these could be about.
    "projections": {
        "where needed": {},
        "never": {"has_projections": False},
        "unbiased": {"projection_has_bias": False},
        "cosine": {"cosine_sim_project_in": True, "cosine_sim_project_in_scale": 3.0},
    },
    "dropout": {
        "none": {},
        "some": DROPS,
        "cut off": {**DROPS, "quantize_dropout_cutoff_index": 1},
        "multiple": {**DROPS, "quantize_dropout_multiple_of": 2},
        "cut off, multiple": {**DROPS, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 3},
    },
    **{factor: lfq_cases.OPTIONS[factor] for factor in OF_A_STAGE},
}
CALLS = {
    "layout": (
        "sequence",
        "image",
        "video",
        "rows",
        "image, channels last",
        "sequence, channels first",
        "image, channels first",
    ),
    "mask": ("none", "of positions", "as the indices"),
    "dtype": ("float32", "float64", "bfloat16"),
    "seed": ("drawn", "given"),
    "returned": ("codes", "no codes"),
    "input": ("learnt", "fixed", "without gradients"),
    "library": ("in sequences", "as laid out"),  # how it is asked
}
# What the constructors of both refuse, and what no layer can do.
REFUSED: list[Case] = [
    # Its weight meets float32.
    {"activation": "learnt", "dtype": "bfloat16"},
    {"activation": "learnt", "dtype": "float64", "quantized in": "float32"},
    # Such a map says by `accept_image_fmap` where its channels are.
    *each("layout", ("image, channels first",), groups="two"),
    *each("layout", ("image, channels first",), groups="one"),
]
# Where the library raises: projections and dropout of layouts other than sequences, and layouts that no stage takes.
IN_SEQUENCES: list[Case] = [
    *each("layout", ("sequence", "rows", "image, channels last"), library="as laid out"),
    *each("groups", ("two", "one"), layout="sequence, channels first", library="as laid out"),
    *each("dropout", tuple(OPTIONS["dropout"])[1:], library="as laid out"),
    {"dim": "projected", "library": "as laid out"},
]
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
CASES, OTHERS = in_two_companies(LEVELS, [*REFUSED, *IN_SEQUENCES])
name_of = naming(LEVELS)


def channels_first(case: Case) -> bool:
    """By default where there are four axes or more, else as asked for."""
    return case["layout"] in ("image", "video") or case["layout"].endswith("first")


def options_of(case: Case, layout: bool = True) -> dict[str, Any]:
    """The constructor's options, new ones at each call; without those of the layout, for sequences."""
    options = options_at(case, OPTIONS)
    groups = options.get("groups", 1)
    options["dim"] = groups * (PROJECTED_DIM if case["dim"] == "projected" else BITS[case["codes"]])
    if layout and "groups" in options and case["layout"] in ("image", "video"):
        options["accept_image_fmap"] = True
    elif layout and "channels" in case["layout"]:
        options["channel_first"] = channels_first(case)
    return options
