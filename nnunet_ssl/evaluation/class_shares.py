"""Collapse of pseudo-labels, seen in how much of the unlabeled images each class takes up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COLLAPSE_FACTOR = 5.0
COLLAPSE_EPOCHS = 5


def collapsed(
    predicted: Sequence[Sequence[float]],
    labeled: Sequence[Sequence[float]],
    *,
    factor: float = COLLAPSE_FACTOR,
    epochs: int = COLLAPSE_EPOCHS,
) -> list[bool]:
    """Which classes have been predicted far too rarely or far too often for several epochs.

    That is, in less than 1/``factor`` or more than ``factor`` times their share of the labeled images, in each of the
    last ``epochs`` epochs. The band is wide, because few labeled patients are no census of the unlabeled ones. A class
    without a labeled voxel has no share to compare with.

    Args:
        predicted: per epoch, each class's share of the voxels of unlabeled patches.
        labeled: per epoch, each class's share of the voxels of labeled patches; their mean over all epochs counts.

    Returns:
        One entry per class; all False before there are ``epochs`` epochs.
    """
    reference = mean_share(labeled)
    last = np.asarray(predicted[-epochs:], float)
    if len(last) < epochs:
        return [False] * len(reference)
    outside = (last < reference / factor) | (last > reference * factor)
    return [bool(one) for one in outside.all(0) & (reference > 0)]


def class_counts(label: Tensor, known: Tensor | None, classes: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """How many voxels and how many patches each class or region takes up, without a transfer from the device.

    Args:
        label: classes (B, 1, *spatial), integer, or regions (B, R, *spatial), bool.
        known: (B, *spatial), bool; voxels that count; None counts all.
        classes: the K foreground classes; empty for regions.

    Returns:
        ``share`` and ``patches``, each a count and a total, (K + 1,): first the whole foreground, then class by class.
    """
    if known is None:
        known = torch.ones_like(label[:, 0], dtype=torch.bool)
    if classes:
        # Class by class: of many classes, all at once would take many times the memory of an image. For the same reason
        # it is not fused: 104 classes make a graph of 300 operations, which takes 50 s to compile.
        voxels = [((label[:, 0] == value) & known).flatten(1).sum(1) for value in classes]
        voxels = [torch.stack(voxels).sum(0), *voxels]
    else:
        voxels = [(member & known).flatten(1).sum(1) for member in (label.any(1), *label.unbind(1))]
    in_patches = torch.stack(voxels)  # (K + 1, B)
    return {
        "share": (in_patches.sum(1), known.sum().expand(len(in_patches))),
        "patches": ((in_patches > 0).sum(1), in_patches.new_full((len(in_patches),), len(known))),
    }


def mean_share(shares: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Each class's mean over the epochs that have a value; 0 where none has.

    Args:
        shares: per epoch, one value per class, or nan.
    """
    values = np.asarray(shares, float)
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)


def collapse_warning(index: int, predicted: Sequence[Sequence[float]], labeled: Sequence[Sequence[float]]) -> str:
    """What to tell about a class that :func:`collapsed` found; arguments as there, ``index`` counted from 0."""
    return (
        f"Warning: for {COLLAPSE_EPOCHS} epochs, class or region {index + 1} was predicted in "
        f"{predicted[-1][index]:.3%} of the unlabeled voxels, but is in {mean_share(labeled)[index]:.3%} of "
        "the labeled ones. Possible reasons: the unlabeled images are unlike the labeled ones, the network "
        "has not learned this class yet, or its pseudo-labels have collapsed. If this continues, use a "
        "longer ramp_length or smaller weights for the method's terms. See progress_ssl.png."
    )
