"""``progress_ssl.png``: the semi-supervised training's curves, next to nnU-Net's progress.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunet_ssl.files import replacing

PREFIX = "ssl/"
_FIRST, _LAST = ("loss", "weight", "coverage"), ("share", "patches", "seconds", "other")
_TITLES = {
    "loss": "loss: terms without their weights, and the total",
    "weight": "weights of the terms",
    "coverage": "pseudo-label coverage: share of voxels above the threshold",
    "share": "share of voxels: predicted in unlabeled patches; labeled (dashed); x: the log warns",
    "patches": "share of patches with the class: predicted in unlabeled patches; labeled (dashed)",
    "seconds": "seconds per epoch",
    "other": "other",
}
# Abbreviations of the papers that methods log under.
_WORDS = {"ip": "image perturbation (ip)", "tkd": "distillation by the teacher (tkd)", "dkd": "self-distillation (dkd)"}
# From wide and solid to narrow and dotted, so that a line shows through those that are drawn over it.
_STYLES: tuple[tuple[float, Any], ...] = (
    (2.6, "-"),
    (2.0, (0, (5, 3))),
    (1.6, (0, (3, 1, 1, 1))),
    (1.4, (0, (1, 1.5))),
)


def class_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """The foreground classes, or the regions, in the order in which nnU-Net numbers them.

    Args:
        dataset_json: nnU-Net's description of the dataset.

    >>> class_names({"labels": {"background": 0, "wall": 2, "chamber": 1, "ignore": 3}})
    ['chamber', 'wall']
    >>> class_names({"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]})
    ['whole', 'core']
    """
    labels = {name: value for name, value in dataset_json["labels"].items() if name != "ignore"}
    foreground = [name for name, value in labels.items() if value not in (0, [0], (0,))]
    if any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.values()):
        return foreground
    return sorted(foreground, key=lambda name: np.atleast_1d(labels[name])[0])


def save_training_curves(
    path: Path, logging: Mapping[str, Sequence[Any]], *, title: str = "", names: Sequence[str] = ()
) -> None:
    """Draw what was logged under keys that start with ``ssl/``; the file is replaced atomically.

    One panel each for ``ssl/loss/<term>``, ``ssl/weight/<term>``, ``ssl/coverage`` with ``ssl/coverage_per_class``
    (a list per epoch), ``ssl/share/<of what>_per_class`` and ``ssl/patches/<of what>_per_class`` (lists),
    ``ssl/seconds/<what>``, and every other ``ssl/<group>/<name>``, under the group's name. Values that are not
    finite leave a gap. Nothing is written while nothing has been logged.

    Args:
        path: the picture, a PNG file.
        logging: one value per epoch by key, as nnU-Net's LocalLogger holds them.
        title: shown above the first panel.
        names: of the classes or regions; without, they are numbered from 1.
    """
    panels: dict[str, dict[str, np.ndarray]] = {name: {} for name in (*_FIRST, *_LAST)}
    for key, values in logging.items():
        if key.startswith(PREFIX) and len(values) > 0:
            panel, name = _place(key[len(PREFIX) :])
            panels.setdefault(panel, {}).update(_series(name, values))
    groups = [name for name in panels if name not in (*_FIRST, *_LAST)]
    drawn = [name for name in (*_FIRST, *groups, *_LAST) if panels[name]]
    if not drawn:
        return

    # nnU-Net's progress plot leaves seaborn's fonts behind, more than twice as large: start from the defaults.
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(9, 0.6 + 2.7 * len(drawn)), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        # A term has one color in all panels.
        terms = {**panels["loss"], **panels["weight"]}
        places = {name: place for place, name in enumerate(name for name in terms if name != "total")}
        epochs = max(len(series) for panel in panels.values() for series in panel.values())
        for axis, panel in zip(axes, drawn, strict=True):
            axis.set_title(_TITLES.get(panel, panel), fontsize=10, loc="left")
            axis.grid(alpha=0.3)
            if panel in ("share", "patches"):
                _draw_shares(axis, panels[panel], names)
                if panel == "share":
                    # Shares of small structures are many times smaller than those of large ones, and may be 0.
                    axis.set_yscale("symlog", linthresh=1e-4)
                axis.set_ylim(0, 1.03 if panel == "patches" else None)
                continue
            for place, (name, series) in enumerate(panels[panel].items()):
                overall = name == {"loss": "total", "coverage": "overall"}.get(panel)
                # A term looks alike in all panels.
                place = places.get(name, place)
                width, dashes = _STYLES[0] if overall else _STYLES[place % len(_STYLES)]
                axis.plot(
                    series,
                    label=_named(name, names),
                    color="black" if overall else f"C{place % 10}",
                    linewidth=width,
                    linestyle=dashes,
                    marker="o" if epochs <= 20 else None,
                    markersize=2 * width,
                )
            _legend(axis)
            if panel in ("coverage", *groups) and axis.dataLim.ymin >= 0 and axis.dataLim.ymax <= 1:
                axis.set_ylim(-0.03, 1.03)
            elif panel == "weight":
                axis.set_ylim(-0.03, max(1.03, axis.get_ylim()[1]))
            elif panel == "seconds":
                axis.set_ylim(bottom=0)
        axes[-1].set_xlabel("epoch")
        axes[-1].set_xlim(-0.5, max(epochs, 2) - 0.5)
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        if title:
            figure.suptitle(title, fontsize=11)
        with replacing(Path(path)) as unfinished:
            figure.savefig(unfinished, format="png")


def _named(line: str, names: Sequence[str]) -> str:
    """What a line is called in the legend."""
    kind, _, number = line.rpartition(" ")
    if kind == "class" and int(number) <= len(names):
        return names[int(number) - 1]
    return _WORDS.get(line, line.replace("_", " "))


def _draw_shares(axis: Axes, lines: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Each class's share of the unlabeled and of the labeled voxels or patches, and where it has collapsed."""
    for index, (name, predicted) in enumerate((n, line) for n, line in lines.items() if n.startswith("unlabeled ")):
        number, color = name.split()[-1], f"C{index % 10}"
        label, marker = _named(f"class {number}", names), "o" if len(predicted) <= 20 else None
        # Narrower from class to class, so that a line shows through those that are drawn over it.
        axis.plot(
            predicted, color=color, label=label, marker=marker, ms=3.5, linewidth=_STYLES[index % len(_STYLES)][0]
        )
        axis.plot(lines.get(f"labeled {number}", []), color=color, linestyle="--", linewidth=1)
        epochs = np.flatnonzero(lines.get(f"collapsed {number}", np.empty(0)) == 1)
        if len(epochs):
            # Without points it would lie at the figure's corner, and the layout make room for it.
            axis.plot(epochs, predicted[epochs], "x", color="red", ms=9, mew=2, clip_on=False)
    _legend(axis)


def _legend(axis: Axes) -> None:
    # Matplotlib warns of a legend without lines, as of a panel whose values were all left out.
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _place(key: str) -> tuple[str, str]:
    """The panel of a key and the name of its line."""
    group, _, term = key.partition("/")
    if key == "coverage":
        return "coverage", "overall"
    if group.startswith("coverage"):
        return "coverage", "class" if key == "coverage_per_class" else key
    if not term:
        return "other", key
    if group in ("share", "patches"):
        return group, term.removesuffix("_per_class") if term.endswith("_per_class") else f"overall {term}"
    return group, term.replace("_", " ") if group == "seconds" else term


def _series(name: str, values: Sequence[Any]) -> dict[str, np.ndarray]:
    """One line, or one per entry, counted from 1, where the epochs hold lists; shorter lists are filled with nan."""
    rows = [np.atleast_1d(np.asarray(np.nan if value is None else value, dtype=float)) for value in values]
    table = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for row, target in zip(rows, table, strict=True):
        target[: len(row)] = row
    table[~np.isfinite(table)] = np.nan
    if any(isinstance(value, (list, tuple, np.ndarray)) for value in values):
        return {f"{name} {column + 1}": table[:, column] for column in range(table.shape[1])}
    return {name: table[:, 0]}
