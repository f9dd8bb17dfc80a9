"""What the predictions of several models say of a case: agreement, entropy, volumes, and a verdict.

The mean Dice of pairs of models was the most robust score of a segmentation's failure in the comparison of Zenk et al.,
Comparative Benchmarking of Failure Detection Methods in Medical Image Segmentation, 2024 (arXiv 2406.03323).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from nnunet_ssl.data.queue import FIRST, LOOK, RELIABLE, StructureRow

Labels = Mapping[str, "int | Sequence[int]"]

RELIABLE_DICE = 0.9
"""Two raters of an organ seldom agree better, so a person would hardly change such a case."""
FIRST_DICE = 0.7
"""Below it, one of the models is wrong by more than two raters differ."""
VOLUME_MARGIN = 1.5
"""How far beyond the labeled cases' range a volume is not remarkable: of few labeled cases, the range is narrow."""

ENTROPY_STEP = 1 / 1024
"""Of the uncertainty map: float16 holds its multiples exactly, and a file of them compresses well."""

# Sums of products of 0 and 1 are exact in single precision up to 2 ** 24.
_CHUNK = 2**20


@dataclass(frozen=True)
class Scores:
    """What was measured of a case. What is not known is nan.

    Attributes:
        entropy: mean of the map over all voxels that any model or the consensus calls foreground.
        structures: by class or region.
    """

    entropy: float
    structures: Mapping[str, StructureRow]

    @property
    def dice(self) -> float:
        """Mean over the structures of the mean Dice of all pairs of models."""
        return float(np.mean([one.dice for one in self.structures.values()]))


@dataclass(frozen=True)
class LabeledRange:
    """A structure in the labeled cases.

    Attributes:
        smallest: volume in milliliters.
        largest: volume in milliliters.
    """

    smallest: float
    largest: float


def entropy_map(probabilities: NDArray[np.floating], *, regions: bool) -> NDArray[np.float32]:
    """Entropy of a prediction in each voxel: 0 where it is certain, 1 where it could not be less so.

    Args:
        probabilities: (C, *spatial), of the classes, background first, or of the regions.
        regions: of classes, the entropy is divided by that of C equal probabilities; of regions, which do not exclude
            each other, it is the mean of the binary entropies in bits.

    Returns:
        (*spatial), in multiples of 1/1024, which float16 holds exactly.
    """
    total = np.zeros(probabilities.shape[1:], np.float32)
    for channel in probabilities:
        total += entr(channel)
        if regions:
            total += entr(1 - channel)
    total /= len(probabilities) * math.log(2) if regions else math.log(len(probabilities))
    np.clip(total, 0, 1, out=total)
    return np.rint(total / ENTROPY_STEP, dtype=np.float32) * np.float32(ENTROPY_STEP)


def pairwise_dice(label_maps: Sequence[NDArray[np.integer]], labels: Labels) -> dict[str, float]:
    """Mean Dice of all pairs of models, by structure; nan for one model.

    Two models that both find nothing agree: their Dice is 1. If one of them finds something, it is 0.

    Args:
        label_maps: one a model, of the same shape.
        labels: label values by structure.
    """
    count = len(label_maps)
    if count < 2:
        return dict.fromkeys(labels, math.nan)
    flat = [one.reshape(-1) for one in label_maps]
    first, second = np.triu_indices(count, 1)
    common = {name: np.zeros((count, count)) for name in labels}
    for begin in range(0, flat[0].size, _CHUNK):
        chunk = np.stack([one[begin : begin + _CHUNK] for one in flat])
        chunk = chunk[:, chunk.any(axis=0)]
        if not chunk.size:
            continue
        for name, value in labels.items():
            masks = np.isin(chunk, value).astype(np.float32)
            common[name] += masks @ masks.T
    dice = {}
    for name, table in common.items():
        sizes = np.diag(table)
        total = sizes[first] + sizes[second]
        pairs = np.where(total > 0, 2 * table[first, second] / np.maximum(total, 1), 1.0)
        dice[name] = float(pairs.mean())
    return dice


def disagreement_map(label_maps: Sequence[NDArray[np.integer]]) -> NDArray[np.uint8]:
    """1 where the models' label maps are not all equal."""
    differ = np.zeros(label_maps[0].shape, bool)
    for one in label_maps[1:]:
        differ |= one != label_maps[0]
    return differ.astype(np.uint8)


