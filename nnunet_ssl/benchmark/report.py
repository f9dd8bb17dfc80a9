"""What a campaign shows: gains with their uncertainty, costs, one figure. Only arms of one campaign are compared."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from nnunet_ssl.benchmark.arms import BASELINE
from nnunet_ssl.benchmark.results import Run
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.comparison import RESAMPLES, Scores, all_cases, average_scores, scores
from nnunet_ssl.evaluation.folders import FolderResult
from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.files import ELSEWHERE, write_text

MEAN = "mean of structures"
SHOWN = {"dice": "Dice", "hd95": "HD95 (mm)"}
_CONDITIONS = (
    *("nnunet_ssl", "nnunetv2", "torch", "numpy", "python"),
    *("processor", "device", "threads", "compiled", "jobs"),
)


@dataclass(frozen=True)
class Gain:
    """One metric of one arm against the baseline, in one setting.

    Attributes:
        arm: its name.
        structure: a class or region, or :data:`MEAN`.
        metric: ``dice`` or ``hd95``.
        runs: number of trainings.
        mean: over cases and trainings; nan where no case has a value in all trainings.
        spread: standard deviation of the trainings' means; nan of one training.
        difference: against the baseline, paired over the cases; nan for the baseline itself.
        low: lower end of its 95 % interval; nan where the spread of trainings is not known.
        high: its upper end.
        pairs: number of cases in which both are defined.
    """

    arm: str
    structure: str
    metric: str
    runs: int
    mean: float
    spread: float
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    pairs: int = 0


@dataclass(frozen=True)
class Cost:
    """What an arm takes, medians over its trainings.

    Attributes:
        arm: its name.
        step: seconds; on a CPU of processor time, which other programs disturb less.
        training: seconds.
        memory: peak in MB; on a CPU of the whole process.
        relative_step: times the baseline's, each counted in steps of nnUNetTrainer that the same process has measured.
        relative_training: times the baseline's, counted in the same way.
        relative_memory: times the baseline's.
    """

    arm: str
    step: float
    training: float
    memory: float
    relative_step: float
    relative_training: float
    relative_memory: float


def difference(model: Scores, baseline: Scores, *, seed: int = 0) -> tuple[float, float, float, int]:
    """Mean paired difference, the ends of its 95 % interval, and the number of pairs.

    The interval holds two sources of chance. Cases: their differences, means over the trainings, are drawn with
    replacement. Trainings: to each draw comes a draw of Student's t with the standard error of the difference of two
    means over trainings. Their variance is that of the baseline's trainings, pooled with that of the model's where it
    has several: with n and m trainings there are n + m - 2 degrees of freedom. Trainings are not paired by their seeds,
    which name no training. With one training each the spread is not known, and there is no interval.
    """
    both = ~np.isnan(model.by_case()) & ~np.isnan(baseline.by_case())
    pairs = int(both.sum())
    if not pairs:
        return math.nan, math.nan, math.nan, 0
    ours, theirs = model.values[:, both], baseline.values[:, both]
    per_case = ours.mean(axis=0) - theirs.mean(axis=0)
    mean = float(per_case.mean())
    freedom = len(ours) + len(theirs) - 2
    if pairs < 2 or freedom < 1:
        return mean, math.nan, math.nan, pairs
    error = standard_error(ours.mean(axis=1), theirs.mean(axis=1))
    rng = np.random.default_rng(seed)
    shares = rng.multinomial(pairs, np.full(pairs, 1 / pairs), RESAMPLES) / pairs
    # Its quantiles in random order, since few draws would make the tails of few degrees of freedom rough.
    students = rng.permutation(student_t.ppf((np.arange(RESAMPLES) + 0.5) / RESAMPLES, freedom))
    drawn = shares @ per_case + error * students
    low, high = np.percentile(drawn, [2.5, 97.5])
    return mean, float(low), float(high), pairs


def standard_error(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Of the difference of two means over trainings, (n,) and (m,), by their pooled variance."""
    squares = sum(((values - values.mean()) ** 2).sum() for values in (ours, theirs))
    variance = squares / (len(ours) + len(theirs) - 2)
    return float(np.sqrt(variance * (1 / len(ours) + 1 / len(theirs))))


