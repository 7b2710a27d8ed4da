"""The same layer twice, ours and vector-quantize-pytorch's, and what their calls have to agree in.

Importing it skips a test module where that library is not installed (`pip install 'ferrovae[bench]'`).
"""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import VectorQuantize
from nn.quantizers.vector_quantize_cases import BATCH, DIM, LENGTH, SIZE

upstream = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (extra `bench`)"
)
upstream_module = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")


def pair(**options):
    """The same layer twice: the same seed gives the same parameters and codes."""
    layers = []
    for make in (upstream.VectorQuantize, VectorQuantize):
        torch.manual_seed(5)
        given = {"dim": DIM, "codebook_size": SIZE, **options}
        if given.get("vq_bridge"):
            given["vq_bridge"] = torch.nn.Linear(given.get("codebook_dim", DIM), given.get("codebook_dim", DIM))
        layers.append(make(**given))
    return layers


def clear_layers(**options):
    """A pair, and what makes batches of it: rows close to a code, so that rounding decides no index."""
    theirs, ours = pair(**options)
    torch.manual_seed(2)
    shape = theirs._codebook.embed.shape
    codes = torch.randn(shape) * 2
    if options.get("use_cosine_sim"):
        codes = torch.nn.functional.normalize(codes, dim=-1)
    for layer in (theirs, ours):
        layer._codebook.embed.data.copy_(codes)
        layer._codebook.embed_avg.copy_(codes)
    return theirs, ours


def batch_of(layer, shape=(BATCH, LENGTH)):
    """x (*shape, DIM) whose projected heads lie near codes."""
    heads, codebook = layer.heads, layer._codebook.embed.detach()
    book = codebook.expand(heads, *codebook.shape[1:]) if codebook.shape[0] == 1 else codebook
    indices = torch.randint(SIZE, (*shape, heads))
    rows = torch.stack([book[head][indices[..., head]] for head in range(heads)], -2).flatten(-2)
    rows = rows + (0.05 if layer.use_cosine_sim else 0.2) * torch.randn(rows.shape)
    if isinstance(layer.project_in, torch.nn.Linear):  # least squares takes rows back through the map
        weight, bias = layer.project_in.weight.detach(), layer.project_in.bias.detach()
        return (rows - bias) @ torch.linalg.pinv(weight).T
    return rows if rows.shape[-1] == DIM else torch.randn(*shape, DIM) * 2


def run(layer, x, input_grad, training=True, **arguments):
    """Outputs, gradients by name, and state, after one call and one backward pass."""
    layer.train(training)
    layer.zero_grad()
    x = x.clone().requires_grad_(input_grad)
    torch.manual_seed(17)
    results = layer(x, **arguments)
    floats = [tensor for tensor in results[:1] if tensor.requires_grad]
    total = sum((tensor * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)).sum() for tensor in floats)
    loss = results[-1] if len(results) == 2 else results[2]
    total = total + 10 * loss.sum()
    if total.requires_grad:
        total.backward()
    gradients = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    return results, gradients, state


def assert_same(ours, theirs, what):
    """Two results of `run`; a gradient that is missing is one of zeros."""
    assert len(ours[0]) == len(theirs[0])
    for number, (one, two) in enumerate(zip(ours[0], theirs[0], strict=True)):
        if isinstance(two, tuple):
            assert one._fields == two._fields
            for name, mine, other in zip(two._fields, one, two, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{what} {n}: {m}")
            continue
        assert (one.shape, one.dtype) == (two.shape, two.dtype), (what, number)
        torch.testing.assert_close(one, two, rtol=2e-4, atol=1e-4, msg=lambda m, n=number: f"{what} result {n}: {m}")
    assert ours[1].keys() == theirs[1].keys()
    for name, two in theirs[1].items():
        one = ours[1][name]
        one, two = (torch.zeros(()) if gradient is None else gradient for gradient in (one, two))
        one, two = torch.broadcast_tensors(one, two)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{what} gradient of {n}: {m}")
    assert ours[2].keys() == theirs[2].keys(), what
    for name, two in theirs[2].items():
        torch.testing.assert_close(
            ours[2][name], two, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{what} state {n}: {m}"
        )


def mask_of(x):
    """Which of the tokens of `batch_of` are no padding."""
    return torch.arange(LENGTH) < torch.tensor([LENGTH, 7, 12])[:, None]


def parted_rows(ours, theirs, rows, codes, *, cosine=False):
    """How many of two layers' indices [H, N] differ, each a choice that float32 cannot make.

    rows [H, N, D], codes [H, K, D], both of length 1 for `cosine`. Upstream's distance is the root of |x|^2 + |e|^2 -
    2 <x, e>, its cosine <x, e>. With u = 2^-24 a sum of D products errs by D u |x| |e| at most, and adding three of
    them, the clamp and the root by less than 4 u (|x| + |e|)^2 more; the margin of two codes may be twice that.
    """
    rows, codes = rows.double(), codes.double()
    chosen = [codes.gather(1, indices[..., None].expand_as(rows)) for indices in (ours, theirs)]
    unit = (rows.shape[-1] + 4) * 2.0**-24
    if cosine:
        best, other = (-(rows * code).sum(-1) for code in chosen)
        error = torch.full_like(best, unit)
    else:
        best, other = ((rows - code).square().sum(-1) for code in chosen)
        error = unit * (rows.norm(dim=-1) + codes.norm(dim=-1).amax(-1, keepdim=True)).square()
    assert (best <= other).all(), "upstream has found a nearer code"
    parted = ours != theirs
    assert (other - best)[parted].le(2 * error[parted]).all(), "an index differs by more than float32's error"
    return int(parted.sum())
