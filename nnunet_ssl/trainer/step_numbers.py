"""What the host gets to know of a step, in one transfer from the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

SUPERVISED = "supervised"
"""The term that every method has."""


class StepNumbers(NamedTuple):
    """Of one step.

    Attributes:
        terms: the loss terms by name; of several processes their means.
        gradient: the norm of the gradients, likewise.
        stop: whether to stop after this step.
        voxels: what :meth:`~nnunet_ssl.trainer.predictions.Predictions.draw` drew.
    """

    terms: dict[str, float]
    gradient: float
    stop: bool
    voxels: NDArray[np.int32] | None


def read_step(
    terms: Mapping[str, Tensor], norm: Tensor, *, stop: bool, voxels: Tensor | None, distributed: bool
) -> StepNumbers:
    """Read all numbers at once, as nnU-Net makes one transfer for its loss.

    Args:
        terms: scalars by name, on the device.
        norm: of the gradients, a scalar on the device.
        stop: whether a signal to stop has come to this process.
        voxels: (U, K), int32, on the device.
        distributed: whether several processes train. All stop then at a term that is not finite on one, and at a
            signal that came to one.
    """
    numbers = torch.stack([*terms.values(), norm.float()])
    if distributed:
        numbers = torch.cat((numbers, numbers.new_full((1,), float(stop))))
        dist.all_reduce(numbers)
        numbers /= dist.get_world_size()
    parts = [numbers.view(torch.int32), *([] if voxels is None else [voxels.flatten()])]
    found = torch.cat(parts).cpu().numpy()
    values = found[: len(numbers)].view(np.float32)
    return StepNumbers(
        dict(zip(terms, values, strict=False)),
        float(values[len(terms)]),
        stop or bool(values[len(terms) + 1 :].any()),
        None if voxels is None else found[len(numbers) :].reshape(voxels.shape),
    )


def step_values(terms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """What a step returns for the log: all terms and weights by name, their sum, and the supervised term as ``loss``.

    nnU-Net draws ``loss`` with the validation loss.
    """
    return {
        "loss": terms[SUPERVISED],
        "loss/total": sum(weights[name] * value for name, value in terms.items()),
        **{f"loss/{name}": value for name, value in terms.items()},
        **{f"weight/{name}": weights[name] for name in terms},
    }
