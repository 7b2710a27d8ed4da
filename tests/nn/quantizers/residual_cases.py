"""Options of the residual stacks that are held pairwise against vector-quantize-pytorch, and which exclude each other.

A level of a factor is a part of the constructor's options, but for the factors that say how the layer is called.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from nn.quantizers.pairwise import Case, in_two_companies, naming, options_at
from nn.quantizers.pairwise_parity import COMMITMENT, DEAD, GRADIENT, METRIC, REGULARIZER, START, STRAIGHT, each

DIM, SIZE, STAGES, BATCH, LENGTH = 12, 8, 3, 2, 15
TEMPERATURE = 0.7

LEARNT = {"learnable_codebook": True, "ema_update": False}

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "codes": {
        "ema": {},
        "slow": {"decay": 0.5, "eps": 1e-3},
        "implicit": {"implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 9, "depth": 2}},
        "learnt": LEARNT,
        "sync": {**LEARNT, "sync_update_v": 0.3},
        "in place": {**LEARNT, "in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1)},
        "diveq": {"diveq": True},
        "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1e-9},
        "affine": {"affine_param": True},
        "manual": {"manual_ema_update": True},
        "fixed": {"ema_update": False},
    },
    "groups": {"none": {}, "two": {"groups": 2}},
    "sizes": {"one": {"codebook_size": SIZE}, "several": {"num_quantizers": None, "codebook_size": (8, 12, 10)}},
    "shared": {"no": {}, "yes": {"shared_codebook": True}},
    "channels": {"same": {}, "projected": {"codebook_dim": 5}},
    "metric": METRIC,
    "gradient": {**GRADIENT, "to earlier stages": {"quant_grad_frac": 0.25}},
    "commitment": COMMITMENT,
    "regularizer": REGULARIZER,
    "draws": {
        "nearest": {},
        "stochastic": {"stochastic_sample_codes": True},
        "soft": {"straight_through": True, **STRAIGHT},
    },
    "dropout": {
        "none": {},
        "some": {"quantize_dropout": True},
        "cut off, multiple": {
            "quantize_dropout": True,
            "quantize_dropout_cutoff_index": 1,
            "quantize_dropout_multiple_of": 2,
        },
    },
    "start": START,
    "dead": DEAD,
    "beam": {
        "none": {},
        "two": {"beam_size": 2},
        "weighted": {"beam_size": 3, "eval_beam_size": 2, "beam_score_quantizer_weights": [1.0, 0.5, 2.0]},
    },
}
CALLS = {
    "mask": ("none", "zeros", "as it came"),
    "layout": ("tokens", "single", "image"),
    "input": ("learnt", "fixed"),
    "call": ("plain", "all codes", "frozen", "temperature"),
}
# Codes that a gradient reaches.
LEARNT_CODES = ("implicit", "learnt", "sync", "in place", "diveq", "directional")
BEAMS = ("two", "weighted")


# What the constructors of both refuse, and what has no meaning.
REFUSED = [
    {"sizes": "several", "shared": "yes"},
    {"draws": "soft", "gradient": "rotated"},
    {"draws": "soft", "gradient": "to earlier stages"},
    *each("codes", LEARNT_CODES, metric="cosine"),
    *each("codes", LEARNT_CODES, draws="soft"),
    {"codes": "affine", "metric": "cosine"},
    {"codes": "directional", "gradient": "rotated"},  # the default is then not to rotate
    {"codes": "in place", "beam": "two"},
    {"codes": "in place", "beam": "weighted"},
    {"commitment": "cross-entropy", "beam": "two"},
    {"commitment": "cross-entropy", "beam": "weighted"},
    *each("mask", ("zeros", "as it came"), layout="single"),
    {"codes": "diveq", "commitment": "quarter"},  # it has no commitment loss
    {"codes": "diveq", "commitment": "cross-entropy"},
    {"codes": "directional", "commitment": "quarter"},
    {"codes": "directional", "commitment": "cross-entropy"},
]
# Where the library raises or has no right answer to compare with, and which test has the right value.
DIFFERENT: dict[str, list[Case]] = {
    "a beam without a commitment loss: upstream raises; `test_beams_without_a_commitment_loss`": [
        *each("beam", BEAMS, commitment="none"),
        *each("beam", BEAMS, codes="diveq"),
        *each("beam", BEAMS, codes="directional"),
    ],
    "a beam and networks that make codes: upstream raises; `test_a_beam_with_one_sample_at_a_time`": [
        *each("beam", BEAMS, codes="implicit"),
    ],
    "a beam and k-means, affine moments or diversity: upstream takes samples for codebooks; "
    "`test_a_beam_takes_all_its_sequences_for_rows`": [
        *each("beam", BEAMS, start="k-means"),
        *each("beam", BEAMS, codes="affine"),
        *each("beam", BEAMS, regularizer="diversity"),
    ],
    "a beam with soft gradients: upstream raises; `test_a_beam_with_soft_gradients`": [
        *each("beam", BEAMS, draws="soft"),
    ],
    "drawn beams: their draws cannot be handed over; `test_a_beam_of_cold_draws`": [
        *each("beam", BEAMS, draws="stochastic"),
    ],
    "affine moments of a frozen codebook, and dead codes: they stand still, and become the rows looked up; "
    "`test_vector_quantize_defects`": [
        {"codes": "affine", "call": "frozen"},
        {"codes": "affine", "dead": "replaced"},
    ],
    "a shared codebook with an optimizer: upstream takes no step; `test_a_shared_codebook_steps_in_place`": [
        {"codes": "in place", "shared": "yes"},
    ],
    "dead codes of a codebook with an optimizer: they stay the rows that they became, upstream moves them on; "
    "`test_dead_codes_come_after_the_step_in_place`": [
        {"codes": "in place", "dead": "replaced"},
    ],
    "losses of all learnt codes: upstream takes them, or their gradients, after dead codes are replaced; "
    "`test_orthogonality_is_of_the_codes_looked_up`, `test_gradients_are_those_at_the_codes_looked_up`": [
        {"codes": codes, "dead": "replaced", **late}
        for codes in LEARNT_CODES
        for late in (
            {"regularizer": "diversity"},
            {"regularizer": "orthogonal"},
            {"regularizer": "orthogonal active"},
            {"commitment": "cross-entropy"},
        )
    ],
}
# Where upstream has to be asked without padding, whose noise is then other rows' noise.
NOISE_OF_OTHERS = [
    {"mask": mask, **noisy, **counted}
    for mask in ("zeros", "as it came")
    for noisy in ({"draws": "stochastic"}, {"codes": "diveq"}, {"codes": "directional"})
    for counted in (
        {"metric": "cosine"},
        {"regularizer": "diversity"},
        {"regularizer": "orthogonal active"},
        {"commitment": "cross-entropy"},
    )
]
EXCLUDED = [*REFUSED, *chain(*DIFFERENT.values()), *NOISE_OF_OTHERS]
LEVELS = {name: tuple(levels) for name, levels in chain(OPTIONS.items(), CALLS.items())}
name_of = naming(LEVELS)
CASES, OTHERS = in_two_companies(LEVELS, EXCLUDED)


def options_of(case: Case) -> dict[str, Any]:
    """The constructor's options."""
    options = {"dim": DIM, "num_quantizers": STAGES} | options_at(case, OPTIONS)
    options["return_zeros_for_masked_padding"] = case["mask"] != "as it came"
    return options


