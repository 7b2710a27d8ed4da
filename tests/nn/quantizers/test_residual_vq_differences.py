"""Where the residual stacks differ from vector-quantize-pytorch 1.32: that it fails, and that ours is right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss, normalize

from ferrovae import nn
from nn.quantizers.residual_cases import DIM, SIZE, STAGES

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)

LEARNT = {"learnable_codebook": True, "ema_update": False}


def pair(kind="ResidualVQ", **options):
    options = {"dim": DIM, "num_quantizers": STAGES, "codebook_size": SIZE, **options}
    torch.manual_seed(5)
    theirs, ours = getattr(upstream, kind)(**options), getattr(nn, kind)(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def same(one, two):
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"commitment_weight": 0.0}, {"diveq": True}])
def test_beams_without_a_commitment_loss(options):
    """The search is the same, and nothing pulls the input to its codes."""
    theirs, ours = pair(beam_size=2, **options)
    x = torch.randn(2, 9, DIM)
    with pytest.raises(Exception, match="number of tensor dimensions"):
        theirs(x)
    plain = pair(beam_size=2)[1]
    plain.load_state_dict(ours.state_dict())
    found = ours(x)
    assert torch.equal(found[1], plain(x)[1])
    assert not found[2].requires_grad
    if "diveq" not in options:
        same(dict(ours.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 5}])
def test_a_beam_with_one_sample_at_a_time(options):
    theirs, ours = pair(beam_size=2, implicit_neural_codebook=True, mlp_kwargs={"depth": 2}, **options)
    x = torch.randn(3, 9, DIM)
    with pytest.raises(RuntimeError, match="must match"):
        theirs(x)
    theirs.eval()
    ours.eval()
    quantized, indices, losses = ours(x)
    alone = [theirs(sample[None]) for sample in x]
    assert torch.equal(indices, torch.cat([part[1] for part in alone]))
    same(quantized, torch.cat([part[0] for part in alone]))
    same(losses, torch.stack([part[2] for part in alone]).mean(0))


def test_a_beam_takes_all_its_sequences_for_rows():
    """k-means, affine moments and diversity are over samples, positions and sequences alike."""
    x = torch.randn(3, 40, DIM)
    theirs, ours = pair(beam_size=2, kmeans_init=True)
    with pytest.raises(RuntimeError, match="broadcast shape"):
        theirs(x)
    ours.eval()(x)
    first, second = (nn.VectorQuantize(DIM, SIZE, kmeans_init=True).eval() for _ in range(2))
    first(x)
    same(ours.codebooks[0], first.codebook)
    residuals = x[:, :, None] - first(x, topk=2)[0]
    second(residuals.flatten(1, 2))
    same(ours.codebooks[1], second.codebook)

    theirs, ours = pair(beam_size=2, affine_param=True)
    with pytest.raises(RuntimeError, match="broadcast shape"):
        theirs(x)
    ours(x)
    same(ours.layers[0]._codebook.batch_mean[0, 0], x.mean((0, 1)))

    options = {"codebook_diversity_loss_weight": 0.3, "codebook_diversity_temperature": 1.0, "ema_update": False}
    theirs, ours = pair(beam_size=2, **options)
    rows = x.flatten(0, 1)
    due = theirs(rows)[2]
    same(ours(rows)[2], due)
    same(ours(rows[:, None])[2], due)
    # Positions are then rows of one sample, each with a distribution of its own.
    one = torch.nn.functional.softmax(-torch.cdist(x[:1], ours.codebooks[:1]), -1)
    entropy = torch.special.entr(one).sum(-1).mean()
    nearest = ours(x[:1])[1]
    commitment = mse_loss(ours.codebooks[0][nearest[..., 0]], x[:1])
    same(ours(x[:1])[2][0], commitment - 0.3 * entropy)
    assert not torch.allclose(theirs(x[:1])[2], ours(x[:1])[2], atol=1e-3)


def test_a_beam_with_soft_gradients():
    """Of vectors that pass gradients to the input, nothing else changes."""
    theirs, ours = pair(beam_size=2, straight_through=True, rotation_trick=False)
    x = torch.randn(2, 9, DIM, requires_grad=True)
    plain = copy.deepcopy(pair(beam_size=2, rotation_trick=False)[1])
    with pytest.raises(RuntimeError, match="must match"):
        theirs(x)
    for one, two in zip(ours(x), plain(x), strict=True):
        same(one, two)
    same(dict(ours.state_dict()), dict(plain.state_dict()))


def test_a_beam_of_cold_draws():
    """Where one sequence holds all the probability, drawing changes nothing."""
    theirs, ours = pair(beam_size=2, stochastic_sample_codes=True, sample_codebook_temp=1e-6)
    x = torch.randn(2, 9, DIM)
    for one, two in zip(ours(x), theirs(x), strict=True):
        same(one, two)
    warm = [ours(x, sample_codebook_temp=1.0, freeze_codebook=True)[1] for _ in range(2)]
    assert not torch.equal(*warm)


def test_dead_codes_come_after_the_step_in_place():
    """They are rows of the batch, and not moved from there by the step that they were too few for."""
    theirs, ours = pair(
        threshold_ema_dead_code=1.5,
        in_place_codebook_optimizer=lambda parameters: torch.optim.SGD(parameters, 5.0),
        **LEARNT,
    )
    x = torch.randn(2, 9, DIM)
    for layer, right in ((theirs, False), (ours, True)):
        layer(x)
        book = layer.layers[0]._codebook
        fresh = book.embed.detach()[book.cluster_size == 1.5]
        assert len(fresh) > 2
        assert (torch.cdist(fresh, x.flatten(0, 1)).amin(-1) < 1e-3).all() == right


@pytest.mark.parametrize("options", [{}, LEARNT])
def test_orthogonality_is_of_the_codes_looked_up(options):
    theirs, ours = pair(
        orthogonal_reg_weight=0.5, threshold_ema_dead_code=1.5, commitment_weight=0.0, decay=0.5, **options
    )
    codes = normalize(ours.codebooks.detach().clone(), dim=-1)
    due = 0.5 * ((codes @ codes.mT).square().mean((1, 2)) - 1 / SIZE)
    x = torch.randn(2, 9, DIM)
    same(ours(x)[2], due)
    assert not torch.allclose(theirs(x)[2], due, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"implicit_neural_codebook": True},
        {"commitment_use_cross_entropy_loss": True, **LEARNT},
        {"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 1.0, **LEARNT},
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_at_the_codes_looked_up(options, shared):
    """Replacing dead codes, before the backward pass, changes none of them."""
    results = []
    for threshold in (0.0, 1.5):
        layer = pair(threshold_ema_dead_code=threshold, shared_codebook=shared, **options)[1]
        x = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
        before = layer.codebooks.detach().clone()
        quantized, _, losses = layer(x)
        assert torch.equal(layer.codebooks, before) == (threshold == 0)
        ((quantized * torch.linspace(-1, 1, DIM)).sum() + losses.sum()).backward()
        results.append([x.grad] + [parameter.grad for parameter in layer.parameters() if parameter.grad is not None])
    same(*results)


@pytest.mark.parametrize("kind", ["ResidualVQ", "GroupedResidualVQ"])
def test_a_shared_codebook_steps_in_place(kind):
    """Once a step, with the gradients of all stages at the codes that they saw."""
    options = {} if kind == "ResidualVQ" else {"groups": 1}
    theirs, ours = pair(
        kind,
        shared_codebook=True,
        in_place_codebook_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        **LEARNT,
        **options,
    )
    x = torch.randn(2, 9, DIM)
    stack = ours.rvqs[0] if options else ours
    before = stack.codebooks[0].detach().clone()
    ours(x, freeze_codebook=True)
    ours.eval()(x)
    assert torch.equal(stack.codebooks[0], before)
    book, residual, loss = before.clone().requires_grad_(), x, 0.0
    for _ in range(STAGES):
        index = torch.cdist(residual, book.detach().expand(2, -1, -1)).argmin(-1)
        loss = loss + mse_loss(book[index], residual)
        residual = residual - before[index]
    (gradient,) = torch.autograd.grad(loss, book)
    for layer in (theirs, ours):
        layer.train()(x)
    same(stack.codebooks[0].detach(), before - 0.1 * gradient)
    assert stack.layers[0]._codebook.embed.grad is None
    same((theirs.rvqs[0] if options else theirs).codebooks[0].detach(), before)
    if not options:  # unless it is left to the caller
        manual = {"in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1), **LEARNT}
        layer = pair(shared_codebook=True, manual_in_place_optimizer_update=True, **manual)[1]
        layer(x)
        assert torch.equal(layer.codebooks[0], before)
        layer.layers[0].update_in_place_optimizer()
        same(layer.codebooks[0].detach(), before - 0.1 * gradient)


def test_a_frozen_shared_codebook_stays():
    theirs, ours = pair(shared_codebook=True)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for layer in (theirs, ours):
        layer.layers[0]._codebook.embed_avg.mul_(2)
        layer(torch.randn(2, 9, DIM), freeze_codebook=True)
    assert torch.equal(ours.codebooks[0], before["layers.0._codebook.embed"][0])
    assert not torch.equal(theirs.codebooks[0], before["layers.0._codebook.embed"][0])


TARGETS = {
    "default": {},
    "projected": {"codebook_dim": 5},
    "sizes": {"num_quantizers": None, "codebook_size": (8, 12, 10)},
    "shared": {"shared_codebook": True},
    "cosine": {"use_cosine_sim": True},
    "dropout": {"quantize_dropout": True},
    "learnt": LEARNT,
    "not rotated": {"rotation_trick": False, "commitment_weight": 0.3},
    "not to earlier stages": {"quant_grad_frac": 0.0, "orthogonal_reg_weight": 0.2},
    "beam": {"beam_size": 2},
}


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_at_given_codes(case, training, masked):
    """Of all stages, dropped or not, each at what the stages before it leave over: as the peer's own stages give it.

    Its stack raises. Padding counts nowhere, the codebooks learn from the codes found and not from those given, and
    gradients are those at the codes that were looked up, which the peer's stages have only while they are frozen.
    """
    theirs, ours = pair(**TARGETS[case])
    x = torch.randn(2, 15, DIM)
    targets = torch.stack([torch.randint(size, (2, 15)) for size in ours.codebook_sizes], -1)
    if case != "beam":  # which fails earlier
        with pytest.raises(ValueError, match="unpack"):
            copy.deepcopy(theirs)(x, indices=targets)
    mask = torch.rand(2, 15) > 0.3 if masked else None
    call = {} if mask is None else {"mask": mask}
    seen = targets if mask is None else torch.where(mask[..., None], targets, -1)
    results = []
    for layer in (theirs, ours):
        layer.train(training)
        inputs = x.clone().requires_grad_()
        if layer is ours:
            quantized, loss = ours(inputs, indices=targets, **call)
        else:
            residual = layer.project_in(inputs)
            total, losses = torch.zeros_like(residual), []
            for number, stage in enumerate(copy.deepcopy(layer).layers if training else layer.layers):
                # A shared codebook would otherwise have moved.
                part, loss = stage(residual, indices=seen[..., number], freeze_codebook=True, **call)
                part = part if mask is None else torch.where(mask[..., None], part, 0.0)
                residual, total = residual - part.detach(), total + part
                losses.append(loss)
            quantized, loss = layer.project_out(total), sum(losses)
            quantized = quantized if mask is None else torch.where(mask[..., None], quantized, 0.0)
        # An output in eval mode has no gradient to the input, but the cross-entropy has.
        ((quantized * torch.linspace(-1, 1, DIM)).sum() + loss).backward()
        results.append((quantized, loss, inputs.grad))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    if training and case != "beam":
        again = pair(**TARGETS[case] | {"quantize_dropout": False})[1]
        again(x, **call)
        same(dict(ours.state_dict()), dict(again.state_dict()))
    ours.load_state_dict(theirs.state_dict())
    other = torch.where(mask[..., None], targets, 0) if masked else targets
    same(ours(x, indices=other, **call)[1], loss)


def test_cross_entropy_at_given_codes_of_groups():
    theirs, ours = pair("GroupedResidualVQ", groups=2, quantize_dropout=True)
    x, targets = torch.randn(2, 15, DIM), torch.randint(SIZE, (2, 2, 15, STAGES))
    with pytest.raises(ValueError, match="unpack"):
        theirs(x, indices=targets)
    quantized, loss = ours(x, indices=targets, freeze_codebook=True)
    due, parts = 0.0, []
    for stack, part, target in zip(ours.rvqs, x.double().chunk(2, -1), targets, strict=True):
        residual = part
        for number, codes in enumerate(stack.codebooks.double()):
            distances = torch.cdist(residual, codes.expand(2, -1, -1))
            due = due + cross_entropy(-distances.flatten(0, 1), target[..., number].flatten())
            residual = residual - codes[distances.argmin(-1)]
        parts.append(part - residual)
    same(loss.double(), due)
    same(quantized.double(), torch.cat(parts, -1))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_indices_differ_by_rounding_only(cosine, scale):
    """Rows whose first different index is within the peer's float32 error in float64, and few of them."""
    theirs, ours = pair(dim=32, codebook_size=256, num_quantizers=4, use_cosine_sim=cosine)
    theirs.eval()
    ours.eval()
    x = torch.randn(4, 2048, 32) * scale
    one, two = ours(x)[1], theirs(x)[1]
    residual, alike, differ = x.double(), torch.ones(x.shape[:2], dtype=torch.bool), 0
    for number, codes in enumerate(ours.codebooks.double()):
        rows = normalize(residual, dim=-1) if cosine else residual
        mine, other = codes[one[..., number]], codes[two[..., number]]
        apart = alike & (one[..., number] != two[..., number])
        if cosine:
            gap, size = (rows * (mine - other)).sum(-1), torch.ones(())
        else:
            gap = (rows - other).square().sum(-1) - (rows - mine).square().sum(-1)
            size = (rows.norm(dim=-1) + codes.norm(dim=-1).max()).square()
        # A float32 sum of 32 products and the residual's own rounding, in units of 2^-24 of its terms.
        assert (gap[apart] <= (64 * 2**-24 * size.expand(gap.shape))[apart]).all()
        differ += int(apart.sum())
        alike &= ~apart
        residual = residual - mine
    assert differ < 1e-3 * alike.numel()
