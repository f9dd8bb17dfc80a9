"""The figure of a campaign: gains in Dice and HD95 with their intervals, and gain against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from nnunet_ssl.benchmark.arms import short_name
from nnunet_ssl.benchmark.report import SHOWN, Cost, Gain, Report
from nnunet_ssl.files import ELSEWHERE, cannot_write

_MOST_STRUCTURES = 5
_MOST_LETTERS = 40
_PLACES = [
    (distance * right, distance * up)
    for distance in (1.0, 1.8, 2.6, 3.4)
    for right, up in ((13, 0), (-13, 0), (0, 10), (0, -10), (11, 8), (-11, 8), (11, -8), (-11, -8))
]
"""Where a label may stand relative to its point, in points of a font; the nearest first."""


def save_figure(file: Path, report: Report) -> None:
    """Draw a row per setting: differences in Dice, differences in HD95, and difference in Dice against a step's cost.

    Of more than five structures their mean is drawn alone.

    Raises:
        UserError: the file cannot be written.
    """
    structures = report.structures if len(report.structures) <= _MOST_STRUCTURES else report.structures[-1:]
    arms = report.arms[1:]
    numbers = {arm: number for number, arm in enumerate(arms, 1)}
    with matplotlib.style.context("default"):
        height = max(2.6, 0.9 + 0.3 * len(arms) * len(structures) ** 0.5)
        rows = len(report.settings)
        figure = Figure(figsize=(15, rows * height + 0.7), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, 3, squeeze=False, width_ratios=[1.2, 1.2, 1])
        for axes, setting in zip(panels, report.settings, strict=True):
            for axis, (metric, name) in zip(axes, SHOWN.items(), strict=False):
                gains = [gain for gain in report.gains(setting, metric) if gain.structure in structures]
                _draw_gains(axis, gains, arms, structures)
                better = "more is better" if metric == "dice" else "less is better"
                axis.set_xlabel(f"{name} minus {report.baseline}'s\n({better})")
                base = [gain for gain in gains if gain.arm == report.baseline and gain.structure == structures[-1]]
                reached = f"; {report.baseline}: {base[0].mean:.{3 if metric == 'dice' else 1}f}" if base else ""
                axis.set_title(f"{setting}{reached}", fontsize=10)
            axes[1].set_yticklabels([])
            dice = [gain for gain in report.gains(setting, "dice") if gain.structure == structures[-1]]
            _draw_costs(axes[2], dice, report.costs(setting), numbers)
            axes[2].set_xlabel(f"cost of a step,\ntimes {report.baseline}'s")
            axes[2].set_ylabel("gain in Dice")
            axes[2].set_title(f"gain and cost; square: {report.baseline}", fontsize=10)
        if len(structures) > 1 and arms:
            handles, names = panels[0][0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside upper right", ncols=len(structures), fontsize=8, frameon=False)
        about = report.runs[0].about
        title = " ".join(filter(None, [about["dataset"] or about["campaign"], about["configuration"]]))
        heading = f"{title}: mean difference and 95 % interval over cases and trainings"
        figure.suptitle(heading, fontsize=11, x=0.005, ha="left")
        # Now axes are where they stay, so that it is known which labels would touch.
        figure.draw_without_rendering()
        for axes in panels:
            _number_points(axes[2])
        try:
            figure.savefig(file, format="png")
        except OSError as error:
            raise cannot_write(file, error, ELSEWHERE) from error


def _draw_gains(axis: Axes, gains: Sequence[Gain], arms: Sequence[str], structures: Sequence[str]) -> None:
    step = 0.7 / len(structures)
    for number, structure in enumerate(structures):
        shades = "black" if number == len(structures) - 1 else f"C{number}"
        of_structure = {gain.arm: gain for gain in gains if gain.structure == structure and gain.pairs}
        drawn = [(index, of_structure[arm]) for index, arm in enumerate(arms) if arm in of_structure]
        places = [index + (number - (len(structures) - 1) / 2) * step for index, _ in drawn]
        axis.plot([gain.difference for _, gain in drawn], places, "o", ms=5, color=shades, label=structure)
        for place, (_, gain) in zip(places, drawn, strict=True):
            if not math.isnan(gain.low):
                axis.plot([gain.low, gain.high], [place, place], color=shades, linewidth=1.6)
    axis.axvline(0, color="gray", linewidth=1)
    runs = {gain.arm: gain.runs for gain in gains}
    # The number stands for the arm in the third panel, where there is no room for names.
    names = [f"{_label(arm)}, n = {runs.get(arm, 0)}  [{number}]" for number, arm in enumerate(arms, 1)]
    axis.set_yticks(range(len(arms)), names, fontsize=8)
    axis.set_ylim(max(len(arms), 1) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def _label(arm: str) -> str:
    """A trainer, with its settings in a second line, as far as there is room."""
    name, _, settings = short_name(arm).partition(":")
    if len(settings) > _MOST_LETTERS:
        settings = f"{settings[:_MOST_LETTERS]}…"
    return f"{name}\n{settings}" if settings else name


def _draw_costs(axis: Axes, gains: Sequence[Gain], costs: Sequence[Cost], numbers: dict[str, int]) -> None:
    by_arm = {cost.arm: cost.relative_step for cost in costs}
    drawn = [gain for gain in gains if gain.pairs and not math.isnan(by_arm.get(gain.arm, math.nan))]
    right = max([2.0, *(1.15 * by_arm[gain.arm] for gain in drawn)])
    for gain in drawn:
        cost, color = by_arm[gain.arm], f"C{(numbers[gain.arm] - 1) % 10}"
        if not math.isnan(gain.low):
            axis.plot([cost, cost], [gain.low, gain.high], color=color, alpha=0.25)
        axis.plot(cost, gain.difference, "o", color=color, ms=5, label=f"[{numbers[gain.arm]}]")
    if not drawn:
        axis.text(0.5, 0.5, "no cost measured", ha="center", va="center", transform=axis.transAxes, color="gray")
    axis.plot(1, 0, "s", color="gray", ms=6)
    axis.axhline(0, color="gray", linewidth=1)
    axis.set_xlim(0, right)
    axis.grid(alpha=0.3)


def _number_points(axis: Axes) -> None:
    """Write each point's label next to it, at the first place where it touches no other label and no point."""
    points = [line for line in axis.lines if str(line.get_label()).startswith("[")]
    values = [np.asarray(line.get_xydata(), dtype=float)[0] for line in points]
    dots = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in (axis.transData.transform(value) for value in values)]
    taken: list[Bbox] = []
    for line, value, dot in zip(points, values, dots, strict=True):
        text = axis.annotate(
            str(line.get_label()), (value[0], value[1]), (0, 0), textcoords="offset points",
            ha="center", va="center", fontsize=8, color=line.get_color(), zorder=5,
        )  # fmt: skip
        for right, up in _PLACES:
            text.set_position((right, up))
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in [*taken, *(one for one in dots if one is not dot)]):
                break
        taken.append(box)
