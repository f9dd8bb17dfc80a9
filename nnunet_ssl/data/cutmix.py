"""Boxes that are pasted from one image into another: how they are drawn and applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CutMix:
    """How boxes are drawn (CrossMatch, after Yun et al., CutMix, ICCV 2019).

    Attributes:
        probability: share of samples that get a box.
        volume: least and largest share of the patch that a box covers; uniform in between.
        aspect_ratio: smallest ratio between two sides, each side relative to the patch's; at most its inverse.

    >>> CutMix(probability=1.0).draw(batch_size=2, patch_size=(32, 32)).shape
    (2, 2, 2)
    >>> first, last = CutMix(1.0, volume=(0.25, 0.25), aspect_ratio=1.0).draw(1, (32, 32))[0].T
    >>> (last - first).tolist()  # a box of one size: half of each side
    [16, 16]
    """

    probability: float = 0.5
    volume: tuple[float, float] = (0.02, 0.4)
    aspect_ratio: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is {self.probability!r}; it is a share, from 0 to 1.")
        # Outside of these ranges no box has the volume, or none the ratio, and drawing would never end.
        volume = tuple(self.volume) if isinstance(self.volume, (tuple, list)) else ()
        if len(volume) != 2 or not 0 < volume[0] <= volume[1] < 1:
            raise ValueError(f"volume is {self.volume!r}; give the least and the largest share, above 0 and below 1.")
        if not 0 < self.aspect_ratio <= 1:
            raise ValueError(f"aspect_ratio is {self.aspect_ratio!r}; it is a ratio above 0 and at most 1.")

    def draw(self, batch_size: int, patch_size: Sequence[int]) -> np.ndarray:
        """One box per sample, drawn with NumPy's global state, which batchgenerators seeds in every worker.

        Returns:
            (B, dim, 2), int64: first voxel and the voxel after the last, per axis in the order of ``patch_size``.
            A sample without a box has an empty one.
        """
        boxes = np.zeros((batch_size, len(patch_size), 2), dtype=np.int64)
        for box in boxes:
            if np.random.uniform() < self.probability:
                sides = self._relative_sides(len(patch_size))
                size = np.clip(np.round(sides * np.asarray(patch_size)), 1, patch_size).astype(np.int64)
                box[:, 0] = [np.random.randint(0, full - side + 1) for full, side in zip(patch_size, size, strict=True)]
                box[:, 1] = box[:, 0] + size
        return boxes

    def _relative_sides(self, dim: int) -> np.ndarray:
        # Sides are relative to the patch, so that a thin anisotropic patch has room for every volume. Ratios are
        # log-uniform, so that no axis is preferred; those that do not fit the patch are drawn again, at the same
        # volume, so that the volume stays uniform.
        volume = np.random.uniform(*self.volume)
        limit = -np.log(self.aspect_ratio)
        while True:
            log_sides = np.append(np.random.uniform(-limit, limit, dim - 1), 0.0)
            log_sides += (np.log(volume) - log_sides.sum()) / dim
            if log_sides.max() <= 0 and np.ptp(log_sides) <= limit:
                return np.exp(log_sides)


def random_boxes(count: int, patch_size: Sequence[int], *, fraction: float, device: torch.device) -> Tensor:
    """Boxes of one size anywhere inside the patch, drawn on the training device with PyTorch's global state.

    Args:
        count: of boxes.
        patch_size: the dim sizes of the patch.
        fraction: of a side of the box to the patch's, in (0, 1]; rounded down to voxels, at least one.
        device: of the result.

    Returns:
        (count, dim, 2), int64, as :func:`box_mask` takes them.

    Raises:
        ValueError: the fraction is 0 or less, or above 1.

    >>> boxes = random_boxes(5, (12, 30), fraction=2 / 3, device=torch.device("cpu"))
    >>> (boxes[..., 1] - boxes[..., 0]).unique(dim=0).tolist()
    [[8, 20]]
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction:g}; the side of a box is a share of the patch's: above 0, at most 1.")
    axes = []
    for full in patch_size:
        side = max(1, int(full * fraction))
        first = torch.randint(full - side + 1, (count,), device=device)
        axes.append(torch.stack((first, first + side), 1))
    return torch.stack(axes, 1)


def box_mask(boxes: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Boxes as a mask.

    Args:
        boxes: (B, dim, 2), integer, as :meth:`CutMix.draw` returns them.
        patch_size: the dim sizes of the patch.

    Returns:
        (B, 1, *patch_size), bool, True inside a sample's box.

    >>> box_mask(torch.tensor([[[1, 3], [0, 2]]]), (4, 3)).int()
    tensor([[[[0, 0, 0],
              [1, 1, 0],
              [1, 1, 0],
              [0, 0, 0]]]], dtype=torch.int32)
    """
    dim = len(patch_size)
    mask = torch.ones((), dtype=torch.bool, device=boxes.device)
    for axis, size in enumerate(patch_size):
        position = torch.arange(size, device=boxes.device)
        inside = (position >= boxes[:, axis, :1]) & (position < boxes[:, axis, 1:])
        mask = mask & inside.view(len(boxes), 1, *[size if a == axis else 1 for a in range(dim)])
    return mask


def paste(tensor: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    """Each sample with its partner's voxels inside the box: s (1 - m) + s[π] m.

    Args:
        tensor: (B, C, *spatial), of any type: images, pseudo-labels or confidences.
        mask: (B, 1, *spatial), bool.
        partner: (B,), the index of each sample's partner.

    >>> images, mask = torch.tensor([[[1, 1, 1]], [[2, 2, 2]]]), torch.tensor([[[False, True, True]]]).expand(2, 1, 3)
    >>> paste(images, mask, partner=torch.tensor([1, 0]))
    tensor([[[1, 2, 2]],
    <BLANKLINE>
            [[2, 1, 1]]])
    """
    return torch.where(mask, tensor[partner], tensor)
