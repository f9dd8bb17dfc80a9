"""Do unlabeled images help here? Short trainings on folds of the user's own data, as many as a time allows."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

from nnunet_ssl.benchmark.arms import BASELINE, Arm
from nnunet_ssl.benchmark.campaign import Campaign, Setting, Training
from nnunet_ssl.benchmark.report import Report, difference, standard_error
from nnunet_ssl.benchmark.results import Run
from nnunet_ssl.benchmark.schedule import Machine, epochs_done, results_of, run_trainings
from nnunet_ssl.data.splits import Fold
from nnunet_ssl.evaluation.comparison import Scores, all_cases
from nnunet_ssl.evaluation.tables import format_table

WORTH = 0.02
"""A gain in Dice that a user would want to see."""

FULL_EPOCHS = 1000
"""nnU-Net's own length of a training."""

_POWER = 0.8
_MOST_FOLDS = 5000
_MOST_TIMES = 20
"""As many cases: where more would be needed, it is trainings that hide a gain."""


@dataclass(frozen=True)
class Estimate:
    """What trainings of two arms say on the gain in Dice, mean of structures.

    Attributes:
        mean: of the gain over the cases.
        low: lower end of its 95 % interval; nan where trainings are too few for one.
        high: its upper end.
        cases: that both arms predicted.
        folds: that hold them.
        visible: gain whose interval lies above 0 in four such pilots of five; nan where there is no interval.
        needed: number of cases with which that gain would be :data:`WORTH`; None: far too many, or not known.
    """

    mean: float
    low: float
    high: float
    cases: int
    folds: int
    visible: float
    needed: int | None


def over_folds(gains: Sequence[NDArray[np.float64]], shares: Sequence[float]) -> Estimate:
    """The gain from two or more folds with other validation cases.

    A fold's mean gain holds the chance of its cases and of its trainings, so the spread of these means is all that is
    needed: Student's t over the folds. Folds are not independent where they train on the same cases; the variance is
    corrected for it (Nadeau and Bengio, Inference for the generalization error, Machine Learning 52, 2003, section 3).

    Args:
        gains: by fold, of each validation case the mean over seeds, (cases,).
        shares: by fold, number of its validation cases relative to that of its other cases.
    """
    means = np.array([fold.mean() for fold in gains])
    count, size = len(means), float(np.mean([len(fold) for fold in gains]))
    mean, spread, share = float(means.mean()), float(means.std(ddof=1)), float(np.mean(shares))
    error = spread * math.sqrt(1 / count + share)
    quantile, power = (float(student_t.ppf(part, count - 1)) for part in (0.975, _POWER))
    # More folds of this size are more cases, and each fold trains on a larger share of them.
    folds = np.arange(2, _MOST_FOLDS + 1)
    visible = _quantiles_of_folds() * spread * np.sqrt(1 / folds + np.minimum(share, 1 / (folds - 1)))
    enough = np.flatnonzero(visible <= WORTH)
    return Estimate(
        mean,
        mean - quantile * error,
        mean + quantile * error,
        sum(map(len, gains)),
        count,
        (quantile + power) * error,
        math.ceil(folds[enough[0]] * size) if enough.size else None,
    )


@functools.cache
def _quantiles_of_folds() -> NDArray[np.float64]:
    """Standard errors that a gain takes to be seen, with 2 folds, 3 folds and so on."""
    freedom = np.arange(1, _MOST_FOLDS)
    return student_t.ppf(0.975, freedom) + student_t.ppf(_POWER, freedom)