class Report:
    """The report on the runs of one campaign.

    Raises:
        UserError: there is no run, or they are of several campaigns.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        if not runs:
            raise UserError("No training has ended yet, so there is nothing to report.")
        campaigns = sorted({run.about["campaign"] for run in runs})
        if len(campaigns) > 1:
            raise UserError(
                f"The table contains trainings of {len(campaigns)} campaigns ({', '.join(campaigns)}). Only arms of "
                "one campaign can be compared: keep one table per campaign."
            )
        self.runs = list(runs)
        self.settings = sorted(
            {run.setting for run in runs}, key=lambda name: [int(part) for part in re.findall(r"\d+", name)]
        )
        structures = list(self.runs[0].result.cases[0].metrics)
        self.structures = [*structures, MEAN] if len(structures) > 1 else structures
        arms = list(dict.fromkeys(run.about["arm"] for run in runs))
        self.baseline = BASELINE if BASELINE in arms else arms[0]
        self.arms = [self.baseline, *(arm for arm in arms if arm != self.baseline)]
        self._gains: dict[tuple[str, str], list[Gain]] = {}

    def in_setting(self, setting: str) -> dict[str, list[Run]]:
        """The runs of each arm that has some."""
        found = {
            arm: [run for run in self.runs if run.setting == setting and run.about["arm"] == arm] for arm in self.arms
        }
        return {arm: runs for arm, runs in found.items() if runs}

    def gains(self, setting: str, metric: str) -> list[Gain]:
        """By structure, and within it by arm, the baseline first."""
        if (setting, metric) not in self._gains:
            self._gains[setting, metric] = self._find_gains(setting, metric)
        return self._gains[setting, metric]

    def overall(self, setting: str) -> dict[str, Gain]:
        """Dice by arm, of the mean of structures, or of the only one."""
        return {gain.arm: gain for gain in self.gains(setting, "dice") if gain.structure == self.structures[-1]}

    def scores_of(self, runs: Sequence[FolderResult], cases: Sequence[str], structure: str, metric: str) -> Scores:
        """Values of runs of one arm, for a structure or for :data:`MEAN`."""
        if structure == MEAN:
            return average_scores(runs, self.structures[:-1], metric, cases)
        return scores(runs, cases, structure, metric)

    def _find_gains(self, setting: str, metric: str) -> list[Gain]:
        models = {arm: [run.result for run in runs] for arm, runs in self.in_setting(setting).items()}
        cases = all_cases(models)
        gains = []
        for structure in self.structures:
            found = {arm: self.scores_of(results, cases, structure, metric) for arm, results in models.items()}
            for arm, one in found.items():
                about = (arm, structure, metric, len(one.values), one.mean, one.spread_of_runs)
                compared = arm != self.baseline and self.baseline in found
                gains.append(Gain(*about, *(difference(one, found[self.baseline]) if compared else ())))
        return gains

    def costs(self, setting: str) -> list[Cost]:
        """By arm; empty where nothing was measured."""
        runs_of = self.in_setting(setting)
        on_cpu = next(iter(runs_of.values()))[0].about["device"] == "cpu"
        step = "cpu_seconds_per_step" if on_cpu else "seconds_per_step"
        columns = (step, "training_seconds", "peak_memory_mb")
        measured = {
            arm: [_median([run.number(name) for run in runs]) for name in columns] for arm, runs in runs_of.items()
        }
        if all(math.isnan(value) for values in measured.values() for value in values):
            return []
        base = measured.get(self.baseline, [math.nan] * 3)
        otherwise = _without_reference(runs_of.get(self.baseline, []), step)
        in_steps = {arm: _in_steps(runs, step, otherwise) for arm, runs in runs_of.items()}
        unit = in_steps.get(self.baseline, [math.nan] * 2)
        return [
            Cost(arm, *values, *(a / b for a, b in zip([*in_steps[arm], values[2]], [*unit, base[2]], strict=True)))
            for arm, values in measured.items()
        ]

    def conditions(self) -> list[str]:
        """Lines on what the trainings were made with; several values of one thing are counted."""
        about = self.runs[0].about
        lines = []
        if about["dataset"]:
            lengths = sorted({int(run.about["iterations"]) for run in self.runs})
            lines.append(
                f"{about['dataset']}, {about['plans']}, {about['configuration']}, "
                f"{' or '.join(map(str, lengths))} labeled iterations, final checkpoint; campaign {about['campaign']}, "
                f"{min(run.about['date'] for run in self.runs)} to {max(run.about['date'] for run in self.runs)} UTC."
            )
            if len(lengths) > 1:
                lines.append("**Not all trainings have the same number of labeled iterations.**")
        else:
            lines.append(f"{about['campaign']}: an older table, which does not say what it was made with.")
        named = []
        for column in _CONDITIONS:
            counts: dict[str, int] = {}
            for run in self.runs:
                counts[run.about[column]] = counts.get(run.about[column], 0) + 1
            values = [f"{value} ({count})" if len(counts) > 1 else value for value, count in counts.items() if value]
            if values:
                named.append(f"{column} {' or '.join(values)}")
        if named:
            lines.append(", ".join(named) + ".")
        return lines

    def markdown(self) -> str:
        """The tables, with what has to be known to read them."""
        parts = ["# Benchmark", *self.conditions(), _READ.format(baseline=self.baseline)]
        for setting in self.settings:
            parts += [f"## {setting}", *self.tables(setting)]
        return "\n\n".join(parts) + "\n"

    def tables(self, setting: str) -> list[str]:
        """One per metric and one of costs, in Markdown."""
        tables = [_gain_table(self.gains(setting, metric), name) for metric, name in SHOWN.items()]
        costs = self.costs(setting)
        return [format_table(*table, style="markdown") for table in [*tables, *([_cost_table(costs)] if costs else [])]]

    def csv(self) -> str:
        """All gains and costs, one row per setting, arm, structure and metric."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = ("structure", "metric", "runs", "mean", "spread", "difference", "low", "high", "pairs")
        costs = ("step", "training", "memory", "relative_step", "relative_training", "relative_memory")
        writer.writerow(["setting", "arm", *names, *costs])
        for setting in self.settings:
            cost = {one.arm: one for one in self.costs(setting)}
            for metric in SHOWN:
                for gain in self.gains(setting, metric):
                    cells = [getattr(gain, name) for name in names]
                    cells += [getattr(cost[gain.arm], name) for name in costs] if gain.arm in cost else [math.nan] * 6
                    writer.writerow([setting, gain.arm, *(_cell(value) for value in cells)])
        return text.getvalue()


