"""The table of results: a row per training, case and structure, with all that the training was made with."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_ssl.benchmark.arms import BASELINE
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.folders import FolderResult
from nnunet_ssl.evaluation.metrics import METRICS, CaseMetrics, CaseResult
from nnunet_ssl.files import lock, write_text
from nnunet_ssl.text import one_line, some_of

_LATER = ("reference_seconds_per_step", "reference_cpu_seconds_per_step")
"""Columns that tables of earlier versions do not have."""

ABOUT = (
    *("training", "campaign", "date", "dataset", "plans", "configuration", "arm", "trainer", "settings"),
    *("setting", "labeled", "fold", "seed", "epochs", "iterations"),
    *("nnunet_ssl", "nnunetv2", "torch", "numpy", "python", "processor", "device", "threads", "compiled", "jobs"),
    *("training_seconds", "validation_seconds", "seconds_per_step", "cpu_seconds_per_step", "peak_memory_mb"),
    *_LATER,
)
"""Columns that say what a training was made with, and what it cost; the case's follow."""

_FINITE = sys.float_info.max
_MOST = {"dice": 1.0, "jaccard": 1.0}
_ROUNDED = ("training_seconds", "validation_seconds")

_OLD_KEY = re.compile(r"(?P<arm>.+); (?P<labeled>\d+) labeled; seed (?P<seed>\d+); (?P<checkpoint>final|best)")


@dataclass
class Run:
    """One training and its results.

    Attributes:
        about: by the names of :data:`ABOUT`, as written; empty where an older table has no such column.
        result: metrics of the validation cases.
    """

    about: dict[str, str]
    result: FolderResult = field(default_factory=FolderResult)

    @property
    def setting(self) -> str:
        """Which labeled cases: see :class:`~nnunet_ssl.benchmark.campaign.Setting`."""
        return self.about["setting"]

    def number(self, column: str) -> float:
        """A column of costs as a number above 0; nan where it is empty.

        Raises:
            UserError: it is something else.
        """
        text = self.about.get(column) or "nan"
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        # Times are rounded to tenths of a second, the others are divided by.
        if 0 < value < math.inf or math.isnan(value) or (text == "0.0" and column in _ROUNDED):
            return value
        raise UserError(f"The table's column {column} contains {text!r}, which is not a number above 0.")


def add_run(file: Path, about: Mapping[str, object], result: FolderResult) -> None:
    """Add a training to a table, unless it is there; other processes may do the same at the same time."""
    with lock(file.with_name(f".{file.name}.lock")):
        runs = read_runs(file) if file.is_file() else {}
        key = str(about["training"])
        if key not in runs:
            runs[key] = Run({name: str(about[name]) for name in ABOUT}, result)
            write_runs(file, runs)


def write_runs(file: Path, runs: Mapping[str, Run]) -> None:
    """Write a table, aside and renamed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ABOUT, "case", "structure", *METRICS])
    for run in runs.values():
        about = [run.about.get(name, "") for name in ABOUT]
        for case in run.result.cases:
            for structure, metrics in case.metrics.items():
                values = [getattr(metrics, metric) for metric in METRICS]
                # nan is unlike itself.
                cells = ["" if value != value else round(value, 6) for value in values]
                writer.writerow([*about, case.case, structure, *cells])
    write_text(file, text.getvalue())


def read_runs(file: Path) -> dict[str, Run]:
    """A table of :func:`write_runs`, or one of the older benchmark of the left atrium, by training.

    Of the older one, whose arms and length stand in other places, the final checkpoint counts; its file's name is its
    campaign.

    Raises:
        UserError: the file is missing, or no such table; or rows are missing or contradict each other.
    """
    runs: dict[str, Run] = {}
    metrics: dict[str, dict[str, dict[str, CaseMetrics]]] = {}
    try:
        # A spreadsheet begins a file with a byte order mark.
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = csv.DictReader(opened)
            _check_columns(rows.fieldnames or [])
            for row in rows:
                if None in row.values():
                    raise ValueError(f"the row of {row['case']} is cut short")
                about = _about(row, file)
                if about is None:
                    continue
                training, case = about["training"], row["case"]
                runs.setdefault(training, Run(about))
                known = metrics.setdefault(training, {}).setdefault(case, {})
                found = _metrics(row)
                # Both may hold nan, which is unlike itself.
                if str(known.setdefault(row["structure"], found)) != str(found):
                    raise ValueError(f"training {training!r} has {case}, {row['structure']}, twice with other values")
        _fill(runs, metrics)
    except FileNotFoundError:
        raise UserError(f"There is no table of results {file}.") from None
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{file} is not a table of results of nnunet-ssl benchmark: {one_line(error)}. Restore it, or move it "
            "away to start from the beginning."
        ) from None
    return runs


def _check_columns(names: Sequence[str]) -> None:
    needed = ["training", "case", "structure", *METRICS]
    if "campaign" in names:
        needed += [name for name in ABOUT if name not in _LATER]
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(f"it has no column {some_of(missing, 3)}; columns are separated by commas")


def _metrics(row: Mapping[str, str]) -> CaseMetrics:
    values = {metric: float(row[metric] or "nan") for metric in METRICS}
    wrong = [f"{name} {value:g}" for name, value in values.items() if value < 0 or value > _MOST.get(name, _FINITE)]
    if wrong:
        raise ValueError(f"the row of {row['case']}, {row['structure']} has {some_of(wrong, 3)}")
    return CaseMetrics(**values)


def _fill(runs: Mapping[str, Run], metrics: Mapping[str, Mapping[str, Mapping[str, CaseMetrics]]]) -> None:
    """Give the trainings their cases, whose structures are in one order, whatever the order of the rows."""
    structures = list(dict.fromkeys(name for cases in metrics.values() for case in cases.values() for name in case))
    for training, cases in metrics.items():
        for case, found in cases.items():
            missing = [name for name in structures if name not in found]
            if missing:
                raise ValueError(f"training {training!r} has no row of {case} for {some_of(missing, 3)}")
            runs[training].result.cases.append(CaseResult(case, {name: found[name] for name in structures}))


def _about(row: Mapping[str, str], file: Path) -> dict[str, str] | None:
    """What a row says of its training; None for a checkpoint that was chosen on the validation cases."""
    if "campaign" in row:
        return {name: row.get(name, "") if name in _LATER else row[name] for name in ABOUT}
    found = _OLD_KEY.fullmatch(row["training"])
    if found is None:
        raise ValueError(f"no training is named {row['training']!r}")
    if found["checkpoint"] == "best":
        return None
    arm = BASELINE if found["arm"] == "nnU-Net" else found["arm"]
    known = {"training": row["training"], "campaign": file.stem, "arm": arm, "setting": f"{found['labeled']} labeled"}
    return {**dict.fromkeys(ABOUT, ""), **known, "labeled": found["labeled"], "seed": found["seed"]}
