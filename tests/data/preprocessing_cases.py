"""Helpers of the tests of preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_dataset import TinyDataset, voxels

IDENTIFIER = "nnUNetPlans_3d_fullres"


def reasons(problems: list[Any]) -> dict[str, str]:
    return {problem.identifier: problem.reason for problem in problems}


def _with(value: float) -> Callable[[TinyDataset], None]:
    def add(dataset: TinyDataset) -> None:
        image = voxels(1)
        image[3, 4, 5:8] = value
        dataset.add("bad", image)

    return add