_READ = """\
The difference is to {baseline}, paired over the validation cases. Its 95 % interval includes the chance of cases
(bootstrap) and of trainings (Student's t with the spread of trainings, the standard deviation of their means). If the
interval contains 0, it does not show a difference. "-" instead of an interval: one training each, or a single
validation case, so the chance of trainings or of cases is unknown. A larger Dice is better, and a smaller HD95. For
time and memory, × is relative to {baseline} in this campaign."""


def _gain_table(gains: Sequence[Gain], metric: str) -> tuple[list[str], list[list[object]]]:
    header = [metric, "arm", "trainings", "mean", "spread of trainings", "difference", "95 % interval", "pairs"]
    rows: list[list[object]] = []
    for gain in sorted(gains, key=lambda gain: gain.structure != MEAN):
        interval = "-" if math.isnan(gain.low) else f"{gain.low:+.3f} to {gain.high:+.3f}"
        compared = [f"{gain.difference:+.3f}", interval, gain.pairs] if gain.pairs else ["", "", None]
        rows.append([gain.structure, gain.arm, gain.runs, gain.mean, gain.spread, *compared])
    return header, rows


def _cost_table(costs: Sequence[Cost]) -> tuple[list[str], list[list[object]]]:
    header = ["cost", "step (ms)", "×", "training (min)", "×", "peak memory (MB)", "×"]
    rows: list[list[object]] = []
    for one in costs:
        row: list[object] = [one.arm]
        for value, relative, digits in (
            (one.step * 1000, one.relative_step, 1),
            (one.training / 60, one.relative_training, 1),
            (one.memory, one.relative_memory, 0),
        ):
            row += [
                "-" if math.isnan(value) else f"{value:.{digits}f}",
                "-" if math.isnan(relative) else f"{relative:.2f}",
            ]
        rows.append(row)
    return header, rows


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.median(known)) if known else math.nan


def _without_reference(baseline: Sequence[Run], step: str) -> float:
    """What runs that have measured no step of nnUNetTrainer would have: the baseline's of those times.

    The steps of the baseline's trainings are a little longer or shorter than those that it measures before, and so by
    how much is taken off.
    """
    ratio = _median([run.number(step) / run.number(f"reference_{step}") for run in baseline])
    old = [run for run in baseline if math.isnan(run.number(f"reference_{step}"))] or baseline
    return _median([run.number(step) for run in old]) / (1.0 if math.isnan(ratio) else ratio)


def _in_steps(runs: Sequence[Run], step: str, otherwise: float) -> list[float]:
    """A step and a training, counted in steps of nnUNetTrainer that the training's own process has measured.

    Args:
        runs: of an arm.
        step: column with the seconds of a step.
        otherwise: for runs of an older version, which have measured none; see :func:`_without_reference`.
    """
    units = [run.number(f"reference_{step}") for run in runs]
    units = [otherwise if math.isnan(unit) else unit for unit in units]
    return [
        _median([run.number(name) / unit for run, unit in zip(runs, units, strict=True)])
        for name in (step, "training_seconds")
    ]


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else round(value, 6)
    return value


def write_report(folder: Path, report: Report) -> Mapping[str, Path]:
    """Write report.md, report.csv and report.png; returns them by kind.

    Raises:
        UserError: they cannot be written.
    """
    from nnunet_ssl.benchmark.figure import save_figure

    files = {kind: folder / f"report.{kind}" for kind in ("md", "csv", "png")}
    write_text(files["md"], report.markdown(), otherwise=ELSEWHERE)
    write_text(files["csv"], report.csv(), otherwise=ELSEWHERE)
    save_figure(files["png"], report)
    return files
