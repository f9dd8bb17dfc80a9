"""Comparison of several models on the same cases: spread over cases and runs, paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from nnunet_ssl.evaluation.folders import FolderResult

RESAMPLES = 10_000
_AT_ONCE = 500  # resamples, so that thousands of cases do not fill the memory


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
                run.missing = sorted(set(run.missing) & set(result.missing))
                break
        else:
            runs.append(FolderResult(list(result.cases), dict(result.failed), list(result.missing)))
    return runs


def scores(runs: Sequence[FolderResult], cases: Sequence[str], structure: str, metric: str) -> Scores:
    """Collect one metric.

    Where a structure is in neither reference nor prediction, overlap is 1 here: a model that finds it there has 0, and
    left out, the pair would favor that model.

    Args:
        runs: of one model.
        cases: names, in the order that the values get.
        structure: name of a class or region.
        metric: attribute of :class:`~nnunet_ssl.evaluation.metrics.CaseMetrics`.
    """
    rows = []
    for run in runs:
        found = run.values(structure, metric)
        if metric in ("dice", "jaccard"):
            found = {case: 1.0 if math.isnan(value) else value for case, value in found.items()}
        rows.append([found.get(case, float("nan")) for case in cases])
    return Scores(tuple(cases), np.array(rows, float).reshape(len(runs), len(cases)))


def average_scores(
    runs: Sequence[FolderResult], structures: Sequence[str], metric: str, cases: Sequence[str] | None = None
) -> Scores:
    """:func:`scores` averaged over structures, by default of all cases of the runs; nan where it is of any of them."""
    cases = all_cases({"": runs}) if cases is None else cases
    values = np.mean([scores(runs, cases, structure, metric).values for structure in structures], axis=0)
    return Scores(tuple(cases), values)


def all_cases(models: Mapping[str, Sequence[FolderResult]]) -> list[str]:
    """Every case of any run, sorted."""
    return sorted({case.case for runs in models.values() for run in runs for case in run.cases})


def common_cases(runs: Sequence[FolderResult]) -> set[str]:
    """The cases that all runs have; means are over these."""
    return set.intersection(*({case.case for case in run.cases} for run in runs))


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
    cases = all_cases(models)
    header = ["structure", "model", "runs", "cases", "mean", "median", "SD cases", "SD runs", "missing"]
    header += ["difference", "95 % interval", "p", "pairs", *(["best - last"] if best else [])]
    rows: list[list[object]] = []
    for structure in structures:
        by_model = {name: scores(runs, cases, structure, metric) for name, runs in models.items()}
        baseline = next(iter(by_model))
        for name, found in by_model.items():
            count = len(common_cases(models[name]))
            row: list[object] = [structure, name, len(found.values), count, found.mean, found.median]
            row += [found.spread_of_cases, found.spread_of_runs, found.missing]
            if name == baseline:
                row += ["baseline", "", None, None]
            else:
                row += _cells(paired_difference(found, by_model[baseline]))
            if best:
                other = best.get(name)
                gap = scores(other, cases, structure, metric).by_case() - found.by_case() if other else np.array([])
                row.append(_signed(_mean(gap)))
            rows.append(row)
    return header, rows


def paired_difference(model: Scores, baseline: Scores, *, seed: int = 0) -> PairedDifference:
    """Mean difference with a bootstrap interval over cases and runs, and a paired test over cases.

    Each resample draws cases (the same for both, which keeps the pairs) and, for either, runs, with replacement: so the
    interval holds the spread of trainings as well, where there are several. With three runs that part is rough. Of a
    single pair, which has no spread, interval and p-value are nan.

    Raises:
        ValueError: the scores are of different cases.
    """
    if model.cases != baseline.cases:
        raise ValueError("scores of different cases cannot be paired")
    both = ~np.isnan(model.by_case()) & ~np.isnan(baseline.by_case())
    count = int(both.sum())
    ours, theirs = model.values[:, both], baseline.values[:, both]
    differences = ours.mean(axis=0) - theirs.mean(axis=0)
    if count < 2:
        return PairedDifference(_mean(differences), float("nan"), float("nan"), float("nan"), count)
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(0, RESAMPLES, _AT_ONCE):
        of_cases = _weights(count, rng)
        means = [(of_cases @ values.T * _weights(len(values), rng)).sum(axis=1) for values in (ours, theirs)]
        resampled.append(means[0] - means[1])
    low, high = np.percentile(np.concatenate(resampled), [2.5, 97.5])
    # Rounding would be ranked as well; and without any difference the test has nothing to rank.
    ranked = differences.round(12)
    p_value = float(wilcoxon(ranked).pvalue) if np.any(ranked) else 1.0
    return PairedDifference(float(differences.mean()), float(low), float(high), p_value, count)


def _weights(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Shares of the items in draws of as many with replacement: (resamples, count)."""
    return rng.multinomial(count, np.full(count, 1 / count), _AT_ONCE) / count


def _cells(pair: PairedDifference) -> list[object]:
    interval = None if math.isnan(pair.low) else f"{pair.low:+.3f} to {pair.high:+.3f}"
    return [_signed(pair.mean), interval, "< 0.001" if pair.p_value < 0.001 else pair.p_value, pair.cases]


def _signed(value: float) -> str | None:
    return None if math.isnan(value) else f"{value:+.3f}"


def _present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[~np.isnan(values)]


def _mean(values: NDArray[np.float64]) -> float:
    present = _present(values)
    return float(present.mean()) if present.size else float("nan")


def _deviation(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else float("nan")
