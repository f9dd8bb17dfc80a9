"""Pictures of segmentations, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from nnunet_ssl.data.image_checks import BadImageError
from nnunet_ssl.evaluation.comparison import all_cases, scores
from nnunet_ssl.evaluation.folders import FolderResult
from nnunet_ssl.evaluation.metrics import Labels
from nnunet_ssl.evaluation.segmentations import Segmentations
from nnunet_ssl.files import ELSEWHERE, cannot_write

AXIS_LABELS = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "hd95": "HD95 (mm)",
    "asd": "ASD (mm)",
    "assd": "ASSD (mm)",
    "hd95_voxels": "HD95 (voxels)",
    "asd_voxels": "ASD (voxels)",
    "assd_voxels": "ASSD (voxels)",
}

COLORS = ("#ff5a4f", "#29b6f6", "#ffd23f", "#7bd148", "#c77dff", "#ff9f1c", "#2ec4b6", "#f78fb3")


@dataclass(frozen=True)
class Case:
    """What is drawn of one case.

    Attributes:
        title: shown above its panels; the slice's number is added.
        image: one channel, shape (z, y, x) or (y, x).
        reference: label map of the same shape.
        predictions: label maps of the same shape by name, such as the trainer's.
        spacing: millimeters per axis, in the order of the array's axes.
    """

    title: str
    image: NDArray[np.number]
    reference: NDArray[np.integer]
    predictions: Mapping[str, NDArray[np.integer]]
    spacing: Sequence[float] | None = None


def save_overlay(
    path: Path, cases: Sequence[Case], *, labels: Labels, ignore_label: int | None = None, errors: bool = True
) -> None:
    """Draw the contours of the reference and of each prediction side by side, the reference dotted in the latter.

    Of each case, a row shows one slice along the first axis.

    Args:
        path: the picture, a PNG file.
        cases: one row each, with the same names of predictions.
        labels: label values by structure.
        ignore_label: voxels with this value in the reference are no disagreement.
        errors: whether to show the slice in which predictions and reference disagree most; otherwise that with most of
            the structures.
    """
    rows = [_in_three_dimensions(case) for case in cases]
    colors = _cycle(len(labels))
    with matplotlib.style.context("default"):
        heights = [min(max(3.6 * row.image.shape[1] * _aspect(row) / row.image.shape[2], 1.5), 7.0) for row in rows]
        width = 3.6 * (2 + len(rows[0].predictions))
        figure = Figure(figsize=(width, sum(heights) + 0.5 * len(rows) + 0.4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, row in zip(parts, rows, strict=True):
            others = list(row.predictions.values()) if errors else []
            index = slice_of_interest(row.reference, others, labels=labels, ignore_label=ignore_label)
            _draw_row(part, row, index, labels, colors)
        lines = [Line2D([], [], color=color, linewidth=2) for color in colors]
        reference_line = Line2D([], [], color="gray", linestyle=":", linewidth=1.5)
        figure.legend(
            [*lines, reference_line],
            [*labels, "reference"],
            loc="outside lower center",
            ncols=len(labels) + 1,
            fontsize=10,
            frameon=False,
        )
        _save(figure, path)


def _in_three_dimensions(case: Case) -> Case:
    if case.image.ndim == 3:
        return case
    predictions = {name: prediction[None] for name, prediction in case.predictions.items()}
    return replace(case, image=case.image[None], reference=case.reference[None], predictions=predictions)


def _aspect(case: Case) -> float:
    return float(case.spacing[-2] / case.spacing[-1]) if case.spacing is not None else 1.0


def _draw_row(part: SubFigure, case: Case, index: int, labels: Labels, colors: Sequence[str]) -> None:
    image, reference = case.image[index], case.reference[index]
    low, high = np.percentile(image, [1, 99.5])
    # Regions share contours: each line leaves those beneath it to be seen.
    widths = np.linspace(1.7 + 0.6 * min(len(labels) - 1, 3), 1.7, len(labels))
    panels: list[tuple[str, NDArray[np.integer] | None]] = [("image", None), ("reference", reference)]
    panels += [(name, prediction[index]) for name, prediction in case.predictions.items()]
    for axis, (name, segmentation) in zip(part.subplots(1, len(panels)), panels, strict=True):
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=_aspect(case), interpolation="nearest")
        axis.set_title(name, fontsize=11)
        axis.set_axis_off()
        if segmentation is None:
            continue
        for color, width, value in zip(colors, widths, labels.values(), strict=True):
            if name != "reference":
                _contour(axis, np.isin(reference, value), colors="white", linestyles=":", linewidths=1.1)
            _contour(axis, np.isin(segmentation, value), colors=color, linewidths=width)
        axis.set_xlim(-0.5, image.shape[1] - 0.5)
        axis.set_ylim(image.shape[0] - 0.5, -0.5)
    which = f" (slice {index + 1} of {len(case.image)})" if len(case.image) > 1 else ""
    part.suptitle(f"{case.title}{which}".strip(), fontsize=11)


def draw_cases(
    path: Path,
    titles: Mapping[str, str],
    images: Path,
    references: Path,
    predictions: Mapping[str, Path],
    segmentations: Segmentations,
    *,
    channel: int = 0,
    errors: bool = True,
) -> None:
    """:func:`save_overlay` of cases that are read from folders.

    Args:
        path: the picture, a PNG file.
        titles: by the case's name.
        images: folder with one file per channel, or with color pictures.
        references: folder of reference segmentations.
        predictions: folders by name.
        segmentations: how they are stored.
        channel: which file of the case is drawn.
        errors: see :func:`save_overlay`.

    Raises:
        BadImageError: a file is missing or damaged, or the sizes differ.
    """
    cases = [
        _read_case(
            case,
            title,
            images / f"{case}_{channel:04d}{segmentations.file_ending}",
            references,
            predictions,
            segmentations,
        )
        for case, title in titles.items()
    ]
    save_overlay(path, cases, labels=segmentations.labels, ignore_label=segmentations.ignore_label, errors=errors)


def _read_case(
    case: str,
    title: str,
    image_file: Path,
    references: Path,
    predictions: Mapping[str, Path],
    segmentations: Segmentations,
) -> Case:
    name = case + segmentations.file_ending
    image = segmentations.read_image(image_file)
    reference, geometry = segmentations.read(references / name)
    arrays = {}
    for model, folder in predictions.items():
        arrays[model], found = segmentations.read(folder / name)
        difference = found.difference(geometry)
        if difference:
            raise BadImageError(f"{folder / name}: {difference}, the reference's")
    if image.shape != reference.shape:
        raise BadImageError(f"the image has {image.shape} voxels, the reference {reference.shape}")
    return Case(title, image, reference, arrays, geometry.spacing)


def save_comparison(
    path: Path, models: Mapping[str, Sequence[FolderResult]], structures: Sequence[str], metric: str
) -> None:
    """Draw one dot per case and model, lines between the dots of a case, and the mean: a panel per structure.

    Args:
        path: the picture, a PNG file.
        models: runs by the model's name; a dot is the mean over the runs.
        structures: names of classes or regions.
        metric: attribute of :class:`~nnunet_ssl.evaluation.metrics.CaseMetrics`.
    """
    cases = all_cases(models)
    names = list(models)
    with matplotlib.style.context("default"):
        width = len(structures) * (1.3 * len(names) + 0.8)
        figure = Figure(figsize=(min(max(width, 4.0), 24.0), 4.2), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(structures), squeeze=False, sharey=metric in ("dice", "jaccard"))[0]
        for axis, structure in zip(panels, structures, strict=True):
            found = [scores(runs, cases, structure, metric) for runs in models.values()]
            axis.plot(
                range(len(names)), [one.by_case() for one in found], color="gray", alpha=0.35, linewidth=0.8, zorder=1
            )
            for position, of_model in enumerate(found):
                color = COLORS[position % len(COLORS)]
                axis.scatter([position] * len(cases), of_model.by_case(), s=18, color=color, zorder=2)
                # Nothing is drawn where the mean is nan.
                ends = [position - 0.25, position + 0.25]
                axis.plot(ends, [of_model.mean] * 2, color="black", linewidth=2, zorder=3)
            axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
            axis.set_xlim(-0.5, len(names) - 0.5)
            axis.set_title(structure, fontsize=11)
            axis.grid(axis="y", alpha=0.3)
        panels[0].set_ylabel(AXIS_LABELS[metric])
        figure.suptitle("one dot per case, bar: mean", fontsize=10)
        _save(figure, path)


def slice_of_interest(
    reference: NDArray[np.integer],
    predictions: Sequence[NDArray[np.integer]],
    *,
    labels: Labels,
    ignore_label: int | None = None,
) -> int:
    """The slice with the largest disagreement on the structures; with none at all, the one with most of them."""
    counts = np.ones(reference.shape, bool) if ignore_label is None else reference != ignore_label
    disagreement, structures = np.zeros(len(reference), int), np.zeros(len(reference), int)
    for value in labels.values():
        mask = np.isin(reference, value)
        structures += mask.sum(axis=(1, 2))
        for prediction in predictions:
            disagreement += ((np.isin(prediction, value) != mask) & counts).sum(axis=(1, 2))
    return int(np.argmax(disagreement if disagreement.any() else structures))


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise cannot_write(path, error, ELSEWHERE) from error


def _cycle(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def _contour(axis, mask: NDArray[np.bool_], **style) -> None:  # type: ignore[no-untyped-def]
    if mask.any():
        # A margin of background closes contours at the image's edge.
        padded = np.pad(mask, 1).astype(float)
        rows, columns = np.arange(-1, mask.shape[0] + 1), np.arange(-1, mask.shape[1] + 1)
        axis.contour(columns, rows, padded, levels=[0.5], **style)
