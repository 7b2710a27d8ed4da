"""`LFQ` against vector-quantize-pytorch's, where it is installed (`pip install 'ferrovae[bench]'`).

Where the two differ, and why ours is right:
- probabilities under 1e-5: upstream takes their logarithm at 1e-5, so that no entropy passes 11.51 nats and small
  probabilities pull wrongly. The table compares with upstream freed of that; one test shows it as it is.
- a mask: upstream then takes the "batch" entropy of each row by itself (at gamma = 1 the loss is 0). Ours is compared
  with upstream on the rows that the mask shows.
- ranks: upstream drops the result of its all-reduce (test_lfq_distributed.py).
- no row counts (all masked, or a share that rounds to none): upstream's loss is NaN, ours 0.
- bfloat16 or CPU autocast: upstream computes entropies in it, ours in float32; its loss is bfloat16, ours float32.
- `frac_per_sample_entropy` with a mask: the same distribution, another draw, since ours keeps fixed shapes.
- more than 31 bits: upstream's table cannot be made, and its indices are int32 before they are summed.
- an index out of range: upstream takes its lowest bits, ours raises.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ferrovae.nn import LFQ

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
from vector_quantize_pytorch import lookup_free_quantization as module  # noqa: E402

# Options, and the shape of x.
CASES = [
    ({"dim": 4}, (3, 10, 4)),
    ({"codebook_size": 32}, (3, 10, 5)),
    ({"dim": 12, "codebook_size": 16}, (3, 10, 12)),
    ({"dim": 12, "codebook_size": 16, "projection_has_bias": False, "spherical": True}, (3, 10, 12)),
    ({"dim": 4, "has_projections": True, "commitment_loss_weight": 0.7}, (3, 10, 4)),
    ({"dim": 6, "codebook_size": 8, "num_codebooks": 2}, (3, 10, 6)),
    ({"dim": 9, "codebook_size": 16, "num_codebooks": 3, "spherical": True, "diversity_gamma": 2.5}, (2, 9, 3, 4)),
    ({"codebook_size": 8, "keep_num_codebooks_dim": True, "commitment_loss_weight": 0.5}, (3, 10, 3)),
    ({"dim": 5, "soft_clamp_input_value": 1.5, "experimental_softplus_entropy_loss": True}, (3, 10, 5)),
    ({"dim": 10, "codebook_size": 16, "cosine_sim_project_in": True, "soft_clamp_input_value": 3.0}, (3, 10, 10)),
    (
        {
            "dim": 10,
            "codebook_size": 16,
            "cosine_sim_project_in": True,
            "cosine_sim_project_in_scale": 2.0,
            "codebook_scale": 0.5,
            "num_codebooks": 2,
        },
        (3, 10, 10),
    ),
    ({"dim": 5, "orthogonal_rotation": True, "commitment_loss_weight": 0.3}, (3, 10, 5)),
    ({"dim": 8, "codebook_size": 16, "num_codebooks": 2, "orthogonal_rotation": True, "spherical": True}, (2, 8, 3, 4)),
    ({"dim": 5, "codebook_scale": 0.5, "straight_through_activation": nn.Tanh(), "spherical": True}, (3, 10, 5)),
    ({"dim": 12, "codebook_size": 32, "straight_through_activation": nn.Tanh(), "entropy_loss_weight": 0.0}, (2, 7, 12)),
    ({"dim": 5, "frac_per_sample_entropy": 0.4}, (3, 10, 5)),
    ({"dim": 12, "codebook_size": 8, "num_codebooks": 3, "frac_per_sample_entropy": 0.7}, (2, 12, 3, 4)),
    ({"dim": 5, "channel_first": True, "experimental_softplus_entropy_loss": True}, (3, 5, 10)),
    ({"dim": 5, "channel_first": True, "keep_num_codebooks_dim": True}, (3, 5)),
    ({"dim": 5, "channel_first": True, "entropy_loss_offset": 1.0, "commitment_loss_weight": 1.0}, (2, 5, 2, 3, 4)),
    ({"dim": 5, "force_quantization_f32": False, "diversity_gamma": 0.0}, (3, 10, 5)),
    ({"dim": 9, "codebook_size": 16, "force_quantization_f32": False, "codebook_scale": 2.0}, (2, 9, 3, 4)),
]
IDS = [" ".join(f"{name}={value}" for name, value in options.items()) for options, _ in CASES]


@pytest.fixture
def without_floor(monkeypatch):
    """Upstream's entropy without its floor of 1e-5 under the logarithm."""
    monkeypatch.setattr(module, "log", lambda t: t.clamp(min=torch.finfo(t.dtype).tiny).log())


def pair(options):
    """The same layer twice: the same seed gives the same parameters."""
    layers = []
    for kind in (upstream.LFQ, LFQ):
        torch.manual_seed(5)
        layers.append(kind(**options))
    return layers


def run(layer, x, **arguments):
    """One step under one seed: results and gradients."""
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    (quantized, indices, loss), breakdown = layer(x, return_loss_breakdown=True, **arguments)
    total = (quantized * torch.linspace(-1, 1, quantized.numel()).view_as(quantized)).sum() + 10 * loss
    if total.requires_grad:
        total.backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return quantized, indices, loss, tuple(breakdown), {"x": x.grad, **gradients}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def same(ours, theirs):
    for one, two in zip(ours[:3], theirs[:3], strict=True):
        assert one.shape == two.shape
        assert one.dtype == two.dtype
    assert torch.equal(ours[1], theirs[1])
    close(ours, theirs)


