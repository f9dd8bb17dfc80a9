"""Overlap and surface distances of a segmentation, by the definitions of MedPy that most papers report.

A surface voxel belongs to the mask but not to its erosion by a cross (face neighbors); beyond the image's edge lies
background. Distances are exact and take the spacing into account.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure

Labels = Mapping[str, "int | Sequence[int]"]
"""Label values by structure, or several values for a region, as in nnU-Net's dataset.json; without background."""


@dataclass(frozen=True)
class CaseMetrics:
    """One structure in one case. What is undefined is nan: see :func:`structure_metrics`.

    Attributes:
        dice: Dice similarity coefficient, 0 to 1.
        jaccard: intersection over union, 0 to 1.
        hd95: 95th percentile of the surface distances of both directions pooled, in millimeters.
        asd: mean distance from the prediction's surface to the reference's, in millimeters.
        assd: mean of the surface distances of both directions pooled, in millimeters (as in MedPy 0.5.2; older releases
            took the mean of the two means).
        hd95_voxels: hd95 in voxels, that is with a spacing of 1.
        asd_voxels: asd in voxels.
        assd_voxels: assd in voxels.
    """

    dice: float = math.nan
    jaccard: float = math.nan
    hd95: float = math.nan
    asd: float = math.nan
    assd: float = math.nan
    hd95_voxels: float = math.nan
    asd_voxels: float = math.nan
    assd_voxels: float = math.nan


METRICS = tuple(field.name for field in fields(CaseMetrics))


@dataclass(frozen=True)
class CaseResult:
    """A case's metrics by structure."""

    case: str
    metrics: dict[str, CaseMetrics]


def structure_metrics(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float]
) -> CaseMetrics:
    """Compare two masks of one structure.

    If both masks are empty, everything is nan, as nnU-Net has it. If one is, the overlap is 0 and the distances are
    nan: a missing value, which tables count.

    Args:
        prediction: mask of any dimension.
        reference: mask of the same shape.
        spacing: millimeters per axis, in the order of the array's axes.

    Raises:
        ValueError: the shapes differ, or the spacing has another number of axes.
    """
    if prediction.shape != reference.shape or len(spacing) != prediction.ndim:
        raise ValueError(f"shapes {prediction.shape} and {reference.shape}, spacing {tuple(spacing)}")
    in_prediction, in_reference = int(prediction.sum()), int(reference.sum())
    total = in_prediction + in_reference
    if total == 0:
        return CaseMetrics()
    common = int(np.count_nonzero(prediction & reference))
    dice, jaccard = 2 * common / total, common / (total - common)
    if in_prediction == 0 or in_reference == 0:
        return CaseMetrics(dice, jaccard)

    # Beyond the box that holds both masks, and a margin, there is background only: the result is the same and the work
    # far less. Without the margin, an axis along which the masks have one voxel would look like that of a flat image.
    box = _bounding_box(prediction | reference)
    prediction, reference = prediction[box], reference[box]
    millimeters = _summarize(*surface_distances(prediction, reference, spacing))
    voxels = _summarize(*surface_distances(prediction, reference, [1.0] * prediction.ndim))
    return CaseMetrics(dice, jaccard, *millimeters, *voxels)


def surface_distances(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances from each surface voxel of the prediction to the reference's surface, and the other way round.

    Both masks must hold a voxel. An axis of one voxel does not count, so that the slice of a two-dimensional case has
    an outline and is not surface altogether.
    """
    axes = tuple(axis for axis, length in enumerate(prediction.shape) if length > 1)
    keep = tuple(slice(None) if axis in axes else 0 for axis in range(prediction.ndim))
    if not axes:  # a single voxel is its own surface
        return np.zeros(1), np.zeros(1)
    step = [spacing[axis] for axis in axes]
    surfaces = [_surface(mask[keep]) for mask in (prediction, reference)]
    distances = [distance_transform_edt(~surface, sampling=step) for surface in surfaces]
    return distances[1][surfaces[0]], distances[0][surfaces[1]]


def evaluate_case(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    labels: Labels,
    spacing: Sequence[float],
    *,
    ignore_label: int | None = None,
) -> dict[str, CaseMetrics]:
    """Metrics of each structure of a label map.

    Args:
        prediction: label map.
        reference: label map of the same shape.
        labels: label values by structure.
        spacing: millimeters per axis, in the order of the array's axes.
        ignore_label: voxels with this value in the reference count for neither side.
    """
    counts = np.ones(reference.shape, bool) if ignore_label is None else reference != ignore_label
    return {
        name: structure_metrics(np.isin(prediction, value) & counts, np.isin(reference, value) & counts, spacing)
        for name, value in labels.items()
    }


def _summarize(to_reference: NDArray[np.float64], to_prediction: NDArray[np.float64]) -> tuple[float, float, float]:
    """HD95, ASD and ASSD of the distances of both directions."""
    pooled = np.concatenate([to_reference, to_prediction])
    return float(np.percentile(pooled, 95)), float(to_reference.mean()), float(pooled.mean())


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~binary_erosion(mask, generate_binary_structure(mask.ndim, 1))


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """With a margin of one voxel, where the image goes on."""
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(int(occupied[0]) - 1, 0), int(occupied[-1]) + 2))
    return tuple(box)
