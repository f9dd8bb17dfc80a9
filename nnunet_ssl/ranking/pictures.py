"""Three slices of a case, with the consensus' contours and what the models disagree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from nnunet_ssl.evaluation.pictures import COLORS

HEIGHT = 200
"""Of a picture, in pixels."""
DISAGREEMENT = "#ff00ff"

_WIDEST = 1.5  # times the height
_GAP = 6
_LINE = 2


def structure_colors(names: Sequence[str]) -> dict[str, str]:
    """Colors by class or region, in the order of the labels; they come again after eight."""
    return {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}


def draw(
    file: Path,
    image: NDArray[np.floating],
    consensus: NDArray[np.integer],
    disagreement: NDArray[np.uint8],
    labels: Mapping[str, int | Sequence[int]],
    spacing: Sequence[float],
) -> None:
    """Write a PNG: of each axis the slice with the largest disagreement, or else with most of the structures.

    Args:
        file: the picture.
        image: one channel, (Z, Y, X); with one slice alone, that one is drawn.
        consensus: label map of the same shape.
        disagreement: 1 where the models are not of one mind.
        labels: label values by structure.
        spacing: millimeters per axis.
    """
    panels = []
    for axis in (0,) if len(image) == 1 else (0, 1, 2):
        index = _slice_of_interest(consensus, disagreement, axis)
        flat = [np.take(one, index, axis) for one in (image, consensus, disagreement)]
        if axis:
            # Along these axes, slices are stacked from the feet to the head.
            flat = [one[::-1] for one in flat]
        rows, columns = (float(size) for other, size in enumerate(spacing) if other != axis)
        panels.append(_panel(flat[0], flat[1], flat[2], labels, rows, columns))
        panels.append(np.ones((HEIGHT, _GAP, 3)))
    matplotlib.image.imsave(str(file), np.concatenate(panels[:-1], axis=1), format="png")


def _slice_of_interest(consensus: NDArray[np.integer], disagreement: NDArray[np.uint8], axis: int) -> int:
    others = tuple(other for other in range(3) if other != axis)
    for of_interest in (disagreement, consensus):
        counts = np.count_nonzero(of_interest, axis=others)
        if counts.any():
            return int(np.argmax(counts))
    return consensus.shape[axis] // 2


def _panel(
    image: NDArray[np.floating],
    consensus: NDArray[np.integer],
    disagreement: NDArray[np.uint8],
    labels: Mapping[str, int | Sequence[int]],
    rows: float,
    columns: float,
) -> NDArray[np.float64]:
    """One slice, (HEIGHT, width, 3), with pixels as wide as high."""
    width = HEIGHT * image.shape[1] * columns / (image.shape[0] * rows)
    size = (HEIGHT, round(min(max(width, HEIGHT / _WIDEST), HEIGHT * _WIDEST)))
    low, high = np.percentile(image, [1, 99.5])
    gray = np.clip((_stretched(image, size) - low) / max(high - low, 1e-6), 0, 1)
    panel = np.repeat(gray[..., None], 3, axis=2).astype(np.float64)
    shaded = _stretched(disagreement, size) > 0
    panel[shaded] = 0.55 * panel[shaded] + 0.45 * np.array(to_rgb(DISAGREEMENT))
    segmentation = _stretched(consensus, size)
    for (name, color), value in zip(structure_colors(list(labels)).items(), labels.values(), strict=True):
        mask = np.isin(segmentation, value)
        # Regions share contours: each line is drawn one pixel further inside than the one before.
        mask = binary_erosion(mask, iterations=1 + list(labels).index(name) % 3) if _has_region(labels) else mask
        panel[mask & ~binary_erosion(mask, iterations=_LINE)] = to_rgb(color)
    return panel


def _has_region(labels: Mapping[str, int | Sequence[int]]) -> bool:
    return any(not isinstance(value, int) for value in labels.values())


def _stretched(flat: NDArray, size: tuple[int, int]) -> NDArray:
    """The nearest pixel of a slice for each pixel of a panel."""
    rows = (np.arange(size[0]) * flat.shape[0] // size[0]).astype(int)
    columns = (np.arange(size[1]) * flat.shape[1] // size[1]).astype(int)
    return flat[rows][:, columns]