@pytest.mark.usefixtures("without_floor")
@pytest.mark.parametrize("inv_temperature", [0.5, 100.0])
@pytest.mark.parametrize(("options", "shape"), CASES, ids=IDS)
def test_steps_of_training_then_evaluation(options, shape, inv_temperature):
    theirs, ours = pair(options)
    optimizers = [torch.optim.SGD(layer.parameters(), 1e-3) for layer in (theirs, ours) if [*layer.parameters()]]
    for step in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        same(run(ours, x, inv_temperature=inv_temperature), run(theirs, x, inv_temperature=inv_temperature))
        for optimizer in optimizers:
            optimizer.step()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    close(dict(ours.state_dict()), dict(theirs.state_dict()))
    theirs.eval()
    ours.eval()
    evaluated = run(ours, x), run(theirs, x)
    same(*evaluated)
    indices = evaluated[0][1]
    close(ours.indices_to_codes(indices), theirs.indices_to_codes(indices))
    close(ours.indices_to_codes(indices, project_out=False), theirs.indices_to_codes(indices, project_out=False))


def losses(layer, x, **arguments):
    """Loss, its terms and its gradients; the quantized vectors take no part."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    (_, _, loss), breakdown = layer(x, return_loss_breakdown=True, **arguments)
    loss.backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if "project_out" not in name}
    return loss, tuple(breakdown), x.grad, gradients


MASKED = [case for case in CASES if len(case[1]) == 3 and not case[0].get("channel_first")]


@pytest.mark.usefixtures("without_floor")
@pytest.mark.parametrize(("options", "shape"), [case for case in MASKED if "frac_per_sample_entropy" not in case[0]])
def test_a_mask_is_as_if_the_other_rows_were_not_there(options, shape):
    theirs, ours = pair(options)
    x = torch.randn(shape)
    mask = torch.rand(shape[:2]) > 0.4
    loss, breakdown, x_grad, gradients = losses(ours, x, mask=mask, inv_temperature=2.0)
    their_loss, their_breakdown, their_x_grad, their_gradients = losses(theirs, x[mask][None], inv_temperature=2.0)
    close((loss, breakdown, gradients), (their_loss, their_breakdown, their_gradients))
    close(x_grad[mask][None], their_x_grad)
    assert (x_grad[~mask] == 0).all()
    # Outputs know nothing of masks.
    close(tuple(ours(x, mask=mask)[:2]), tuple(theirs(x, mask=mask)[:2]))


def test_upstream_takes_the_batch_entropy_of_each_row_alone_where_there_is_a_mask():
    theirs, ours = pair({"dim": 4})
    x = 0.3 * torch.randn(3, 10, 4)
    mask = torch.ones(3, 10, dtype=torch.bool)
    for layer, knows in ((theirs, False), (ours, True)):
        masked, whole = (layer(x, 1.0, True, mask=given)[1].batch_entropy for given in (mask, None))
        assert torch.isclose(masked, whole) == knows


@pytest.mark.usefixtures("without_floor")
def test_a_share_of_the_rows_a_mask_shows(monkeypatch):
    theirs, ours = pair({"dim": 5, "frac_per_sample_entropy": 0.45})
    x = torch.randn(3, 10, 5)
    mask = torch.rand(3, 10) > 0.4
    draws = torch.randn(30)
    # In the order of the inverse permutation, ours takes the first rows that the mask shows.
    order = [row for row in draws.argsort().argsort().tolist() if mask.flatten()[row]]
    taken = set(order[: int(len(order) * 0.45)])
    shown = mask.flatten().nonzero().flatten().tolist()
    low, high = iter(range(len(taken))), iter(range(len(taken), len(shown)))
    places = torch.tensor([next(low) if row in taken else next(high) for row in shown])
    # Theirs takes the rows whose place in the argsort of its draws is small.
    assert torch.equal(places.argsort().float().argsort(), places)
    monkeypatch.setattr(torch, "randn", lambda size, **_: draws if size == 30 else places.argsort().float())
    loss, breakdown, x_grad, _ = losses(ours, x, mask=mask, inv_temperature=2.0)
    their_loss, their_breakdown, their_x_grad, _ = losses(theirs, x[mask][None], inv_temperature=2.0)
    close((loss, breakdown, x_grad[mask][None]), (their_loss, their_breakdown, their_x_grad))
    assert ((x_grad != 0).any(-1).sum()) == len(taken)


@pytest.mark.parametrize(("options", "shape"), CASES, ids=IDS)
def test_checkpoints_load_both_ways(options, shape):
    theirs, ours = pair(options)
    x = torch.randn(shape)
    for source, target in ((theirs, LFQ(**options)), (ours, upstream.LFQ(**options))):
        target.load_state_dict(source.state_dict(), strict=True)
        close(tuple(target.eval()(x)), tuple(source.eval()(x)))


def test_the_table_of_codes():
    for options in ({"dim": 6}, {"dim": 6, "codebook_scale": 0.25, "spherical": True}):
        theirs, ours = pair(options)
        assert torch.equal(ours.codebook, theirs.codebook)
        assert ours.dtype == theirs.dtype
        assert ours.bfloat16().codebook.dtype == theirs.bfloat16().codebook.dtype


def test_upstream_cannot_tell_more_than_eleven_nats():
    x = 0.1 * torch.randn(1, 1, 18)
    p = torch.sigmoid(4 * 0.5 * x.double())
    exact = -(p * p.log() + (1 - p) * (1 - p).log()).sum().float()  # one row: also the entropy of the mean
    assert exact > 12.0
    for layer, knows in zip(pair({"dim": 18}), (False, True), strict=True):
        for entropy in layer(x, inv_temperature=0.5, return_loss_breakdown=True)[1][:2]:
            assert torch.isclose(entropy, exact, rtol=1e-5) == knows
            assert knows or entropy < 11.52
