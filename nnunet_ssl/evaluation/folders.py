"""Evaluation of a folder of predictions: which structures, which files, what is wrong with them, and the results."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_ssl.data.image_checks import BadImageError, check_nifti
from nnunet_ssl.data.worker_processes import in_worker_processes
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import METRICS, CaseMetrics, CaseResult, Labels, evaluate_case
from nnunet_ssl.files import ELSEWHERE, write_text
from nnunet_ssl.text import one_line


@dataclass(frozen=True)
class Segmentations:
    """How the segmentations of a dataset are stored, and what they hold.

    Attributes:
        labels: label values by structure, background left out.
        file_ending: such as ``.nii.gz``.
        ignore_label: voxels with this value in the reference count for neither side.
        reader: name of the nnU-Net reader that dataset.json asks for, if it does.
        complete: whether there are no other labels, so that one would be a mistake.
    """

    labels: Labels
    file_ending: str
    ignore_label: int | None = None
    reader: str | None = None
    complete: bool = False

    @property
    def values(self) -> set[int]:
        """All label values that are named, and background."""
        named = {value for values in self.labels.values() for value in np.atleast_1d(values).tolist()}
        return named | {0} | ({self.ignore_label} if self.ignore_label is not None else set())

    @classmethod
    def from_dataset_json(cls, file: Path) -> Segmentations:
        """What a dataset.json says; a prediction's folder has one too.

        Raises:
            UserError: the file is missing, no JSON, or lacks labels or file ending.
        """
        try:
            content = json.loads(file.read_bytes())
            labels = dict(content["labels"])
            if not all(_is_label(value) for value in labels.values()):
                raise TypeError(
                    "labels should give each name its number, or its list of numbers (the first nnU-Net had it the "
                    "other way round: nnUNetv2_convert_old_nnUNet_dataset)"
                )
            if not _is_ending(content["file_ending"]):
                raise TypeError('file_ending should be such as ".nii.gz"')
            ignore_label = labels.pop("ignore", None)
            # A region may be called background as well; it is recognized by its value, as nnU-Net does.
            structures = {name: value for name, value in labels.items() if value not in (0, [0])}
            return cls(
                structures, content["file_ending"], ignore_label, content.get("overwrite_image_reader_writer"), True
            )
        except FileNotFoundError:
            raise UserError(f"There is no {file}, which would name the labels and the file ending.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no dataset.json of nnU-Net: {one_line(error)}") from None

    @classmethod
    def from_options(cls, labels: Sequence[str], file_ending: str, ignore_label: int | None) -> Segmentations:
        """From a command line.

        Args:
            labels: such as ``2``, ``tumor=2`` or, for a region, ``whole=1,2,3``.
            file_ending: such as ``.nii.gz``.
            ignore_label: see the class.

        Raises:
            UserError: a label cannot be read or is given twice.
        """
        structures: dict[str, int | list[int]] = {}
        for text in labels:
            name, _, values = text.rpartition("=")
            try:
                numbers = [int(value) for value in values.split(",")]
            except ValueError:
                raise UserError(
                    f"--labels {text}: give numbers, such as 2, tumor=2 or, for a region, whole=1,2,3."
                ) from None
            name = name or values
            if min(numbers) < 1:
                raise UserError(f"--labels {text}: labels are 1 or more; 0 is the background.")
            if name in structures:
                raise UserError(f"--labels names {name} twice.")
            structures[name] = numbers[0] if len(numbers) == 1 else numbers
        if not _is_ending(file_ending):
            raise UserError(f"--file-ending {file_ending}: give it with its dot, such as .nii.gz or .png.")
        return cls(structures, file_ending, ignore_label)

    def cases(self, folder: Path) -> list[str]:
        """The cases in a folder, sorted.

        Raises:
            UserError: the folder cannot be listed.
        """
        ending = self.file_ending
        try:
            files = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
        except OSError as error:
            raise UserError(f"{folder} cannot be listed: {error.strerror}. Check its permissions.") from None
        return sorted(name[: -len(ending)] for name in files if name.endswith(ending) and not name.startswith("."))

    def read_image(self, file: Path) -> NDArray[np.floating]:
        """One image as (Z, Y, X), its channels averaged if it has several, as a color picture has.

        Raises:
            BadImageError: the file is missing or cannot be read.
        """
        return self._read(file, lambda reader: reader.read_images([str(file)]))[0].mean(axis=0)

    def read(self, file: Path) -> tuple[NDArray[np.integer], Geometry]:
        """Read one segmentation with nnU-Net's reader.

        Returns:
            the label map (Z, Y, X), with an axis of one voxel for a two-dimensional image; its geometry.

        Raises:
            BadImageError: the file is missing, damaged, or holds no label map.
        """
        array, properties = self._read(file, lambda reader: reader.read_seg(str(file)))
        if len(array) != 1:
            raise BadImageError(f"{file} has {len(array)} channels: it is an image, not a label map")
        labels = array[0].astype(np.int64)
        if not np.array_equal(labels, array[0]):
            raise BadImageError(f"{file} has values that are no whole numbers: it is no label map")
        return labels, Geometry.of(labels, properties)

    def _read(self, file: Path, read: Callable[[Any], tuple[NDArray[Any], dict[str, Any]]]) -> Any:
        if not file.is_file():
            raise BadImageError(f"{file} does not exist")
        if file.name.endswith((".nii", ".nii.gz")):
            try:
                check_nifti(file)
            except BadImageError as error:
                # Prediction and reference have one name.
                raise BadImageError(f"in {file.parent}, {error}") from error
        asked = {"file_ending": self.file_ending, "overwrite_image_reader_writer": self.reader or "None"}
        try:
            # nnU-Net's readers print what troubles them; what matters comes with the error.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                reader = determine_reader_writer_from_dataset_json(asked, str(file), verbose=False)
                return read(reader())
        except Exception as error:
            raise BadImageError(f"{file} cannot be read: {one_line(error)}") from error


@dataclass(frozen=True)
class Geometry:
    """Where a segmentation's voxels lie; what a file format does not tell is empty.

    Attributes:
        size: voxels per axis of the array.
        spacing: millimeters per axis of the array.
        origin: position of the first voxel in millimeters, in the file format's own axes.
        direction: of the axes, row by row.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()

    @classmethod
    def of(cls, array: NDArray[np.integer], properties: Mapping[str, Any]) -> Geometry:
        """From what nnU-Net's reader returns."""
        spacing = tuple(float(size) for size in properties["spacing"])
        if "sitk_stuff" in properties:
            stuff = properties["sitk_stuff"]
            return cls(array.shape, spacing, tuple(stuff["origin"]), tuple(stuff["direction"]))
        if "nibabel_stuff" in properties:
            affine = np.asarray(properties["nibabel_stuff"]["original_affine"])
            axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
            return cls(array.shape, spacing, tuple(affine[:3, 3]), tuple(axes.ravel()))
        return cls(array.shape, spacing)

    def difference(self, other: Geometry) -> str | None:
        """What differs from another geometry, or None."""
        if self.size != other.size:
            return f"size {_list(self.size)} is not {_list(other.size)}"
        step = min(other.spacing)
        # NIfTI keeps single precision: allow a thousandth of a voxel.
        for what, tolerance in (("spacing", 1e-3 * step), ("origin", 1e-2 * step), ("direction", 1e-3)):
            mine, theirs = getattr(self, what), getattr(other, what)
            if not np.allclose(mine, theirs, rtol=1e-5, atol=tolerance):
                return f"{what} {_list(mine)} is not {_list(theirs)}"
        return None


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
    results: Iterator[tuple[str, tuple[CaseResult, set[int], set[int]] | str | None]]
    held_by_references: set[int] = set()
    held_by_predictions: set[int] = set()
    if workers > 1:
        results = in_worker_processes(evaluate, predicted, workers)
    else:
        results = ((case, evaluate(case)) for case in predicted)
    report = FolderResult(missing=sorted(set(known) - set(predicted)))
    for case, result in tqdm(results, total=len(predicted), desc="evaluate", unit="case", disable=None, leave=False):
        if isinstance(result, tuple):
            report.cases.append(result[0])
            held_by_references |= result[1]
            held_by_predictions |= result[2]
        else:
            report.failed[case] = result or "the process that evaluated it ended, most often for lack of memory: -np 1"
    report.cases.sort(key=lambda one: one.case)
    # A mask of 255 where 1 was meant must not pass for one in which nothing is to be found, or was.
    named = segmentations.values - {0}
    for what, folder, held, allowed in (
        ("references", references, held_by_references, named),
        ("predictions", predictions, held_by_predictions, named | held_by_references),
    ):
        if held and not held & allowed:
            labels, found = (", ".join(map(str, sorted(values))) for values in (named, held))
            raise UserError(f"The labels are {labels}, but the {what} in {folder} hold {found}.")
    return report


def _cases(folder: Path, segmentations: Segmentations) -> list[str]:
    cases = segmentations.cases(folder)
    if not cases:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder.resolve()}.")
        raise UserError(
            f"The folder {folder} holds no file that ends in {segmentations.file_ending}. The ending is that of the "
            "dataset given with -d, or of --file-ending, with --labels."
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
            return f"the {what} holds {', '.join(map(str, unknown))}; the dataset's labels are {known}"
    metrics = evaluate_case(
        prediction,
        reference,
        segmentations.labels,
        reference_geometry.spacing,
        ignore_label=segmentations.ignore_label,
    )
    return CaseResult(case, metrics), held - {0}, predicted - {0}


def _is_label(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return bool(numbers) and all(type(number) is int for number in numbers)


def _is_ending(value: object) -> bool:
    return isinstance(value, str) and value.startswith(".") and len(value) > 1


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


def _list(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
