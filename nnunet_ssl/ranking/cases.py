"""Which cases are ranked, and what the labeled ones are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.data.image_checks import BadImageError
from nnunet_ssl.data.queue import Model, is_case_name
from nnunet_ssl.data.raw_cases import IMAGES_FOLDER, files_per_case, find_raw_cases
from nnunet_ssl.data.splits import Fold
from nnunet_ssl.evaluation.segmentations import Segmentations
from nnunet_ssl.ranking.scores import LabeledRange, volumes
from nnunet_ssl.text import shorten, some_of

MOST_LABELED = 200
"""Labeled cases that are read for the range of volumes; more hardly widen it."""


@dataclass(frozen=True)
class UnlabeledCases:
    """What there is to rank.

    Attributes:
        images: image files by case, relative to the dataset's folder or absolute.
        problems: reasons by case, of cases that cannot be ranked.
        notes: what the user should know.
    """

    images: Mapping[str, tuple[str, ...]]
    problems: Mapping[str, str]
    notes: Sequence[str]


def find_unlabeled(
    raw: Path, dataset_json: dict[str, Any], folds: Sequence[Fold], models: Sequence[Model]
) -> UnlabeledCases:
    """The cases of imagesUn, and those whose labels the models' folds hide.

    Args:
        raw: the dataset's folder in nnUNet_raw.
        dataset_json: of the dataset.
        folds: of the models; their ``unlabeled`` lists count.
        models: a case on which one of them was trained is no unlabeled case.
    """
    ending = dataset_json["file_ending"]
    found, wrong = find_raw_cases(raw / IMAGES_FOLDER, ending, files_per_case(raw, dataset_json))
    problems = {problem.identifier: problem.reason for problem in wrong}
    images = {case.identifier: tuple(_relative(file, raw) for file in case.images) for case in found}

    notes = []
    hidden = {case for fold in folds for case in fold.get("unlabeled", ())}
    if known := sorted(hidden & {case for model in models for case in model.trained_on}):
        notes.append(f"Left out, since a model was trained on their labels, which other folds hide: {some_of(known)}")
    labeled = get_filenames_of_train_images_and_targets(str(raw), dataset_json) if hidden else {}
    for case in sorted(hidden.difference(known)):
        if case not in labeled:
            problems[case] = "a fold names it as 'unlabeled', but the dataset has no such case"
        elif case in images:
            del images[case]
            problems[case] = f"{IMAGES_FOLDER} and the labeled cases both have it; rename one of them"
        else:
            images[case] = tuple(_relative(Path(file), raw) for file in labeled[case]["images"])
    for case in [case for case in images if not is_case_name(case)]:
        del images[case]
        problems[shorten(case)] = "its name cannot be a file's name on every system; rename it"
    return UnlabeledCases(dict(sorted(images.items())), problems, notes)


def _relative(file: Path, raw: Path) -> str:
    return file.relative_to(raw).as_posix() if file.is_relative_to(raw) else str(file.absolute())


def labeled_ranges(
    raw: Path,
    dataset_json: dict[str, Any],
    segmentations: Segmentations,
    models: Sequence[Model],
) -> tuple[dict[str, LabeledRange], dict[str, str]]:
    """Smallest and largest volume of each structure in the cases on which the models were trained.

    Of very many cases, :data:`MOST_LABELED` are read. A case with the ignore label does not count: it does not tell how
    large a structure is.

    Args:
        raw: the dataset's folder in nnUNet_raw.
        dataset_json: of the dataset.
        segmentations: how the labels are stored.
        models: that rank.

    Returns:
        ranges by structure, none where no case counts; reasons by case, of those whose labels cannot be read.
    """
    files = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    cases = sorted({case for model in models for case in model.trained_on} & set(files))
    found: list[dict[str, float]] = []
    unread: dict[str, str] = {}
    for case in cases[:: -(-len(cases) // MOST_LABELED) or 1]:
        try:
            label_map, geometry = segmentations.read(Path(files[case]["label"]))
        except BadImageError as error:
            unread[case] = str(error)
            continue
        if segmentations.ignore_label is None or not (label_map == segmentations.ignore_label).any():
            found.append(volumes(label_map, segmentations.labels, geometry.spacing))
    names = segmentations.labels if found else ()
    ranges = {name: LabeledRange(min(one[name] for one in found), max(one[name] for one in found)) for name in names}
    return ranges, unread
