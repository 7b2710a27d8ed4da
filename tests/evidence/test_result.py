"""The table says in words what to trust; the dictionary is JSON; bits/dim is derived in one place."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ferrovae.evidence import Evidence, bits_per_dim


def evidence(khat, *, samples=5000, exact=False, point_mass=False):
    khat = torch.tensor(khat, dtype=torch.float64)
    count = len(khat)
    log_px = -90.0 - torch.arange(count, dtype=torch.float64)
    flags = torch.full((count,), True)
    reliable = (khat <= 0.7) & (not point_mass)
    return Evidence(
        log_px=log_px,
        elbo=log_px - 2,
        reconstruction=log_px + 20,
        kl=torch.full_like(log_px, 22.0),
        standard_error=torch.full_like(log_px, 0.0 if exact else 0.3).masked_fill(~reliable, math.nan),
        elbo_standard_error=torch.full_like(log_px, 0.1),
        ess=torch.full_like(log_px, 22.0),
        khat=khat,
        reliable=reliable,
        exact=flags & exact,
        point_mass=flags & point_mass,
        index=torch.arange(count) + 1000,
        samples=samples,
        dims=784,
    )


def words(result, **kwargs):
    return " ".join(result.table(**kwargs).split())


def test_table_warns_and_withholds():
    text = words(evidence([0.2, 0.9, 0.9, 1.3]))
    assert (
        "k-hat exceeds 0.70 for 3 of 4 images: the importance average is unreliable there, most likely too low, "
        "and its standard error is withheld." in text
    )
    assert "about 1e10 an image, in the median" in text, "10^(1 / (1 - 0.9))"
    assert "For 1 image with k-hat of 1 or more no number of samples will do." in text
    assert "log p(x), importance average -91.500 0.645 withheld" in text
    assert "(-inf, 0.70] 1 25 % good (0.70, 1] 2 50 % bad (1, inf) 1 25 % very bad" in text
    assert "image 1003 -93.000 withheld -95.000 22.0 1.30 not reachable" in text
    assert "image 1000 -90.000 0.300 -92.000 22.0 0.20" in text


def test_table_says_when_all_is_well():
    text = words(evidence([0.2, 0.6]))
    assert (
        "k-hat is at most 0.70 for all 2 images: the importance average and its standard error can be trusted" in text
    )
    # The mean's Monte Carlo error, sqrt(0.3^2 + 0.3^2) / 2, stands beside the error over images, 1 / 2.
    assert "log p(x), importance average -90.500 0.500 0.2121" in text
    assert "withheld" not in text


def test_table_of_exact_few_samples_point_mass_and_nothing():
    assert "the posterior q(z|x) is exact as far as 5,000 samples tell" in words(evidence([0.0], exact=True))
    few = words(evidence([math.nan] * 3, samples=10))
    assert "10 samples an image are too few for a k-hat (21 are needed)" in few
    assert "none 3 100 %" in few
    bound = words(evidence([math.nan] * 2, point_mass=True))
    assert "a lower bound on log p(x), not an estimate of it" in bound
    assert "k-hat does not apply" in bound
    assert "one draw each" in bound
    assert evidence([]).table() == "log p(x): no images."


def test_table_shows_as_many_images_as_asked():
    result = evidence([0.1] * 9)
    assert words(result).count("image 10") == 5
    assert words(result, images=0).count("image 10") == 0
    assert words(result, images=50).count("image 10") == 9


def test_lines_fit_a_terminal():
    for result in (evidence([0.2, 0.9, 1.3]), evidence([math.nan] * 2, point_mass=True)):
        assert max(map(len, result.table().splitlines())) <= 100


def test_samples_needed_follows_khat():
    needed = evidence([-1.0, 0.0, 0.5, 0.75, 1.0, 2.0, math.nan]).samples_needed()
    assert needed[:4].tolist() == pytest.approx([10.0, 10.0, 100.0, 1e4])
    assert needed[4:6].isinf().all()
    assert needed[6].isnan()


def test_to_dict_is_json_with_null_where_withheld():
    result = evidence([0.2, 0.9, math.nan])
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["standard_error"] == [0.3, None, None]
    assert plain["khat"] == [0.2, 0.9, None]
    assert plain["reliable"] == [True, False, False]
    assert plain["index"] == [1000, 1001, 1002]
    assert plain["mean"]["log_px"] == -91.0
    assert plain["mean"]["elbo"] == -93.0
    assert plain["mean"]["bits_per_dim"] == pytest.approx(91 / 784 / math.log(2))
    assert plain["standard_error_over_images"]["log_px"] == pytest.approx(1 / math.sqrt(3))
    assert plain["monte_carlo_standard_error"] is None
    assert (plain["samples"], plain["images"], plain["dims"], plain["reliable_images"]) == (5000, 3, 784, 1)
    assert json.dumps(evidence([]).to_dict(), allow_nan=False)


def test_bits_per_dim_of_known_codes():
    """256 equally likely levels cost 8 bits, as a mass, and as the density of v + u scaled to [-1, 1] or [0, 1]."""
    dims = 12
    assert bits_per_dim(-dims * math.log(256), dims) == pytest.approx(8)
    for width in (1 / 127.5, 1 / 256, 1.0):
        density = -dims * math.log(256 * width)
        assert bits_per_dim(density, dims, level_width=width) == pytest.approx(8)
    assert bits_per_dim(torch.tensor([-math.log(2)] * 2), 1).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="dims is 0"):
        bits_per_dim(-1.0, 0)
    with pytest.raises(ValueError, match="level_width is 0"):
        bits_per_dim(-1.0, 3, level_width=0)
