"""Options of `VectorQuantize` that are held pairwise against vector-quantize-pytorch, and which exclude each other.

A level of a factor is a part of the constructor's options, but for the factors that say how the layer is called.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from nn.quantizers.pairwise import Case, naming, pairwise_cases
from nn.quantizers.pairwise_parity import COMMITMENT, DEAD, GRADIENT, METRIC, REGULARIZER, START, STRAIGHT, each

DIM, SIZE, BATCH, LENGTH, HIDDEN, NEAREST = 12, 8, 2, 15, 4, 3
TEMPERATURE = 0.7

LEARNT = {"learnable_codebook": True, "ema_update": False}


def _descent(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=2.0)


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "codes": {
        "ema": {},
        "slow": {"decay": 0.5, "eps": 1e-3},
        "learnt": LEARNT,
        "sync": {**LEARNT, "sync_update_v": 0.3},
        "in place": {**LEARNT, "in_place_codebook_optimizer": _descent},
        "in place by hand": {
            **LEARNT,
            "in_place_codebook_optimizer": _descent,
            "manual_in_place_optimizer_update": True,
        },
        "directional": {
            "directional_reparam": True,
            "directional_reparam_variance": 0.02,
            "threshold_ema_dead_code": 1e-9,
        },
        "affine": {"affine_param": True},
        "affine learnt": {
            **LEARNT,
            "affine_param": True,
            "affine_param_batch_decay": 0.9,
            "affine_param_codebook_decay": 0.5,
        },
        "bridge": {"vq_bridge": "linear"},
        "manual": {"manual_ema_update": True},
        "fixed": {"ema_update": False},
    },
    "heads": {"one": {}, "shared": {"heads": 2}, "separate": {"heads": 2, "separate_codebook_per_head": True}},
    "channels": {
        "same": {},
        "projected": {"codebook_dim": 5},
        "layernorm": {"codebook_dim": 5, "layernorm_after_project_in": True},
    },
    "metric": METRIC,
    "gradient": GRADIENT,
    "commitment": COMMITMENT,
    "regularizer": {**REGULARIZER, "orthogonal some": {"orthogonal_reg_weight": 0.5, "orthogonal_reg_max_codes": 5}},
    "draws": {
        "nearest": {},
        "stochastic": {"stochastic_sample_codes": True},
        "cold": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.1},
        "soft": {"straight_through": True, **STRAIGHT},
    },
    "start": START,
    "dead": DEAD,
    "ranks": {"default": {}, "alone": {"sync_codebook": False, "sync_kmeans": False}},
}
CALLS = {
    "mask": ("none", "zeros", "as it came", "lengths"),
    "layout": ("tokens", "single", "channel first", "image", "volume"),
    "input": ("learnt", "fixed"),
    "call": (
        "breakdown",
        "plain",
        "frozen",
        "frozen layer",
        "thawed",
        "temperature",
        "indices",
        "topk",
        "ema off",
        "ema on",
        "weight",
        "weight function",
        "accumulate",
        "transform",
    ),
}
LEARNT_CODES = ("learnt", "sync", "in place", "in place by hand", "directional", "affine learnt", "bridge")
IN_PLACE = ("in place", "in place by hand")
AFFINE = ("affine", "affine learnt")
MASKS = ("zeros", "as it came", "lengths")
MAPS = ("image", "volume")
ORTHOGONAL = ("orthogonal", "orthogonal active", "orthogonal some")
DRAWN = ("stochastic", "cold")


# What the constructors or calls of both refuse, and what has no meaning.
REFUSED = [
    {"draws": "soft", "gradient": "rotated"},
    *each("codes", LEARNT_CODES, metric="cosine"),
    *each("codes", LEARNT_CODES, draws="soft"),
    {"codes": "affine", "metric": "cosine"},
    {"codes": "directional", "gradient": "rotated"},  # the default is then not to rotate
    *each("commitment", ("quarter", "cross-entropy"), codes="directional"),  # it has no commitment loss
    *each("mask", MASKS, layout="single"),
    *each("mask", ("lengths",), layout="image"),
    *each("mask", ("lengths",), layout="volume"),
    *each("heads", ("shared", "separate"), call="topk"),
    {"commitment": "cross-entropy", "call": "topk"},
    *each("codes", IN_PLACE, call="topk"),
    {"heads": "shared", "call": "transform"},
]
LATE = (
    {"commitment": "cross-entropy"},
    {"draws": "soft"},
)
# Where the library raises or has no right answer to compare with, and which test has the right value.
DIFFERENT: dict[str, list[Case]] = {
    "diversity of separate codebooks: upstream averages code k of one with code k of another; "
    "`test_diversity_of_separate_codebooks_is_each_ones_own`": [
        {"regularizer": "diversity", "heads": "separate"},
    ],
    "active codes of separate codebooks: upstream raises; `test_active_codes_of_separate_codebooks`": [
        {"regularizer": "orthogonal active", "heads": "separate"},
    ],
    "lengths with channels first: upstream makes the mask as long as the channels; "
    "`test_lengths_count_tokens_in_every_layout`": [
        {"mask": "lengths", "layout": "channel first"},
    ],
    "affine moments of a frozen codebook, and dead codes: they stand still, and become the rows looked up; "
    "`test_affine_statistics_stand_still_in_eval_mode_and_when_frozen`, "
    "`test_affine_codes_that_die_become_rows_of_the_batch`": [
        *each("codes", AFFINE, call="frozen"),
        *each("codes", AFFINE, call="frozen layer"),
        *each("codes", AFFINE, dead="replaced"),
    ],
    "k results with soft gradients: upstream raises; `test_soft_gradients_of_the_nearest_codes`": [
        {"call": "topk", "draws": "soft"},
    ],
    "k results for padding with a loss of all rows: upstream counts padding; "
    "`test_padding_takes_no_part_in_any_loss`": [
        {"call": "topk", "mask": mask, "regularizer": regularizer}
        for mask in MASKS
        for regularizer in ("diversity", "orthogonal active")
    ],
    # Orthogonality is of the codes after the step, the others are of the codes looked up; upstream has but one.
    "gradients of codes looked up beside orthogonality: upstream takes them after the step; "
    "`test_gradients_are_those_of_the_codebook_before_its_step`": [
        {"regularizer": regularizer, **late, **moves}
        for regularizer in ORTHOGONAL
        for late in LATE
        for moves in (
            *each("codes", ("ema", "slow", "affine")),
            {"dead": "replaced"},
            {"call": "ema on"},
        )
    ]
    + [{"regularizer": regularizer, "codes": "bridge", "dead": "replaced"} for regularizer in ORTHOGONAL]
    + [{"regularizer": regularizer, "codes": "bridge", "call": "ema on"} for regularizer in ORTHOGONAL],
}
EXCLUDED = [*REFUSED, *chain(*DIFFERENT.values())]
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
name_of = naming(LEVELS)
CASES = pairwise_cases(LEVELS, EXCLUDED)


def options_of(case: Case) -> dict[str, Any]:
    """The constructor's options; a bridge is made anew, from torch's generator."""
    options: dict[str, Any] = {"dim": DIM, "codebook_size": SIZE}
    for factor, levels in OPTIONS.items():
        options |= levels[case[factor]]
    options.setdefault("codebook_dim", DIM // options.get("heads", 1))
    if "vq_bridge" in options:
        options["vq_bridge"] = torch.nn.Linear(options["codebook_dim"], options["codebook_dim"])
    options |= {
        "single": {},
        "tokens": {},
        "channel first": {"channel_last": False},
        "image": {"accept_image_fmap": True},
        "volume": {"accept_3d_fmap": True},
    }[case["layout"]]
    options["return_zeros_for_masked_padding"] = case["mask"] != "as it came"
    options["freeze_codebook"] = case["call"] in ("frozen layer", "thawed")
    return options


class Differences:
    """Which cases are compared in another way, because the library's value is wrong there.

    Besides, `test_vector_quantize_pairwise` asks it so that: masked maps are tokens, as it raises on them; affine
    moments stand still in eval mode; what it returns for given indices is put together and projected.
    """

    @staticmethod
    def padding(case: Case) -> bool:
        """The library counts padding, or compares codes with rows that are not projected, split or normalized."""
        return (
            case["mask"] != "none"
            and case["call"] != "topk"
            and (
                case["metric"] == "cosine"
                or case["heads"] != "one"
                or case["channels"] != "same"
                or case["regularizer"] in ("diversity", "orthogonal active")
                or case["call"] == "indices"
            )
        )

    @staticmethod
    def moved(case: Case) -> bool:
        """Gradients are wanted at the codes as looked up, and the library takes them after the codes moved."""
        moves = case["codes"] in ("ema", "slow", "affine") or case["dead"] == "replaced" or case["call"] == "ema on"
        late = any(part.items() <= case.items() for part in LATE)
        late = late or case["regularizer"] == "diversity" or case["call"] == "indices" or case["codes"] == "bridge"
        # An optimizer in place makes both look up again, after all steps.
        return moves and late and case["codes"] not in IN_PLACE

    @staticmethod
    def single(case: Case) -> bool:
        """The library raises at rows (B, D), and is asked with sequences of one token."""
        return case["layout"] == "single" and (
            case["commitment"] == "cross-entropy" or case["call"] in ("transform", "indices")
        )
