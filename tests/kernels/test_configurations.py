"""The table of tile sizes: what an architecture and a file of measurements change."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from ferrovae.kernels.configurations import TABLE, architecture, tiles
from ferrovae.kernels.nearest_code import tiles as nearest_code_tiles

FIELDS = {"BLOCK_N", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages"}


def test_an_unknown_architecture_has_what_fits_everywhere():
    for shape_class, entry in TABLE["nearest_code"]["any"].items():
        assert set(entry) == FIELDS
        assert tiles("nearest_code", "sm_999", shape_class) == entry
    assert tiles("no_such_operation", "sm_90", "D64") == {}
    assert architecture(torch.device("cpu")) == "any"


def test_a_file_of_measurements_comes_first_and_may_be_partial(tmp_path):
    file = tmp_path / "configurations.json"
    file.write_text(json.dumps({"nearest_code": {"sm_90": {"D64": {"BLOCK_K": 32, "num_warps": 4}}}}))
    built_in = tiles("nearest_code", "sm_90", "D64")
    assert tiles("nearest_code", "sm_90", "D64", file) == {**built_in, "BLOCK_K": 32, "num_warps": 4}
    assert tiles("nearest_code", "sm_80", "D64", file) == tiles("nearest_code", "sm_80", "D64")
    assert tiles("nearest_code", "sm_90", "D32", file) == tiles("nearest_code", "sm_90", "D32")


@pytest.mark.parametrize("architecture", ["any", "sm_90", "sm_100"])
def test_every_number_of_dimensions_has_an_entry_that_covers_it(architecture):
    for dims in (1, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 768, 2048):
        tile = nearest_code_tiles(dims, architecture)
        assert tile["WIDTH"] >= dims
        assert tile["WIDTH"] % tile["BLOCK_D"] == 0
        assert tile["BLOCK_K"] % 16 == 0
