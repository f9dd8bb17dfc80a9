"""Signed distance maps of a segmentation, as targets that ride with nnU-Net's labeled batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import edt
import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import SegOnlyTransform
from scipy.ndimage import binary_erosion
from torch import Tensor


def signed_distance_map(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance to the boundary of a structure, negative inside, positive outside, 0 on the boundary.

    **[choice]** The boundary is the structure's voxels with a neighbor outside of it; what lies beyond the patch is not
    known and bounds nothing. Inside and outside are each divided by their own maximum in the patch. **[choice]** A
    structure that is absent is +1 everywhere, one that fills the patch -1.

    Source: You et al., SimCVD, IEEE TMI 2022, section III; Ma et al., How distance transform maps boost segmentation
    CNNs, MIDL 2020.

    Args:
        mask: (*spatial), bool.
        spacing: of the voxels along each axis, in mm.

    Returns:
        (*spatial), float32, in [-1, 1].
    """
    mask = np.ascontiguousarray(mask, dtype=bool)
    boundary = mask & ~binary_erosion(mask, border_value=1)
    if not boundary.any():
        return np.full(mask.shape, -1.0 if mask.any() else 1.0, dtype=np.float32)
    distance = edt.edt(~boundary, anisotropy=tuple(map(float, spacing)), parallel=1).reshape(mask.shape)
    signed = np.zeros(mask.shape, dtype=np.float32)
    for side, sign in ((mask, -1.0), (~mask, 1.0)):
        farthest = distance[side].max(initial=0.0)
        if farthest > 0:
            signed[side] = sign * distance[side] / farthest
    return signed


class SignedDistanceTransform(SegOnlyTransform):
    """Append the signed distance maps of the segmentation, (K, *spatial) float32, to nnU-Net's list of targets.

    Comes after nnU-Net's own transforms: the segmentation is then a tensor, or with deep supervision a list, full
    resolution first; of labels (1, *spatial), or of regions (R, *spatial), the ignore label last.

    Args:
        spacing: of the voxels along each axis of a patch, in mm. **[choice]** The patch's rotation and scaling in the
            augmentation do not change it.
        labels: the foreground classes, or None where the segmentation holds regions.
        regions: how many regions.
    """

    def __init__(self, spacing: Sequence[float], *, labels: Sequence[int] | None, regions: int = 0) -> None:
        super().__init__()
        self.spacing = tuple(spacing)
        self.labels = None if labels is None else tuple(labels)
        self.regions = regions

    def _apply_to_segmentation(self, segmentation: Any, **params: Any) -> list[Tensor]:
        levels = segmentation if isinstance(segmentation, list) else [segmentation]
        full = levels[0].numpy()
        if self.labels is None:
            masks = [full[region] > 0 for region in range(self.regions)]
        else:
            masks = [full[0] == label for label in self.labels]
        maps = np.stack([signed_distance_map(mask, self.spacing) for mask in masks])
        return [*levels, torch.from_numpy(maps)]
