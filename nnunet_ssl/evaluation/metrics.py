"""Overlap and surface distances of a segmentation, by the definitions of MedPy that most papers report.

A surface voxel belongs to the mask but not to its erosion by a cross (face neighbors); beyond the image's edge lies
background. Distances are exact and take the spacing into account.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure

from nnunet_ssl.errors import UserError

Labels = Mapping[str, "int | Sequence[int]"]
"""Label values by structure, or several values for a region, as in nnU-Net's dataset.json; without background."""


@dataclass(frozen=True)
class CaseMetrics:
    """One structure in one case. What is undefined is nan: see :func:`structure_metrics`.

    Attributes:
        dice: Dice similarity coefficient, 0 to 1.
        jaccard: intersection over union, 0 to 1.
        hd95: 95th percentile of the surface distances of both directions pooled, in millimeters.
        hd95_voxels: the same in voxels, that is with a spacing of 1.
        asd: mean distance from the prediction's surface to the reference's, in millimeters.
    """

    dice: float
    jaccard: float
    hd95: float
    hd95_voxels: float
    asd: float


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
        return CaseMetrics(math.nan, math.nan, math.nan, math.nan, math.nan)
    common = int(np.count_nonzero(prediction & reference))
    dice, jaccard = 2 * common / total, common / (total - common)
    if in_prediction == 0 or in_reference == 0:
        return CaseMetrics(dice, jaccard, math.nan, math.nan, math.nan)

    # Outside the box that holds both masks there is background only: the result is the same and the work far less.
    box = _bounding_box(prediction | reference)
    prediction, reference = prediction[box], reference[box]
    to_reference, to_prediction = surface_distances(prediction, reference, spacing)
    voxels = np.concatenate(surface_distances(prediction, reference, [1.0] * prediction.ndim))
    return CaseMetrics(
        dice=dice,
        jaccard=jaccard,
        hd95=float(np.percentile(np.concatenate([to_reference, to_prediction]), 95)),
        hd95_voxels=float(np.percentile(voxels, 95)),
        asd=float(to_reference.mean()),
    )


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


def evaluate_folder(
    predictions: Path, references: Path, *, labels: Labels, file_ending: str, ignore_label: int | None = None
) -> list[CaseResult]:
    """Evaluate each prediction against the reference of the same name.

    Args:
        predictions: folder with one label map per case.
        references: folder with the references; those without a prediction are left out.
        labels: label values by structure.
        file_ending: the dataset's, such as ``.nii.gz``.
        ignore_label: see :func:`evaluate_case`.

    Returns:
        One result per case, sorted by name.

    Raises:
        UserError: no predictions, a missing reference, an unreadable file, or geometries that differ.
    """
    files = sorted(file for file in Path(predictions).glob(f"*{file_ending}") if not file.name.startswith("."))
    if not files:
        raise UserError(f"No prediction that ends in {file_ending} lies in {predictions}.")
    results = []
    for file in files:
        reference_file = Path(references) / file.name
        if not reference_file.is_file():
            raise UserError(f"The prediction {file} has no reference: {reference_file} does not exist.")
        prediction, reference = _read(file), _read(reference_file)
        _check_geometry(prediction, reference, file, reference_file)
        metrics = evaluate_case(
            sitk.GetArrayFromImage(prediction),
            sitk.GetArrayFromImage(reference),
            labels,
            tuple(reversed(reference.GetSpacing())),
            ignore_label=ignore_label,
        )
        results.append(CaseResult(file.name[: -len(file_ending)], metrics))
    return results


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~binary_erosion(mask, generate_binary_structure(mask.ndim, 1))


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def _read(file: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(file))
    except RuntimeError as error:
        raise UserError(f"{file} cannot be read as an image: is the file complete?") from error


def _check_geometry(prediction: sitk.Image, reference: sitk.Image, file: Path, reference_file: Path) -> None:
    def differs(what: str, of_prediction: Sequence[float], of_reference: Sequence[float]) -> UserError:
        return UserError(
            f"The {what} of {file}, {tuple(of_prediction)}, differs from {tuple(of_reference)} of {reference_file}. "
            "Predict on the images that the references belong to."
        )

    if prediction.GetSize() != reference.GetSize():
        raise differs("size", prediction.GetSize(), reference.GetSize())
    step = min(reference.GetSpacing())
    # NIfTI keeps single precision: allow a thousandth of a voxel.
    for what, one, other, tolerance in (
        ("spacing", prediction.GetSpacing(), reference.GetSpacing(), 1e-3 * step),
        ("origin", prediction.GetOrigin(), reference.GetOrigin(), 1e-2 * step),
        ("direction", prediction.GetDirection(), reference.GetDirection(), 1e-3),
    ):
        if not np.allclose(one, other, rtol=1e-5, atol=tolerance):
            raise differs(what, one, other)
