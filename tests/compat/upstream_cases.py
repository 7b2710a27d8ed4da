"""Classes of vector-quantize-pytorch and the options they are made with: every option of each at least once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

SGD = partial(torch.optim.SGD, lr=0.1)
VQ = {"dim": 8, "codebook_size": 16}
RVQ = {"dim": 8, "codebook_size": 16, "num_quantizers": 3}
RFSQ = {"levels": [5, 5, 3], "num_quantizers": 3}
RLFQ = {"dim": 8, "codebook_size": 16, "num_quantizers": 3}
SIM = {"dim": 8, "codebook_size": 16}
HVQ = {"dim": 8, "codebook_size": 16, "scales": (1, 2, 4)}
LATENT = {"levels": [5, 5, 8], "dim": 9}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("VectorQuantize", VQ),
    ("VectorQuantize", {**VQ, "codebook_dim": 4, "layernorm_after_project_in": True, "decay": 0.95, "eps": 1e-3}),
    ("VectorQuantize", {**VQ, "heads": 2, "separate_codebook_per_head": True, "codebook_dim": 4}),
    ("VectorQuantize", {**VQ, "kmeans_init": True, "kmeans_iters": 3, "threshold_ema_dead_code": 2}),
    ("VectorQuantize", {**VQ, "use_cosine_sim": True, "freeze_codebook": True, "channel_last": False}),
    ("VectorQuantize", {**VQ, "accept_image_fmap": True, "commitment_weight": 0.25}),
    ("VectorQuantize", {**VQ, "accept_3d_fmap": True, "eps": 1e-4}),
    ("VectorQuantize", {**VQ, "commitment_use_cross_entropy_loss": True}),
    ("VectorQuantize", {**VQ, "orthogonal_reg_weight": 0.1, "orthogonal_reg_active_codes_only": True}),
    ("VectorQuantize", {**VQ, "orthogonal_reg_weight": 0.1, "orthogonal_reg_max_codes": 8, "ema_update": False}),
    ("VectorQuantize", {**VQ, "codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 10.0}),
    ("VectorQuantize", {**VQ, "stochastic_sample_codes": True, "sample_codebook_temp": 0.5}),
    ("VectorQuantize", {**VQ, "straight_through": True, "rotation_trick": False}),
    ("VectorQuantize", {**VQ, "directional_reparam": True, "threshold_ema_dead_code": 2}),
    ("VectorQuantize", {**VQ, "learnable_codebook": True, "ema_update": False, "sync_update_v": 0.5}),
    ("VectorQuantize", {**VQ, "learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": SGD}),
    ("VectorQuantize", {**VQ, "vq_bridge": nn.Linear(8, 8)}),
    ("VectorQuantize", {**VQ, "manual_ema_update": True, "return_zeros_for_masked_padding": False}),
    ("VectorQuantize", {**VQ, "affine_param": True, "affine_param_batch_decay": 0.9, "sync_affine_param": True}),
    ("VectorQuantize", {**VQ, "affine_param": True, "affine_param_codebook_decay": 0.8}),
    ("VectorQuantize", {**VQ, "route_gradients_to_input": False}),
    ("ResidualVQ", RVQ),
    ("ResidualVQ", {"dim": 8, "codebook_size": (16, 8, 4)}),
    ("ResidualVQ", {**RVQ, "codebook_dim": 4, "shared_codebook": True, "decay": 0.9, "kmeans_init": True}),
    ("ResidualVQ", {**RVQ, "diveq": True, "use_cosine_sim": False}),
    ("ResidualVQ", {**RVQ, "quantize_dropout": True, "quantize_dropout_cutoff_index": 1}),
    ("ResidualVQ", {**RVQ, "quantize_dropout": True, "quantize_dropout_multiple_of": 2, "accept_image_fmap": True}),
    ("ResidualVQ", {**RVQ, "implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 12, "depth": 2}}),
    ("ResidualVQ", {**RVQ, "beam_size": 2, "eval_beam_size": 3, "beam_score_quantizer_weights": [1.0, 0.5, 0.25]}),
    ("ResidualVQ", {**RVQ, "quant_grad_frac": 0.5, "return_zeros_for_masked_padding": False}),
    ("ResidualVQ", {**RVQ, "stochastic_sample_codes": True, "threshold_ema_dead_code": 2, "use_cosine_sim": True}),
    (
        "ResidualVQ",
        {**RVQ, "learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": SGD},
    ),
    ("GroupedResidualVQ", {**RVQ, "groups": 2}),
    ("GroupedResidualVQ", {**RVQ, "groups": 2, "accept_image_fmap": True, "shared_codebook": True}),
    ("GroupedResidualVQ", {**RVQ, "groups": 2, "quantize_dropout": True, "codebook_dim": 2}),
    ("RandomProjectionQuantizer", {**VQ, "codebook_dim": 4}),
    ("RandomProjectionQuantizer", {**VQ, "codebook_dim": 4, "num_codebooks": 3, "norm": False, "decay": 0.9}),
    ("FSQ", {"levels": [5, 5, 3]}),
    ("FSQ", {"levels": (5, 4), "dim": 8, "projection_has_bias": False, "channel_first": True}),
    ("FSQ", {"levels": [5, 4], "num_codebooks": 2, "dim": 8, "return_indices": False}),
    ("FSQ", {"levels": [5, 4], "preserve_symmetry": True, "noise_dropout": 0.5, "bound_hard_clamp": True}),
    ("FSQ", {"levels": [5, 5], "orthogonal_rotation": True, "force_quantization_f32": False, "scale": 2.0}),
    ("FSQ", {"levels": [5, 5], "keep_num_codebooks_dim": True, "allowed_dtypes": (torch.float32,)}),
    ("ResidualFSQ", RFSQ),
    ("ResidualFSQ", {**RFSQ, "dim": 8, "is_channel_first": True, "quantize_dropout": True}),
    ("ResidualFSQ", {**RFSQ, "bound_hard_clamp": False, "soft_clamp_input_value": 2.0}),
    ("ResidualFSQ", {**RFSQ, "bound_hard_clamp": False}),
    ("ResidualFSQ", {**RFSQ, "noise_dropout": 0.5, "quantize_dropout_multiple_of": 2}),
    ("GroupedResidualFSQ", {**RFSQ, "dim": 8, "groups": 2}),
    ("GroupedResidualFSQ", {**RFSQ, "dim": 6, "groups": 2, "accept_image_fmap": True}),
    ("FSP", {"levels": [5, 5, 3]}),
    ("FSP", {"levels": [5, 5], "dim": 8, "projection_has_bias": False, "channel_first": True, "quantize_rate": 0.5}),
    ("FSP", {"levels": [5, 5], "act_name": "sigmoid", "need_inv_act": True, "vector_norm": "kurt"}),
    ("FSP", {"levels": [5, 5], "vector_norm": "none"}),
    ("LFQ", {"codebook_size": 16}),
    ("LFQ", {"dim": 8, "codebook_size": 16, "projection_has_bias": False, "entropy_loss_weight": 0.2}),
    ("LFQ", {"dim": 8, "codebook_size": 16, "cosine_sim_project_in": True, "cosine_sim_project_in_scale": 2.0}),
    ("LFQ", {"codebook_size": 16, "num_codebooks": 2, "spherical": True, "diversity_gamma": 2.0}),
    ("LFQ", {"codebook_size": 16, "straight_through_activation": nn.Tanh(), "commitment_loss_weight": 0.25}),
    ("LFQ", {"codebook_size": 16, "soft_clamp_input_value": 3.0, "codebook_scale": 2.0, "channel_first": True}),
    ("LFQ", {"codebook_size": 16, "experimental_softplus_entropy_loss": True, "entropy_loss_offset": 4.0}),
    ("LFQ", {"codebook_size": 16, "frac_per_sample_entropy": 0.5, "force_quantization_f32": False}),
    ("LFQ", {"dim": 4, "codebook_size": 16, "has_projections": True, "orthogonal_rotation": True}),
    ("ResidualLFQ", RLFQ),
    ("ResidualLFQ", {**RLFQ, "soft_clamp_input_value": 4.0, "quantize_dropout": True, "spherical": True}),
    ("ResidualLFQ", {**RLFQ, "dim": 4, "entropy_loss_weight": 0.5, "quantize_dropout_cutoff_index": 1}),
    ("GroupedResidualLFQ", {**RLFQ, "groups": 2}),
    ("GroupedResidualLFQ", {**RLFQ, "groups": 2, "accept_image_fmap": True, "diversity_gamma": 2.0}),
    ("LatentQuantize", LATENT),
    ("LatentQuantize", {"levels": 5, "dim": 8, "codebook_dim": 4, "num_codebooks": 2}),
    ("LatentQuantize", {**LATENT, "optimize_values": False, "commitment_loss_weight": 0.5}),
    ("LatentQuantize", {**LATENT, "in_place_codebook_optimizer": SGD, "quantization_loss_weight": 0.3}),
    ("SimVQ", SIM),
    (
        "SimVQ",
        {**SIM, "codebook_transform": nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 8)), "frozen_codebook_dim": 6},
    ),
    ("SimVQ", {**SIM, "channel_first": True, "rotation_trick": False, "commitment_weight": 0.5}),
    ("SimVQ", {**SIM, "frozen_codebook_dim": 6, "input_to_quantize_commit_loss_weight": 0.5}),
    ("ResidualSimVQ", {**SIM, "num_quantizers": 3}),
    ("ResidualSimVQ", {**SIM, "num_quantizers": 3, "quantize_dropout": True, "channel_first": True}),
    ("ResidualSimVQ", {**SIM, "num_quantizers": 2, "codebook_transform": nn.Linear(8, 8), "rotation_trick": False}),
    ("BinaryMapper", {}),
    ("BinaryMapper", {"bits": 4, "kl_loss_threshold": 0.5, "deterministic_on_eval": True}),
    ("HierarchicalVQ", HVQ),
    ("HierarchicalVQ", {**HVQ, "shared_codebook": False, "codebook_size": (16, 8, 4), "share_quant_resi": 2}),
    ("HierarchicalVQ", {**HVQ, "accept_image_fmap": True, "channel_first": False, "quant_resi": 0.25}),
    ("HierarchicalVQ", {**HVQ, "accept_3d_fmap": True, "share_quant_resi": 0, "kmeans_init": False}),
    ("HierarchicalVQ", {**HVQ, "nested_dropout": 0.5, "nested_dropout_min_levels": 2, "orthogonal_reg_weight": 0.1}),
    ("EvoLFQ", {"encoder": nn.Linear(8, 4), "decoder": nn.Linear(4, 8), "codebook_size": 16, "pop_size": 8}),
]


def made(name: str, options: dict[str, Any]) -> nn.Module:
    """The layer of upstream."""
    import vector_quantize_pytorch

    return getattr(vector_quantize_pytorch, name)(**options)


def runs(name: str, options: dict[str, Any]) -> bool:
    """Whether upstream can run the case at all.

    Not: image maps of residual layers, statistics synchronised without a process group, latents that do not learn or
    have an optimizer of their own. EvoLFQ takes more than an input.
    """
    images = options.get("accept_image_fmap", False) and "Residual" in name
    latents = name == "LatentQuantize" and {"optimize_values", "in_place_codebook_optimizer"} & set(options)
    return not (images or latents or "sync_affine_param" in options or name == "EvoLFQ")


def fitting(name: str, options: dict[str, Any]) -> torch.Tensor:
    """An input that the layer takes."""
    parts = options.get("num_codebooks", 1)
    levels = options.get("levels", [])
    sizes = len(levels) if isinstance(levels, list | tuple) else 1
    default = {"FSQ": sizes * parts, "LFQ": 4 * parts, "BinaryMapper": options.get("bits", 1)}
    default["FSP"] = default["ResidualFSQ"] = default["FSQ"]
    channels = options.get("dim", default.get(name, 8))
    first = options.get("channel_first", name in ("LatentQuantize", "HierarchicalVQ"))
    first = first or options.get("is_channel_first", False) or not options.get("channel_last", True)
    grid = [4] if name in ("HierarchicalVQ", "BinaryMapper") else [20]
    if options.get("accept_image_fmap") or options.get("accept_3d_fmap"):
        grid = [4, 4] if options.get("accept_image_fmap") else [4, 4, 4]
        first = first or name != "HierarchicalVQ"
    return torch.randn(2, channels, *grid) if first else torch.randn(2, *grid, channels)
