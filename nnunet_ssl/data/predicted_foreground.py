"""Where the network has lately predicted foreground, so that unlabeled patches are cropped there too.

Randomly cropped patches of a whole scan rarely hold a small organ. nnU-Net centers a share of the labeled patches on
foreground; of unlabeled images only the network can tell where that may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A class is rare if fewer of the randomly cropped labeled patches hold it: nnU-Net centers as many on foreground.
RARE = 1 / 3
# Coordinates of a patch are kept for one voxel of so many along each axis.
STRIDE = 4

_VOXELS, _BYTES = 8, 2**24


class Aim(NamedTuple):
    """What a patch is centered on.

    Attributes:
        structure: class or region, counted from 0 without the background; -1 for a randomly cropped patch.
        voxel: (3,) int32, in the preprocessed image; within it or, rarely, not.
    """

    structure: int
    voxel: NDArray[np.int32]


ANYWHERE = Aim(-1, np.full(3, -1, np.int32))


class PredictedForeground:
    """For each case and rare class a few voxels, in memory that the loader's workers share with the training process.

    The training process writes and the workers read, without waiting for each other: a voxel may be a mixture of two.
    However many cases there are, this takes 16 MiB, or 12 bytes for each of their classes where that is more.

    Args:
        keys: the unlabeled cases.
        structures: number of classes or regions, without the background.

    Attributes:
        structures: that number.
    """

    def __init__(self, keys: Sequence[str], structures: int) -> None:
        self.structures = structures
        self._rows = {key: row for row, key in enumerate(keys)}
        slots = max(1, min(_VOXELS, _BYTES // (12 * len(keys) * structures)))
        self._voxels = torch.full((len(keys), structures, slots, 3), -1, dtype=torch.int32).share_memory_()
        self._rare = torch.zeros(structures, dtype=torch.bool).share_memory_()

    @property
    def rare(self) -> list[int]:
        """Classes or regions of which voxels are kept."""
        return np.flatnonzero(self._rare.numpy()).tolist()

    @rare.setter
    def rare(self, structures: Sequence[int]) -> None:
        for structure in range(len(self._rare)):
            self._rare[structure] = structure in structures

    def choose_rare(self, shares: Sequence[float]) -> bool:
        """Take those for rare that few labeled patches hold; returns whether they are others than before.

        Args:
            shares: for each class or region, the share of randomly cropped labeled patches that hold it.
        """
        before = self.rare
        self.rare = [number for number, share in enumerate(shares) if share < RARE]
        return self.rare != before

    def draw(self, key: str) -> Aim:
        """A voxel of the case to center a patch on, of any rare class alike; ANYWHERE if none is known."""
        voxels = self._voxels[self._rows[key]].numpy()
        known = [structure for structure in self.rare if (voxels[structure, :, 0] >= 0).any()]
        if not known:
            return ANYWHERE
        structure = known[np.random.randint(len(known))]
        of_structure = voxels[structure]
        of_structure = of_structure[of_structure[:, 0] >= 0]
        # Between the two looks another process may have removed the last one.
        return Aim(structure, of_structure[np.random.randint(len(of_structure))]) if len(of_structure) else ANYWHERE

    def put(self, key: str, aim: Aim) -> None:
        """Keep a voxel, in place of another one where there are as many as there may be."""
        voxels = self._voxels[self._rows[key], aim.structure].numpy()
        free = np.flatnonzero(voxels[:, 0] < 0)
        voxels[free[0] if len(free) else np.random.randint(len(voxels))] = aim.voxel

    def remove(self, key: str, aim: Aim) -> None:
        """Forget a voxel; nothing happens if it is not kept any more."""
        voxels = self._voxels[self._rows[key], aim.structure].numpy()
        voxels[(voxels == aim.voxel).all(1)] = -1

    def update(
        self, key: str, aim: Aim, voxels: NDArray[np.integer], patch_size: Sequence[int], coordinates: Tensor
    ) -> None:
        """Keep a voxel of each rare class that is predicted in a patch; forget the patch's aim where it is not.

        Args:
            key: the case.
            aim: what the patch was centered on.
            voxels: (K,), for each class or region a voxel of the patch that is predicted as it, or -1, as
                :func:`draw_voxels` draws them.
            patch_size: of the patch.
            coordinates: :func:`subsampled` coordinates of the patch's voxels in the case, (3, *subsampled).
        """
        known = coordinates.numpy()
        for structure in self.rare:
            if voxels[structure] >= 0:
                at = np.unravel_index(voxels[structure], tuple(patch_size))
                nearest = (slice(None), *(min(v // STRIDE, n - 1) for v, n in zip(at, known.shape[1:], strict=True)))
                self.put(key, Aim(structure, known[nearest].round().clip(min=0).astype(np.int32)))
            elif aim.structure == structure:
                self.remove(key, aim)


def draw_voxels(labels: Tensor, values: int) -> Tensor:
    """For each row and each label, one of the voxels that have it, any of them alike; on a GPU without waiting for it.

    Args:
        labels: (S, N), integer or bool, in [0, ``values``).
        values: number of labels.

    Returns:
        (S, ``values``), int32: the voxel's index in [0, N), or -1 where no voxel of the row has the label.
    """
    rows, voxels = labels.shape
    places = torch.arange(rows * values + 1, dtype=torch.int32, device=labels.device)
    # One list of all rows: equal labels of a row lie together once it is sorted.
    ordered, order = (labels + places[:-1:values, None]).flatten().sort(stable=True)
    bounds = torch.searchsorted(ordered, places)
    first, end = bounds[:-1], bounds[1:]
    drawn = first + (torch.rand(len(first), device=labels.device) * (end - first)).long()
    # A product may be rounded up to the count. Where there is none, any voxel will do.
    voxel = order[torch.minimum(drawn, end - 1).clamp(min=0)] % voxels
    return torch.where(end > first, voxel, -1).to(torch.int32).view(rows, values)


def coordinates_of(box: Sequence[Sequence[int]]) -> Tensor:
    """Each voxel's coordinates in the image from which a box is cut: (3, *box size), float32."""
    return torch.stack(torch.meshgrid(*(torch.arange(low, high) for low, high in box), indexing="ij")).float()


def subsampled(coordinates: Tensor) -> Tensor:
    """Of (3, *patch size), one voxel of STRIDE along each axis; of a short axis its middle."""
    for axis, size in enumerate(coordinates.shape[1:], start=1):
        coordinates = coordinates.index_select(axis, torch.arange(min(STRIDE, size) // 2, size, STRIDE))
    return coordinates