def score(
    consensus: NDArray[np.integer],
    label_maps: Sequence[NDArray[np.integer]],
    entropy: NDArray[np.float32],
    labels: Labels,
    spacing: Sequence[float],
) -> Scores:
    """Measure a case.

    Args:
        consensus: label map (Z, Y, X).
        label_maps: of the models.
        entropy: :func:`entropy_map` of their mean prediction.
        labels: label values by structure.
        spacing: millimeters per axis; see :func:`volumes`.
    """
    foreground = consensus > 0
    for one in label_maps:
        foreground |= one > 0
    dice, of_volume = pairwise_dice(label_maps, labels), volumes(consensus, labels, spacing)
    structures = {
        name: StructureRow(dice[name], of_volume[name], components(consensus, value)) for name, value in labels.items()
    }
    return Scores(float(entropy[foreground].mean()) if foreground.any() else math.nan, structures)


def volumes(label_map: NDArray[np.integer], labels: Labels, spacing: Sequence[float]) -> dict[str, float]:
    """Volumes in milliliters, by structure.

    Args:
        label_map: (Z, Y, X).
        labels: label values by structure.
        spacing: millimeters per axis. A two-dimensional image, one voxel along the first axis, counts as 1 mm thick;
            nnU-Net's readers give it a spacing there that means nothing.
    """
    thickness = 1.0 if label_map.shape[0] == 1 else float(spacing[0])
    milliliters = thickness * math.prod(map(float, spacing[1:])) / 1000
    counts = np.bincount(label_map.reshape(-1))
    return {
        name: milliliters * sum(int(counts[one]) for one in np.unique(value) if one < len(counts))
        for name, value in labels.items()
    }


def components(label_map: NDArray[np.integer], value: int | Sequence[int]) -> int:
    """How many parts a structure has that do not touch, not even at a corner."""
    mask = np.isin(label_map, value)
    if not mask.any():
        return 0
    return int(cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26, return_N=True)[1])


def judge(
    scores: Scores, labeled: Mapping[str, LabeledRange], *, reliable: float, first: float, models: int
) -> tuple[str, str]:
    """A verdict and its reason.

    Label first: the models' Dice, averaged over the structures, is below ``first``. Reliable: it is at least
    ``reliable``, no structure is below ``first``, and no volume is remarkable: 0 where every labeled case has the
    structure, or outside the labeled cases' range by more than :data:`VOLUME_MARGIN`. Look at it: all others, and
    whatever one model alone has predicted, since nothing shows how far it can be trusted.
    """
    remarks = [text for name, one in scores.structures.items() if (text := _volume_remark(name, one, labeled))]
    if models < 2:
        return LOOK, "; ".join(["one model alone: sorted by entropy", *remarks])
    worst = min(scores.structures, key=lambda name: scores.structures[name].dice)
    lowest = scores.structures[worst].dice
    agreement = f"the models disagree: Dice {scores.dice:.2f}"
    if len(scores.structures) > 1:
        agreement += f", lowest for {worst} ({lowest:.2f})"
    if scores.dice < first:
        return FIRST, "; ".join([agreement, *remarks])
    if scores.dice < reliable:
        remarks.insert(0, agreement)
    elif lowest < first:
        remarks.insert(0, f"the models disagree on {worst}: Dice {lowest:.2f}")
    if remarks:
        return LOOK, "; ".join(remarks)
    return RELIABLE, f"the models agree: Dice {scores.dice:.2f}"


def _volume_remark(name: str, one: StructureRow, labeled: Mapping[str, LabeledRange]) -> str | None:
    known = labeled.get(name)
    if known is None:
        return None
    if one.volume == 0:
        return f"{name} is missing, which every labeled case has" if known.smallest > 0 else None
    if known.smallest / VOLUME_MARGIN <= one.volume <= known.largest * VOLUME_MARGIN:
        return None
    size = "small" if one.volume < known.smallest else "large"
    return f"{name} is {size}: {one.volume:.3g} ml, labeled cases have {known.smallest:.3g} to {known.largest:.3g}"
