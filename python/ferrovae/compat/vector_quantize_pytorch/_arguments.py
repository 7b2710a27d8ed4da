"""The constructor's arguments of vector-quantize-pytorch's modules, read off what a module keeps of them.

Where an argument leaves no trace but a finished effect (`kmeans_init` after the first batch, `init_fn`), the value is
one that has none any more. `sync_codebook` is read as `_synchronization` says.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

Arguments = dict[str, Any]

_VECTOR_QUANTIZE = (
    "dim heads separate_codebook_per_head eps freeze_codebook use_cosine_sim channel_last accept_image_fmap "
    "accept_3d_fmap commitment_weight commitment_use_cross_entropy_loss orthogonal_reg_weight codebook_size "
    "orthogonal_reg_active_codes_only orthogonal_reg_max_codes codebook_diversity_loss_weight "
    "codebook_diversity_temperature rotation_trick directional_reparam directional_reparam_variance "
    "learnable_codebook manual_in_place_optimizer_update sync_update_v return_zeros_for_masked_padding "
    "route_gradients_to_input"
)
_CODEBOOK = "decay kmeans_iters threshold_ema_dead_code sample_codebook_temp ema_update manual_ema_update vq_bridge"
_AFFINE = "affine_param sync_affine_param affine_param_batch_decay affine_param_codebook_decay"
_DROPOUT = "num_quantizers quantize_dropout quantize_dropout_cutoff_index quantize_dropout_multiple_of"
_FSQ = (
    "dim num_codebooks keep_num_codebooks_dim scale allowed_dtypes channel_first return_indices "
    "force_quantization_f32 preserve_symmetry noise_dropout bound_hard_clamp orthogonal_rotation"
)
_LFQ = (
    "dim codebook_size entropy_loss_weight commitment_loss_weight diversity_gamma num_codebooks codebook_scale "
    "keep_num_codebooks_dim frac_per_sample_entropy has_projections soft_clamp_input_value channel_first "
    "experimental_softplus_entropy_loss entropy_loss_offset spherical force_quantization_f32 orthogonal_rotation"
)
_NORMS = ("none", "var", "kurt", "var_tanh", "var_sigmoid", "var_laplace")


def vector_quantize(module: Any, alike: Iterable[Any] = ()) -> Arguments:
    """Of a VectorQuantize; `alike` are all the layers that one set of arguments makes, itself among them."""
    layers = list(alike) or [module]
    book = module._codebook
    found = _named(module, _VECTOR_QUANTIZE) | _named(book, _CODEBOOK) | _synchronization(book)
    found |= {
        "codebook_dim": book.embed.shape[-1],
        "stochastic_sample_codes": book.gumbel_sample.keywords["stochastic"],
        "straight_through": book.gumbel_sample.keywords["straight_through"],
        "layernorm_after_project_in": isinstance(module.project_in, nn.Sequential),
        # Once it has happened it never happens again.
        "kmeans_init": any(_pending(layer._codebook.initted) for layer in layers),
    }
    if book.affine_param:
        found |= _named(book, _AFFINE)
    if module.in_place_codebook_optimizer is not None:
        found["in_place_codebook_optimizer"] = _in_turn(layer.in_place_codebook_optimizer for layer in layers)
    return found


def residual_vq(module: Any, alike: Iterable[Any] = ()) -> Arguments:
    """Of a ResidualVQ."""
    stacks = list(alike) or [module]
    found = vector_quantize(module.layers[0], chain.from_iterable(stack.layers for stack in stacks))
    found |= _named(module, f"{_DROPOUT} codebook_dim shared_codebook diveq accept_image_fmap quant_grad_frac")
    found |= _named(module, "implicit_neural_codebook return_zeros_for_masked_padding beam_size eval_beam_size")
    found |= {"dim": _outer(module, module.codebook_dim)}
    sizes = module.codebook_sizes
    found["codebook_size"] = sizes[0] if module.uniform_codebook_size else tuple(sizes)
    weights = module.beam_score_weights.tolist()
    found["beam_score_quantizer_weights"] = None if set(weights) == {1.0} else weights
    implied = {"heads"}
    if module.implicit_neural_codebook:
        implied |= {"learnable_codebook", "ema_update"}
        if len(module.mlps) > 0:
            mlp = module.mlps[0]
            found["mlp_kwargs"] = {"dim_hidden": mlp.layers[0][0].out_features, "depth": len(mlp.layers)}
    if module.shared_codebook:
        implied |= {"manual_ema_update", "manual_in_place_optimizer_update"}
    if module.diveq:
        implied |= {"ema_update", "learnable_codebook", "route_gradients_to_input", "commitment_weight"}
        implied |= {"quant_grad_frac"}
    return _without(found, implied)


def random_projection_quantizer(module: Any) -> Arguments:
    """Of a RandomProjectionQuantizer."""
    _, dim, codebook_dim = module.rand_projs.shape
    inner = _without(vector_quantize(module.vq), {"heads", "use_cosine_sim", "separate_codebook_per_head"})
    norm = isinstance(module.norm, nn.LayerNorm)
    return inner | {"dim": dim, "codebook_dim": codebook_dim, "num_codebooks": module.num_codebooks, "norm": norm}


def fsq(module: Any) -> Arguments:
    """Of an FSQ."""
    return _named(module, _FSQ) | {"levels": module._levels.tolist(), "projection_has_bias": _has_bias(module)}


def residual_fsq(module: Any) -> Arguments:
    """Of a ResidualFSQ."""
    layer = module.layers[0]
    found = _without(fsq(layer), {"preserve_symmetry"}) | _named(module, f"{_DROPOUT} levels is_channel_first")
    found["dim"] = _outer(module, len(module.levels))
    if not layer.bound_hard_clamp:
        found["soft_clamp_input_value"] = module.soft_clamp_input_value
    return found


def fsp(module: Any) -> Arguments:
    """Of an FSP."""
    found = _named(module, "dim channel_first act_name quantize_rate need_inv_act")
    norm = type(module.vector_norm)
    names = [name for name in _NORMS if _is_preset(norm, name, module.vector_norm)]
    if names:
        found["vector_norm"] = names[0]
    return found | {"levels": module._levels.tolist(), "projection_has_bias": _has_bias(module)}


def lfq(module: Any) -> Arguments:
    """Of an LFQ."""
    found = _named(module, _LFQ)
    if module.has_projections == (module.dim != module.codebook_dim * module.num_codebooks):
        del found["has_projections"]
    if type(module.activation) is not nn.Identity:
        found["straight_through_activation"] = module.activation
    scale = getattr(module.project_in, "scale", None)
    if scale is not None:
        found |= {"cosine_sim_project_in": True, "cosine_sim_project_in_scale": scale}
    return found | {"projection_has_bias": not module.has_projections or module.project_out.bias is not None}


def residual_lfq(module: Any) -> Arguments:
    """Of a ResidualLFQ."""
    layer = module.layers[0]
    found = _without(lfq(layer), {"codebook_scale"}) | _named(module, _DROPOUT)
    return found | {"dim": _outer(module, layer.codebook_dim)}


def grouped(inner: Callable[[Any], Arguments]) -> Callable[[Any], Arguments]:
    """Of a grouped quantizer, its groups being `inner`."""

    def arguments(module: Any) -> Arguments:
        several = {"alike": list(module.rvqs)} if inner is residual_vq else {}
        return inner(module.rvqs[0], **several) | _named(module, "dim groups accept_image_fmap")

    return arguments


def latent_quantize(module: Any) -> Arguments:
    """Of a LatentQuantize."""
    found = _named(module, "dim num_codebooks codebook_dim keep_num_codebooks_dim in_place_codebook_optimizer")
    if isinstance(module.in_place_codebook_optimizer, Optimizer):
        found["in_place_codebook_optimizer"] = _in_turn([module.in_place_codebook_optimizer])
    found["levels"] = module._levels.tolist()
    found["optimize_values"] = isinstance(module.values_per_latent, nn.ParameterList)
    for name in ("commitment_loss_weight", "quantization_loss_weight"):
        found[name] = getattr(module, name).item()
    return found


def sim_vq(module: Any) -> Arguments:
    """Of a SimVQ."""
    found = _named(module, "codebook_size channel_first rotation_trick input_to_quantize_commit_loss_weight")
    frozen = module.frozen_codebook.shape[-1]
    found |= {"commitment_weight": module.commitment_weight, "frozen_codebook_dim": frozen}
    found["codebook_transform"] = module.code_transform
    found["dim"] = _width(module.code_transform, module.frozen_codebook)
    return found


def residual_sim_vq(module: Any) -> Arguments:
    """Of a ResidualSimVQ."""
    found = sim_vq(module.layers[0]) | _named(module, f"{_DROPOUT} channel_first")
    if any(layer.code_transform is not found["codebook_transform"] for layer in module.layers):
        del found["codebook_transform"]
    return found


def binary_mapper(module: Any) -> Arguments:
    """Of a BinaryMapper."""
    return _named(module, "bits kl_loss_threshold deterministic_on_eval")


def hierarchical_vq(module: Any) -> Arguments:
    """Of a HierarchicalVQ."""
    shared = module.vq is not None
    layers = [module.vq] if shared else list(module.vqs)
    inner = vector_quantize(layers[0], layers)
    kept = "decay commitment_weight rotation_trick kmeans_init kmeans_iters threshold_ema_dead_code"
    kept += " sync_codebook stochastic_sample_codes sample_codebook_temp orthogonal_reg_weight orthogonal_reg_max_codes"
    found = {name: inner[name] for name in [*kept.split(), "orthogonal_reg_active_codes_only"]}
    found |= _named(module, "dim scales nested_dropout nested_dropout_min_levels")
    levels = module.phi_levels
    phi = module.phi_shared if levels is None else levels[0]
    return found | {
        "codebook_size": tuple(module.codebook_sizes),
        "shared_codebook": shared,
        "channel_first": isinstance(module.to_channel_first, nn.Identity),
        "quant_resi": phi.resi_ratio,
        "share_quant_resi": 1 if levels is None else len(levels) if len(levels) > 1 else 0,
        "accept_image_fmap": module.spatial_dims == 2,
        "accept_3d_fmap": module.spatial_dims == 3,
    }


def evo_lfq(module: Any) -> Arguments:
    """Of an EvoLFQ."""
    return _named(module, "encoder decoder lfq pop_size mutation_rate tournament_size elitism_count generations")


ARGUMENTS: dict[str, Callable[[Any], Arguments]] = {
    "BinaryMapper": binary_mapper,
    "EvoLFQ": evo_lfq,
    "FSP": fsp,
    "FSQ": fsq,
    "GroupedResidualFSQ": grouped(residual_fsq),
    "GroupedResidualLFQ": grouped(residual_lfq),
    "GroupedResidualVQ": grouped(residual_vq),
    "HierarchicalVQ": hierarchical_vq,
    "LFQ": lfq,
    "LatentQuantize": latent_quantize,
    "RandomProjectionQuantizer": random_projection_quantizer,
    "ResidualFSQ": residual_fsq,
    "ResidualLFQ": residual_lfq,
    "ResidualSimVQ": residual_sim_vq,
    "ResidualVQ": residual_vq,
    "SimVQ": sim_vq,
    "VectorQuantize": vector_quantize,
}


def _named(owner: Any, names: str) -> Arguments:
    return {name: getattr(owner, name) for name in names.split()}


def _without(arguments: Arguments, names: set[str]) -> Arguments:
    return {name: value for name, value in arguments.items() if name not in names}


def _outer(module: Any, inner: int) -> int:
    return module.project_in.in_features if module.has_projections else inner


def _has_bias(module: Any) -> bool:
    return not module.has_projections or module.project_in.bias is not None


@torch.no_grad()
def _width(transform: nn.Module, codes: Tensor) -> int:
    """How many dimensions a transform of codes gives; a layer leaves no other trace of it."""
    if isinstance(transform, nn.Linear):
        return transform.out_features
    # A copy: looking must not move anybody's statistics.
    return copy.deepcopy(transform).eval()(codes[:1]).shape[-1]


def _synchronization(book: Any) -> Arguments:
    """What a codebook shares with other ranks.

    Whether it does was decided when it was made. Where `sync_codebook=None` comes to the same today it is taken, since
    that is asked anew at each step: so False is lost before there is a process group, and a layer shares its statistics
    that does not only because an older one was made without a group, which upstream never forgets.
    """
    by_default = sys.modules["vector_quantize_pytorch.vector_quantize_pytorch"].is_distributed()
    found: Arguments = {"sync_codebook": None if book.use_ddp == by_default else book.use_ddp}
    if book.use_ddp:
        found["sync_kmeans"] = book.kmeans_all_reduce_fn is dist.all_reduce
    return found


def _pending(initted: Any) -> bool:
    return not initted.is_meta and not bool(initted)


def _is_preset(norm: Any, name: str, module: nn.Module) -> bool:
    try:
        preset = norm.build(name)
    except (AssertionError, KeyError, ValueError):
        return False
    return all(value == getattr(module, key) for key, value in vars(preset).items() if isinstance(value, float))


def _in_turn(optimizers: Iterable[Optimizer]) -> Callable[..., Optimizer]:
    """A factory that gives out the optimizers that are there, with the moments they have: one a layer."""
    rest: Iterator[Optimizer] = iter(list(optimizers))
    return lambda *_, **__: next(rest)