def within_fold(model: Scores, baseline: Scores) -> Estimate:
    """The gain from one fold, as :func:`~nnunet_ssl.benchmark.report.difference` has it."""
    mean, low, high, cases = difference(model, baseline)
    if math.isnan(low):
        return Estimate(mean, low, high, cases, 1, math.nan, None)
    per_case = model.by_case() - baseline.by_case()
    both = ~np.isnan(per_case)
    ours, theirs = (one.values[:, both].mean(axis=1) for one in (model, baseline))
    freedom = len(ours) + len(theirs) - 2
    trainings = sum(float(student_t.ppf(part, freedom)) for part in (0.975, _POWER)) * standard_error(ours, theirs)
    of_case = sum(float(norm.ppf(part)) for part in (0.975, _POWER)) * float(per_case[both].std())
    left = WORTH**2 - trainings**2
    needed = max(2, math.ceil(of_case**2 / left)) if left > 0 else None
    if needed is not None and needed > _MOST_TIMES * cases:
        needed = None
    return Estimate(mean, low, high, cases, 1, math.hypot(of_case / math.sqrt(cases), trainings), needed)


def estimate(report: Report, folds: Mapping[str, Fold], arm: str) -> Estimate | None:
    """The gain of an arm against nnUNetTrainer; None where no fold has trainings of both.

    Args:
        report: on the pilot's campaign.
        folds: by the names of its settings.
        arm: its name.
    """
    pairs = {}
    for setting in report.settings:
        runs = report.in_setting(setting)
        if arm in runs and BASELINE in runs:
            models = {name: [run.result for run in runs[name]] for name in (arm, BASELINE)}
            cases = all_cases(models)
            pairs[setting] = [
                report.scores_of(models[name], cases, report.structures[-1], "dice") for name in (arm, BASELINE)
            ]
    if len(pairs) < 2:
        return next((within_fold(ours, theirs) for ours, theirs in pairs.values()), None)
    gains, shares = [], []
    for setting, (ours, theirs) in pairs.items():
        per_case = ours.by_case() - theirs.by_case()
        fold = folds[setting]
        gains.append(per_case[~np.isnan(per_case)])
        shares.append(len(fold["val"]) / (len(fold["train"]) + len(fold.get("unlabeled", ()))))
    return over_folds(gains, shares)


def verdict(arm: str, found: Estimate) -> str:
    """In words: helps, no difference seen, hurts, or that it cannot be said."""
    if math.isnan(found.low):
        return (
            "No verdict: one fold, trained once, cannot tell a gain from chance. Run it again with more hours or folds."
        )
    if found.low > 0:
        return f"Helps: here {arm} is better than {BASELINE} by more than chance can explain."
    if found.high < 0:
        return f"Hurts: here {arm} is worse than {BASELINE} by more than chance can explain."
    seen = (
        f"No difference seen: chance alone can explain {found.mean:+.3f}. Four out of five such pilots would detect "
        f"a gain of {found.visible:.3f}"
    )
    if found.visible <= WORTH:
        return f"{seen}, so a gain of {WORTH} is unlikely."
    if found.needed is None:
        return f"{seen}. To detect {WORTH}, use more seeds rather than more cases: the trainings differ too much."
    return f"{seen}. To detect {WORTH}, about {found.needed} labeled cases are needed; here are {found.cases}."


def disjoint_folds(splits: Sequence[Fold]) -> list[int]:
    """Folds, the first ones first, whose validation cases are in no fold taken before; those without any are left."""
    taken: list[int] = []
    seen: set[str] = set()
    for number, fold in enumerate(splits):
        if fold["val"] and seen.isdisjoint(fold["val"]):
            taken.append(number)
            seen.update(fold["val"])
    return taken


