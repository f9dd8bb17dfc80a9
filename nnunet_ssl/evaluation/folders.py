"""Evaluation of a folder of predictions: what is wrong with them, and the results."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunet_ssl.data.image_checks import BadImageError
from nnunet_ssl.data.worker_processes import in_worker_processes
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import CaseResult, evaluate_case
from nnunet_ssl.evaluation.segmentations import Segmentations


@dataclass
class FolderResult:
    """Results of one folder of predictions.

    Attributes:
        cases: sorted by name.
        failed: reasons, by the name of the case, why others could not be evaluated.
        missing: cases of the reference without a prediction.
    """

    cases: list[CaseResult] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def values(self, structure: str, metric: str) -> dict[str, float]:
        """One metric of one structure, by case."""
        return {result.case: getattr(result.metrics[structure], metric) for result in self.cases}


def hardest_cases(results: Iterable[FolderResult]) -> list[str]:
    """All cases, beginning with the lowest Dice, averaged over structures and results."""
    dice: dict[str, list[float]] = {}
    for result in results:
        for case in result.cases:
            values = [one.dice for one in case.metrics.values() if not math.isnan(one.dice)]
            dice.setdefault(case.case, []).extend(values)
    # A case in which nothing is to be found and nothing was is not hard.
    return sorted(dice, key=lambda case: (np.mean(dice[case] or [1.0]), case))


def evaluate_folder(
    predictions: Path, references: Path, segmentations: Segmentations, *, num_processes: int = 1
) -> FolderResult:
    """Evaluate each prediction against the reference of the same name.

    What is wrong with one case is its entry in ``failed``; the others go on.

    Args:
        predictions: folder with one label map per case.
        references: folder with the references.
        segmentations: how they are stored.
        num_processes: each holds one case in memory; 1 works in this process.

    Raises:
        UserError: a folder does not exist or holds no segmentation, or it holds foreground but none of the labels.
    """
    predicted, known = _cases(predictions, segmentations), _cases(references, segmentations)
    evaluate = functools.partial(_evaluate_file, predictions, references, segmentations)
    workers = min(num_processes, len(predicted))
    held_by_references: set[int] = set()
    held_by_predictions: set[int] = set()
    results = in_worker_processes(evaluate, predicted, workers if workers > 1 else 0)
    report = FolderResult(missing=sorted(set(known) - set(predicted)))
    for case, result in tqdm(results, total=len(predicted), desc="evaluate", unit="case", disable=None, leave=False):
        if isinstance(result, tuple):
            report.cases.append(result[0])
            held_by_references |= result[1]
            held_by_predictions |= result[2]
        else:
            report.failed[case] = (
                result or "the process that evaluated it was killed, most likely because memory ran out; use -np 1"
            )
    report.cases.sort(key=lambda one: one.case)
    # A mask of 255 where 1 was meant must not pass for one in which nothing is to be found, or was.
    named = segmentations.values - {0}
    for what, folder, held, allowed in (
        ("references", references, held_by_references, named),
        ("predictions", predictions, held_by_predictions, named | held_by_references),
    ):
        if held and not held & allowed:
            labels, found = (", ".join(map(str, sorted(values))) for values in (named, held))
            raise UserError(f"The labels are {labels}, but the {what} in {folder} contain {found}.")
    return report


def _cases(folder: Path, segmentations: Segmentations) -> list[str]:
    cases = segmentations.cases(folder)
    if not cases:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder.resolve()}.")
        raise UserError(
            f"The folder {folder} contains no file that ends in {segmentations.file_ending}. The ending is that of "
            "the dataset given with -d, or of --file-ending, with --labels."
        )
    return cases


def _evaluate_file(
    predictions: Path, references: Path, segmentations: Segmentations, case: str
) -> tuple[CaseResult, set[int], set[int]] | str:
    """A case's result and the foreground labels of its reference and prediction, or why there is none."""
    name = case + segmentations.file_ending
    if not (references / name).is_file():
        return f"it has no reference: {references / name} does not exist"
    try:
        reference, reference_geometry = segmentations.read(references / name)
        prediction, geometry = segmentations.read(predictions / name)
    except BadImageError as error:
        return str(error)
    difference = geometry.difference(reference_geometry)
    if difference:
        return f"the prediction's {difference}, the reference's: predict on the image that the reference belongs to"
    held, predicted = (set(np.unique(array).tolist()) for array in (reference, prediction))
    for what, values in (("reference", held), ("prediction", predicted)):
        unknown = sorted(values - segmentations.values)
        if unknown and segmentations.complete:
            known = ", ".join(map(str, sorted(segmentations.values)))
            return f"the {what} contains {', '.join(map(str, unknown))}; the dataset's labels are {known}"
    metrics = evaluate_case(
        prediction,
        reference,
        segmentations.labels,
        reference_geometry.spacing,
        ignore_label=segmentations.ignore_label,
    )
    return CaseResult(case, metrics), held - {0}, predicted - {0}
