"""Results of evaluated folders as files: CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from nnunet_ssl.evaluation.folders import FolderResult
from nnunet_ssl.evaluation.metrics import METRICS, CaseMetrics
from nnunet_ssl.files import ELSEWHERE, write_text


def write_csv(file: Path, results: Mapping[str, FolderResult], *, key: str = "name") -> None:
    """One row per folder, case and structure; what is undefined is empty. Written aside and renamed.

    Args:
        file: to be written.
        results: by what stands in the first column; a single result named ``""`` has no such column.
        key: heading of the first column.
    """
    named = list(results) != [""]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*([key] if named else []), "case", "structure", *METRICS])
    for name, result in results.items():
        for case in result.cases:
            for structure, metrics in case.metrics.items():
                values = [_number(getattr(metrics, metric)) for metric in METRICS]
                row = [case.case, structure, *("" if value is None else value for value in values)]
                writer.writerow([name, *row] if named else row)
    write_text(file, text.getvalue(), otherwise=ELSEWHERE)


def write_json(file: Path, result: FolderResult) -> None:
    """Cases, their means, and what failed; what is undefined is null. Written aside and renamed."""
    structures = list(result.cases[0].metrics) if result.cases else []
    content = {
        "mean": {
            structure: {metric: summary(result.values(structure, metric).values()) for metric in METRICS}
            for structure in structures
        },
        "cases": {case.case: {name: _as_json(one) for name, one in case.metrics.items()} for case in result.cases},
        "failed": result.failed,
        "without_prediction": result.missing,
    }
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n", otherwise=ELSEWHERE)


def summary(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean, median, standard deviation over the cases where the metric is defined, and how many it is missing in."""
    numbers = np.array(list(values), float)
    present = numbers[~np.isnan(numbers)]
    return {
        "mean": float(present.mean()) if present.size else None,
        "median": float(np.median(present)) if present.size else None,
        "standard_deviation": float(present.std(ddof=1)) if present.size > 1 else None,
        "cases": int(numbers.size),
        "missing": int(numbers.size - present.size),
    }


def _as_json(metrics: CaseMetrics) -> dict[str, float | None]:
    return {metric: _number(getattr(metrics, metric)) for metric in METRICS}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
