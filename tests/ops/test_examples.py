"""The examples that a GPU is tested with, on the CPU: they agree with the reference and leave out no operation."""

from __future__ import annotations

import pytest
import torch

from gpu.examples import compare, examples, public, results


@pytest.mark.parametrize("name", sorted(examples()))
def test_kernels_agree_with_the_float64_reference(name: str) -> None:
    example = examples()[name]
    truth = results(example, "cpu", torch.float64, "reference")
    compare(example, results(example, "cpu", torch.float32, "auto"), truth)


def test_every_operation_has_an_example() -> None:
    assert set(examples()) == public()
