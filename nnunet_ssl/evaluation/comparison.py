"""Comparison of several models on the same cases: spread over cases and runs, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from nnunet_ssl.evaluation.folders import FolderResult

RESAMPLES = 10_000


@dataclass(frozen=True)
class Scores:
    """One metric of one structure for one model.

    Attributes:
        cases: their names.
        values: (runs, cases); nan where the metric is undefined or the run has no such case.
    """

    cases: tuple[str, ...]
    values: NDArray[np.float64]

    def by_case(self) -> NDArray[np.float64]:
        """Mean over the runs, (cases,); nan where a run has none, lest an easier run stand for all."""
        return self.values.mean(axis=0)

    @property
    def mean(self) -> float:
        """Over the cases that all runs have."""
        return _mean(self.by_case())

    @property
    def median(self) -> float:
        """Over the cases that all runs have, of their means over the runs."""
        present = _present(self.by_case())
        return float(np.median(present)) if present.size else float("nan")

    @property
    def spread_of_cases(self) -> float:
        """Standard deviation of the cases' means over the runs."""
        return _deviation(_present(self.by_case()))

    @property
    def spread_of_runs(self) -> float:
        """Standard deviation of the runs' means over the cases that all runs have."""
        common = ~np.isnan(self.by_case())
        return _deviation(self.values[:, common].mean(axis=1)) if common.any() else float("nan")

    @property
    def missing(self) -> int:
        """Values that are undefined, over all runs."""
        return int(np.isnan(self.values).sum())


@dataclass(frozen=True)
class PairedDifference:
    """Of a model and a baseline on the cases where both are defined in all runs.

    Attributes:
        mean: model minus baseline.
        low: lower end of the 95 % confidence interval.
        high: its upper end.
        p_value: of Wilcoxon's signed-rank test over the cases, two-sided; runs are averaged before.
        cases: number of pairs.
    """

    mean: float
    low: float
    high: float
    p_value: float
    cases: int


def join_runs(results: Sequence[FolderResult]) -> list[FolderResult]:
    """Runs of one model from its folders: folders with other cases (folds) are joined, with the same cases are runs."""
    runs: list[FolderResult] = []
    for result in results:
        names = {case.case for case in result.cases}
        for run in runs:
            if names.isdisjoint(case.case for case in run.cases):
                run.cases.extend(result.cases)
                run.failed.update(result.failed)
                break
        else:
            runs.append(FolderResult(list(result.cases), dict(result.failed)))
    return runs


def scores(runs: Sequence[FolderResult], cases: Sequence[str], structure: str, metric: str) -> Scores:
    """Collect one metric.

    Args:
        runs: of one model.
        cases: names, in the order that the values get.
        structure: name of a class or region.
        metric: attribute of :class:`~nnunet_ssl.evaluation.metrics.CaseMetrics`.
    """
    rows = []
    for run in runs:
        found = run.values(structure, metric)
        rows.append([found.get(case, float("nan")) for case in cases])
    return Scores(tuple(cases), np.array(rows, float).reshape(len(runs), len(cases)))


def compare(
    models: Mapping[str, Sequence[FolderResult]],
    structures: Sequence[str],
    metric: str,
    *,
    best: Mapping[str, Sequence[FolderResult]] | None = None,
) -> tuple[list[str], list[list[object]]]:
    """Header and rows of a table: one row per structure and model, the first model being the baseline.

    Args:
        models: runs by the model's name.
        structures: names of classes or regions.
        metric: attribute of :class:`~nnunet_ssl.evaluation.metrics.CaseMetrics`.
        best: runs of the same models with another checkpoint, for the last column.
    """
    cases = sorted({case.case for runs in models.values() for run in runs for case in run.cases})
    header = ["structure", "model", "runs", "cases", "mean", "median", "SD cases", "SD runs", "missing"]
    header += ["difference", "95 % interval", "p", "pairs", *(["best - last"] if best else [])]
    rows: list[list[object]] = []
    for structure in structures:
        by_model = {name: scores(runs, cases, structure, metric) for name, runs in models.items()}
        baseline = next(iter(by_model))
        for name, found in by_model.items():
            count = len({case.case for run in models[name] for case in run.cases})
            row: list[object] = [structure, name, len(found.values), count, found.mean, found.median]
            row += [found.spread_of_cases, found.spread_of_runs, found.missing]
            if name == baseline:
                row += ["baseline", "", None, None]
            else:
                pair = paired_difference(found, by_model[baseline])
                row += [f"{pair.mean:+.3f}", f"{pair.low:+.3f} to {pair.high:+.3f}", pair.p_value, pair.cases]
            if best:
                other = best.get(name)
                gap = paired_difference(scores(other, cases, structure, metric), found).mean if other else None
                row.append(None if gap is None else f"{gap:+.3f}")
            rows.append(row)
    return header, rows


def paired_difference(model: Scores, baseline: Scores, *, seed: int = 0) -> PairedDifference:
    """Mean difference with a bootstrap interval over cases and runs, and a paired test over cases.

    Each resample draws cases (the same for both, which keeps the pairs) and, for either, runs, with replacement: so the
    interval holds the spread of trainings as well, where there are several. With three runs that part is rough.

    Raises:
        ValueError: the scores are of different cases.
    """
    if model.cases != baseline.cases:
        raise ValueError("scores of different cases cannot be paired")
    both = ~np.isnan(model.by_case()) & ~np.isnan(baseline.by_case())
    count = int(both.sum())
    if count == 0:
        return PairedDifference(float("nan"), float("nan"), float("nan"), float("nan"), 0)
    ours, theirs = model.values[:, both], baseline.values[:, both]
    differences = ours.mean(axis=0) - theirs.mean(axis=0)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    resampled = (_resample_runs(ours, rng) * weights).sum(axis=1) - (_resample_runs(theirs, rng) * weights).sum(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    # Without any difference the test has nothing to rank.
    p_value = float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0
    return PairedDifference(float(differences.mean()), float(low), float(high), p_value, count)


def _resample_runs(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means over runs drawn with replacement: (runs, cases) to (resamples, cases)."""
    runs = len(values)
    return rng.multinomial(runs, np.full(runs, 1 / runs), RESAMPLES) / runs @ values


def _present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[~np.isnan(values)]


def _mean(values: NDArray[np.float64]) -> float:
    present = _present(values)
    return float(present.mean()) if present.size else float("nan")


def _deviation(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else float("nan")
