"""The table of configurations, with measured times that are made up."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from ferrovae.bench import tune

CANDIDATES = [{}, {"BLOCK_N": 64}, {"BLOCK_N": 128, "num_warps": 8}]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({0: 3.0, 1: 2.0, 2: 1.0}, CANDIDATES[2]),
        ({0: 3.0, 1: 1.0, 2: 2.0}, CANDIDATES[1]),
        ({0: 1.0, 1: 0.99, 2: 2.0}, None),  # noise
        ({0: 1.0, 1: 2.0, 2: 2.0}, None),
        ({1: 2.0, 2: 3.0}, CANDIDATES[1]),  # what is launched today does not run here
        ({}, None),
    ],
)
def test_the_best_is_written_if_it_gains(seconds: dict[int, float], best: dict[str, int] | None) -> None:
    before: tune.Table = {
        "other": {"sm_90": {"D8": {"BLOCK_N": 1}}},
        "nearest_code": {"sm_80": {"D64": {"BLOCK_N": 2}}},
    }
    after = tune.with_best(before, "nearest_code", "sm_90", "D64", CANDIDATES, seconds)
    if best is None:
        assert after == before
    else:
        assert after["nearest_code"] == {"sm_80": {"D64": {"BLOCK_N": 2}}, "sm_90": {"D64": best}}
        assert after["other"] == before["other"]


def test_the_table_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / tune.FILE
    assert tune.read(path) == {}
    table = tune.with_best({}, "nearest_code", "sm_90", "D64", CANDIDATES, {0: 2.0, 2: 1.0})
    tune.write(path, table)
    assert tune.read(path) == table == {"nearest_code": {"sm_90": {"D64": CANDIDATES[2]}}}


def test_a_forced_configuration_is_what_the_module_launches() -> None:
    module = ModuleType("kernel")
    exec(
        "def tiles(dims): return {'BLOCK_N': dims, 'num_warps': 4}\ndef launch(dims): return tiles(dims)", vars(module)
    )
    with tune.forced(module, {"num_warps": 8}):
        assert module.launch(64) == {"BLOCK_N": 64, "num_warps": 8}
    assert module.launch(64) == {"BLOCK_N": 64, "num_warps": 4}
    with pytest.raises(RuntimeError), tune.forced(module, {}):
        raise RuntimeError
    assert module.launch(64)["num_warps"] == 4


def test_candidates_are_the_modules_or_the_usual() -> None:
    module = ModuleType("kernel")
    usual = tune.candidates_of(module, "D64")
    assert len(usual) == 48
    assert {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3} in usual
    module.tune_candidates = lambda shape_class: [{"BLOCK_N": int(shape_class[1:])}]
    assert tune.candidates_of(module, "D64") == [{"BLOCK_N": 64}]


def test_report() -> None:
    text = tune.report("nearest_code", "D64", CANDIDATES, {0: 3e-6, 2: 1e-6})
    assert text.splitlines()[0] == "nearest_code D64: 2 of 3 ran and were right"
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["1.0", "3.0"]
    assert "as it is" in text.splitlines()[2]
