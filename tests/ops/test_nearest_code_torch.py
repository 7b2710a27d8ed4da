"""`nearest_code` as a citizen of torch: vmap, compile over batch sizes, export, checkpointing, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ferrovae.ops import nearest_code
from ferrovae.ops.nearest_code_distances import nearest_code_distances


@pytest.mark.parametrize("rows", [0, 4])
def test_vmap_is_one_call_a_batch(rows):
    x, codebook, codebooks = torch.randn(3, rows, 5), torch.randn(7, 5), torch.randn(3, 7, 5)
    indices, distances = torch.vmap(lambda x: nearest_code(x, codebook, return_distances=True, topk=2))(x)
    expected = nearest_code(x, codebook, return_distances=True, topk=2)
    assert torch.equal(indices, expected[0])
    assert torch.equal(distances, expected[1])
    indices, distances = torch.vmap(lambda x, e: nearest_code(x, e, return_distances=True))(x, codebooks)
    expected = nearest_code(x, codebooks, return_distances=True)
    assert torch.equal(indices, expected[0])
    assert torch.equal(distances, expected[1])


def test_vmap_over_another_axis_with_heads():
    x, codebooks = torch.randn(2, 6, 3, 5), torch.randn(2, 9, 5)
    found = torch.vmap(lambda x: nearest_code(x, codebooks), in_dims=2, out_dims=2)(x)
    assert torch.equal(found, nearest_code(x, codebooks))


def test_vmap_of_distances_with_shared_rows():
    x, codebook, indices = torch.randn(1, 4, 5), torch.randn(1, 7, 5), torch.randint(7, (3, 1, 4, 2))
    found = torch.vmap(lambda i: nearest_code_distances(x, codebook, i, "dot"))(indices)
    for one, chosen in zip(found, indices, strict=True):
        assert torch.equal(one, nearest_code_distances(x, codebook, chosen, "dot"))


def test_one_dynamic_graph_serves_every_batch_size():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def loss(x, codebook):
        indices, distances = nearest_code(x, codebook, return_distances=True, metric="sqeuclidean")
        return indices, distances.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    codebook = torch.randn(9, 4)
    for size in (2, 3, 17, 64, 100):
        x = torch.randn(size, 4)
        for ours, expected in zip(compiled(x, codebook), loss(x, codebook), strict=True):
            assert torch.equal(ours, expected)
    assert len(graphs) == 1


def test_gradients_through_a_dynamic_graph():
    def loss(x, codebook):
        return nearest_code(x, codebook, return_distances=True, topk=2)[1].square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 6):
        leaves = [torch.randn(size, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)]
        ours = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(ours, torch.autograd.grad(loss(*leaves), leaves))


def test_exports_with_a_free_batch_size():
    class Quantizer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codebook = torch.nn.Parameter(torch.randn(9, 4))

        def forward(self, x):
            indices, distances = nearest_code(x, self.codebook, return_distances=True)
            return self.codebook[indices], distances

    quantizer = Quantizer()
    program = torch.export.export(
        quantizer, (torch.randn(6, 4),), dynamic_shapes={"x": {0: torch.export.Dim("N", min=2, max=1000)}}
    )
    assert any("nearest_code" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(13, 4)
    for ours, expected in zip(program.module()(x), quantizer(x), strict=True):
        assert torch.equal(ours, expected)


def test_checkpointing_changes_no_gradient():
    leaves = [torch.randn(8, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)]

    def loss(x, codebook):
        return nearest_code(x * 2, codebook, return_distances=True)[1].sum()

    ours = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    for one, expected in zip(ours, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_distances_and_gradients_alone(dtype):
    x, codebook = torch.randn(8, 3, requires_grad=True), torch.randn(5, 3)
    expected = nearest_code(x, codebook, return_distances=True)[1]
    with torch.autocast("cpu", dtype):
        ours = nearest_code(x, codebook, return_distances=True)[1]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)
    assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
