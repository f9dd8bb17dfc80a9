"""Where the voxels of a segmentation lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Geometry:
    """Where a segmentation's voxels lie; what a file format does not tell is empty.

    Attributes:
        size: voxels per axis of the array.
        spacing: millimeters per axis of the array.
        origin: position of the first voxel in millimeters, in the file format's own axes.
        direction: of the axes, row by row.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()

    @classmethod
    def of(cls, array: NDArray[np.integer], properties: Mapping[str, Any]) -> Geometry:
        """From what nnU-Net's reader returns."""
        spacing = tuple(float(size) for size in properties["spacing"])
        if "sitk_stuff" in properties:
            stuff = properties["sitk_stuff"]
            return cls(array.shape, spacing, tuple(stuff["origin"]), tuple(stuff["direction"]))
        if "nibabel_stuff" in properties:
            affine = np.asarray(properties["nibabel_stuff"]["original_affine"])
            axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
            return cls(array.shape, spacing, tuple(affine[:3, 3]), tuple(axes.ravel()))
        return cls(array.shape, spacing)

    def difference(self, other: Geometry) -> str | None:
        """What differs from another geometry, or None."""
        if self.size != other.size:
            return f"size {_list(self.size)} is not {_list(other.size)}"
        step = min(other.spacing)
        # NIfTI keeps single precision: allow a thousandth of a voxel.
        for what, tolerance in (("spacing", 1e-3 * step), ("origin", 1e-2 * step), ("direction", 1e-3)):
            mine, theirs = getattr(self, what), getattr(other, what)
            if len(mine) != len(theirs):
                return f"{what} {_list(mine)} has not as many entries as {_list(theirs)}"
            if not np.allclose(mine, theirs, rtol=1e-5, atol=tolerance):
                return f"{what} {_list(mine)} is not {_list(theirs)}"
        return None


def _list(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
