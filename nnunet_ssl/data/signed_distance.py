"""Signed distance maps of a segmentation, as targets that ride with nnU-Net's labeled batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import edt
import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import binary_erosion, find_objects
from torch import Tensor

from nnunet_ssl.data.labeled_targets import LabeledTarget


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

    >>> signed_distance_map(np.array([[0, 0, 1, 1, 1]], dtype=bool), spacing=(1.0, 1.0)).tolist()
    [[1.0, 0.5, -0.0, -0.5, -1.0]]
    """
    found = list(_maps_of_present(np.ascontiguousarray(mask, dtype=bool).view(np.uint8), [1], spacing))
    return found[0][1] if found else np.ones(mask.shape, dtype=np.float32)


def _maps_of_present(
    labels: np.ndarray, wanted: Sequence[int], spacing: Sequence[float]
) -> Iterator[tuple[int, np.ndarray]]:
    """Index in ``wanted`` and distance map of each label that is present; the others cost nothing."""
    boxes = find_objects(labels)
    for index, label in enumerate(wanted):
        box = boxes[label - 1] if label <= len(boxes) else None
        if box is not None:
            yield index, _map_within(labels, label, box, spacing)


def _map_within(labels: np.ndarray, label: int, box: tuple[slice, ...], spacing: Sequence[float]) -> np.ndarray:
    # All but the distances themselves needs the structure's box alone, with its neighbors around it.
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
    inside = labels[box] == label
    boundary = inside & ~binary_erosion(inside, border_value=1)
    if not boundary.any():
        return np.full(labels.shape, -1.0, dtype=np.float32)
    elsewhere = np.ones(labels.shape, dtype=bool)
    elsewhere[box] = ~boundary
    signed = edt.edt(elsewhere, anisotropy=tuple(map(float, spacing)), parallel=1).reshape(labels.shape)
    within = signed[box]
    depth = within[inside]
    within[inside] = 0.0
    signed /= signed.max()
    within[inside] = -depth / max(depth.max(), np.finfo(np.float32).tiny)
    return signed


class SignedDistanceMaps(LabeledTarget):
    """Signed distance maps of the structures that are in a patch; :func:`of_all_structures` adds the others.

    A patch holds few of many classes, and the map of an absent one is +1 everywhere. Half precision is
    within 0.00025 of a value in [-1, 1].

    Args:
        spacing: of the voxels along each axis of a patch, in mm. **[choice]** The patch's rotation and scaling in the
            augmentation do not change it.
        labels: the foreground classes, or None where the segmentation holds regions.
        regions: how many regions.

    >>> target = SignedDistanceMaps((1.0, 1.0), labels=[1, 2])
    >>> maps, places = target(torch.tensor([[[[0, 0, 1]]], [[[2, 2, 0]]]]))
    >>> maps.shape, places.tolist()  # class 1 in the first patch, class 2 in the second
    (torch.Size([2, 1, 3]), [0, 3])
    """

    def __init__(self, spacing: Sequence[float], *, labels: Sequence[int] | None, regions: int = 0) -> None:
        self.spacing = tuple(spacing)
        self.labels = None if labels is None else tuple(labels)
        self.structures = regions if labels is None else len(labels)

    @classmethod
    def of_dataset(cls, labels: LabelManager, spacing: Sequence[float]) -> SignedDistanceMaps:
        """Of all foreground classes or regions of a dataset.

        Args:
            labels: nnU-Net's label manager of the dataset.
            spacing: of the voxels along each axis of a patch, in mm.
        """
        if labels.has_regions:
            return cls(spacing, labels=None, regions=labels.num_segmentation_heads)
        return cls(spacing, labels=labels.foreground_labels)

    def __call__(self, segmentation: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (P, *spatial), float16, and (P,) int64, the place of each among the B x K of all structures."""
        places, maps = [], []
        for number, sample in enumerate(segmentation.to(torch.int16).numpy()):
            for structure, found in self._of_sample(sample):
                places.append(number * self.structures + structure)
                maps.append(torch.from_numpy(found).half())
        stacked = torch.stack(maps) if maps else torch.empty(0, *segmentation.shape[2:], dtype=torch.float16)
        return stacked, torch.tensor(places, dtype=torch.int64)

    def _of_sample(self, sample: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        if self.labels is not None:
            yield from _maps_of_present(sample[0], self.labels, self.spacing)
            return
        for region in range(self.structures):
            for _, found in _maps_of_present((sample[region] > 0).view(np.uint8), [1], self.spacing):
                yield region, found

    def largest(self, batch_size: int, patch_size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As of patches that hold all structures."""
        count = batch_size * self.structures
        return torch.empty(count, *patch_size, dtype=torch.float16), torch.empty(count, dtype=torch.int64)


def of_all_structures(like: Tensor, maps: Tensor, places: Tensor) -> Tensor:
    """The maps of all structures: those that are there at their places, +1 for the others.

    Args:
        like: (B, K, *spatial).
        maps: (P, *spatial), as :class:`SignedDistanceMaps` makes them.
        places: (P,), int64.

    Returns:
        A tensor of the shape, type and device of ``like``.

    >>> of_all_structures(torch.zeros(1, 2, 3), torch.tensor([[0.5, 0.0, -1.0]]), torch.tensor([1]))
    tensor([[[ 1.0000,  1.0000,  1.0000],
             [ 0.5000,  0.0000, -1.0000]]])
    """
    full = torch.ones_like(like, requires_grad=False).flatten(0, 1)
    return full.index_copy_(0, places, maps.to(full.dtype)).unflatten(0, like.shape[:2])