class Differences:
    """Which cases are compared in another way, because the library's value is wrong there.

    Besides, `test_residual_vq_pairwise` asks it so that: image maps are tokens, as it raises on them; a frozen
    codebook that is shared does not move; a shared one replaces dead codes once a step; DiVeQ adds no noise and affine
    moments stand still in eval mode; codes of affine codebooks are compared with what they add up to; every stage of a
    beam learns from its own residuals, where the library takes the wrong axis and moves the first stage's only.
    """

    @staticmethod
    def padding(case: Case) -> bool:
        """The library counts padding, or compares codes with rows that are not normalized."""
        return case["mask"] != "none" and (
            case["metric"] == "cosine"
            or case["regularizer"] in ("diversity", "orthogonal active")
            or case["commitment"] == "cross-entropy"
        )

    @staticmethod
    def moved(case: Case) -> bool:
        """Values are wanted of the codes as looked up, and the library takes them after the codes moved."""
        moves = case["codes"] in ("ema", "slow", "affine") or (case["codes"] == "manual" and case["shared"] == "yes")
        moves = moves or (case["dead"] == "replaced" and case["codes"] not in LEARNT_CODES)
        moves = moves and case["beam"] == "none"
        late = case["regularizer"] != "none" or case["commitment"] == "cross-entropy" or case["draws"] == "soft"
        return moves and (late or case["call"] == "all codes")

    @staticmethod
    def decoded_late(case: Case) -> bool:
        """The library gives the codes after the step, not those that were used."""
        return Differences.moved(case) or case["beam"] != "none" or case["dead"] == "replaced"

    @staticmethod
    def single(case: Case) -> bool:
        """The library raises at rows (B, D), and is asked with sequences of one token."""
        return case["layout"] == "single" and (case["codes"] == "implicit" or case["commitment"] == "cross-entropy")
