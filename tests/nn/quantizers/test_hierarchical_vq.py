"""`HierarchicalVQ`: precision, and which levels its dropout keeps."""

from __future__ import annotations

import pytest
import torch

from ferrovae.nn import HierarchicalVQ

DIM = 4


def hierarchy(**options):
    torch.manual_seed(3)
    given = {"dim": DIM, "codebook_size": 7, "scales": (1, 2, 4), "kmeans_init": False, "threshold_ema_dead_code": 0}
    return HierarchicalVQ(**(given | options))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision(dtype, masked):
    """What a dtype gives is what float32 gives but for its rounding, in training and for decoded indices."""
    plain, layer = hierarchy(), hierarchy().to(dtype)
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())
    x = 2 * torch.randn(3, DIM, 8)
    x = x.to(dtype).float()
    call = {"mask": torch.rand(3, 8) > 0.3} if masked else {}
    found, due = layer(x.to(dtype), **call), plain(x, **call)
    assert found[0].dtype == dtype
    rough = dtype == torch.bfloat16
    same = torch.cat([(one == two).flatten() for one, two in zip(found[1], due[1], strict=True)])
    assert same.float().mean() > (0.9 if rough else 0.999)
    torch.testing.assert_close(found[2].float(), due[2], rtol=0.05 if rough else 1e-5, atol=0)
    decoded = layer.eval().get_output_from_indices(due[1], 8)
    assert decoded.dtype == dtype
    expected = plain.eval().get_output_from_indices(due[1], 8)
    torch.testing.assert_close(decoded.float(), expected, rtol=0, atol=0.03 if rough else 1e-5)


@pytest.mark.parametrize(("share", "least"), [(1.0, 1), (1.0, 2), (0.5, 1), (1.0, 3), (0.0, 1)])
def test_levels_that_dropout_keeps(share, least):
    layer = hierarchy(nested_dropout=share, nested_dropout_min_levels=least)
    last = [layer.sample_nested_cutoff(None) for _ in range(400)]
    if share == 0 or least == 3:
        assert last == [None] * 400
        return
    kept = torch.stack(last) + 1
    assert set(kept.tolist()) == set(range(least, 3)) | ({3} if share < 1 else set())
    for level in range(least, 3):  # each as likely as the others
        assert abs((kept == level).float().mean() - share / (3 - least)) < 0.1
    assert layer.eval().sample_nested_cutoff(None) is None