def run_pilot(
    campaign: Campaign, arms: Sequence[Arm], settings: Sequence[Setting], machine: Machine, *, hours: float, seeds: int
) -> dict[str, str]:
    """Train all arms fold by fold, then with the next seed, until the hours are over.

    What would not be ready in time, by what trainings have taken so far, is not begun; what is not ready then is
    stopped, and goes on when this is called again.

    Returns:
        by training, why it ended without a result; nothing is begun after such an end.
    """
    until = time.monotonic() + 3600 * hours
    problems: dict[str, str] = {}
    for trainings in _rounds(campaign, arms, settings, seeds, max(1, machine.jobs // len(arms))):
        left = until - time.monotonic()
        if problems or left <= 0 or expected_seconds(campaign, trainings, machine.jobs) > left:
            break
        problems = run_trainings(campaign, trainings, machine, until=until)
    return problems


def asked_for(runs: Iterable[Run], arms: Sequence[Arm], folds: Mapping[str, Fold]) -> list[Run]:
    """Of all that a pilot's folder holds, what a call named: an earlier one may have had other arms and folds.

    Folds of two calls may share validation cases, each of which counts once.
    """
    names = {arm.name for arm in arms}
    return [run for run in runs if run.about["arm"] in names and run.setting in folds]


def _rounds(
    campaign: Campaign, arms: Sequence[Arm], settings: Sequence[Setting], seeds: int, at_once: int
) -> Iterator[list[Training]]:
    """Trainings of all arms in ``at_once`` folds, without those that have a result."""
    starts = range(0, len(settings), at_once)
    for seed, start in product(range(seeds), starts):
        trainings = [Training(arm, setting, seed) for setting in settings[start : start + at_once] for arm in arms]
        missing = [training for training in trainings if training.key not in results_of(campaign)]
        if missing:
            yield missing


def expected_seconds(campaign: Campaign, trainings: Sequence[Training], jobs: int) -> float:
    """Until trainings are done, by what those of the same arms took, validation included; 0 where one is not known."""
    runs = results_of(campaign).values()
    total = 0.0
    for training in trainings:
        took = [_seconds(run) for run in runs if run.about["arm"] == training.arm.name]
        if not took:
            return 0.0
        total += float(np.mean(took)) * (1 - epochs_done(campaign, training) / campaign.epochs)
    return total / min(jobs, len(trainings))


def _seconds(run: Run) -> float:
    return run.number("training_seconds") + run.number("validation_seconds")


def in_words(campaign: Campaign, arms: Sequence[Arm], report: Report, folds: Mapping[str, Fold]) -> str:
    """The pilot's report, in Markdown: each fold, then each arm's gain, verdict and cost of a full training."""
    others = [arm.name for arm in arms if arm.name != BASELINE]
    parts = [f"# Pilot: {', '.join(others)} against {BASELINE}", *report.conditions(), _fold_table(report)]
    for arm in others:
        found = estimate(report, folds, arm)
        if found is None:
            parts.append(f"## {arm}\n\nNo fold has trainings of both yet. Run it again with more hours.")
            continue
        interval = "" if math.isnan(found.low) else f", 95 % interval {found.low:+.3f} to {found.high:+.3f}"
        parts.append(
            f"## {arm}\n\nGain in Dice {found.mean:+.3f}{interval}; {found.cases} cases in {found.folds} "
            f"{'folds' if found.folds > 1 else 'fold'}.\n\n**{verdict(arm, found)}**"
        )
    iterations = report.runs[0].about["iterations"]
    parts.append(
        f"These trainings are short: {iterations} labeled iterations. A full training has {FULL_EPOCHS * 250}. At "
        "full length, the gain can be different."
    )
    return "\n\n".join([*parts, _full_costs(campaign, report)]) + "\n"


def _fold_table(report: Report) -> str:
    rows: list[list[object]] = []
    for setting in report.settings:
        for arm, gain in report.overall(setting).items():
            change = None if math.isnan(gain.difference) else f"{gain.difference:+.3f}"
            rows.append([setting, arm, gain.runs, gain.mean, change, gain.pairs or None])
    return format_table(["fold", "arm", "trainings", "Dice", "difference", "cases"], rows, style="markdown")


def _full_costs(campaign: Campaign, report: Report) -> str:
    lines = []
    for arm in report.arms:
        took = [run.number("training_seconds") for run in report.runs if run.about["arm"] == arm]
        hours = float(np.mean(took)) / campaign.epochs * FULL_EPOCHS / 3600
        lines.append(f"- {arm}: {hours:.1f} hours" if hours >= 1 else f"- {arm}: {60 * hours:.0f} minutes")
    device = report.runs[0].about["device"]
    return f"A full training of {FULL_EPOCHS} epochs, one fold, on this machine ({device}):\n\n" + "\n".join(lines)
