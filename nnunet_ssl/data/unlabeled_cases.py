"""Which unlabeled cases a training has: preprocessed cases of imagesUn, and a fold's `unlabeled` list."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.data.raw_cases import IMAGES_FOLDER, LABELED_IMAGES_FOLDER, unread_folders_message
from nnunet_ssl.data.records import has_files, read_record, records_folder, unlabeled_folder
from nnunet_ssl.data.splits import SPLITS_FILE, check_unlabeled, fold_lists
from nnunet_ssl.files import list_names


@dataclass(frozen=True)
class UnlabeledCase:
    """A preprocessed case whose label training does not see.

    Attributes:
        identifier: the case's name, without channel and file ending.
        folder: the preprocessed folder that holds it.
        source: where its image came from, ``imagesUn`` or ``imagesTr``.
    """

    identifier: str
    folder: Path
    source: str


def preprocessed_cases(folder: Path) -> set[str]:
    """The cases that nnU-Net finds in a folder of preprocessed labeled cases; none if it does not exist."""
    names = list_names(folder)
    blosc = {name.removesuffix(".b2nd") for name in names if name.endswith(".b2nd") and not name.endswith("_seg.b2nd")}
    return blosc | {name.removesuffix(".npz") for name in names if name.endswith(".npz")}


def ready_cases(preprocessed_dataset_folder: Path, data_identifier: str) -> dict[str, dict[str, Any]]:
    """{case: record} of the cases of imagesUn that are preprocessed and complete, sorted by name."""
    records = records_folder(preprocessed_dataset_folder, data_identifier)
    present = list_names(unlabeled_folder(preprocessed_dataset_folder, data_identifier))
    ready = {}
    for identifier in sorted(name[: -len(".json")] for name in list_names(records) if name.endswith(".json")):
        if has_files(identifier, present):
            record = read_record(records / f"{identifier}.json")
            if record is not None and record.get("status") == "ok":
                ready[identifier] = record
    return ready


def collect_unlabeled_cases(
    preprocessed_dataset_folder: Path, data_identifier: str, fold: int | str
) -> list[UnlabeledCase]:
    """All unlabeled cases of a fold: those of imagesUn that are preprocessed, and the fold's `unlabeled` list.

    Raises:
        UserError: the list is malformed, names a case that is not preprocessed, or one that the fold trains on.
    """
    folder = unlabeled_folder(preprocessed_dataset_folder, data_identifier)
    cases = [
        UnlabeledCase(identifier, folder, IMAGES_FOLDER)
        for identifier in ready_cases(preprocessed_dataset_folder, data_identifier)
    ]
    splits_file = preprocessed_dataset_folder / SPLITS_FILE
    lists = fold_lists(splits_file, fold) or {}
    listed = lists.get("unlabeled")
    if not listed:
        return cases

    labeled_folder = preprocessed_dataset_folder / data_identifier
    check_unlabeled(lists, f"fold {fold} in {splits_file}", labeled_folder, preprocessed_cases(labeled_folder))
    return cases + [UnlabeledCase(name, labeled_folder, LABELED_IMAGES_FOLDER) for name in sorted(listed)]


def no_unlabeled_cases_message(
    raw_dataset_folder: Path, preprocessed_dataset_folder: Path, fold: int | str | None = None
) -> str:
    """What to tell a user who has no unlabeled case: where this package looked, and how to add some.

    Args:
        raw_dataset_folder: may not exist.
        preprocessed_dataset_folder: of the same dataset.
        fold: None where no fold is concerned.
    """
    images_folder = raw_dataset_folder / IMAGES_FOLDER
    try:
        ending = json.loads((preprocessed_dataset_folder / "dataset.json").read_bytes())["file_ending"]
    except (OSError, ValueError, KeyError, TypeError):
        ending = ".nii.gz"
    names = [name for name in list_names(images_folder) if not name.startswith(".")]
    if not images_folder.is_dir():
        state = "does not exist"
    elif not names:
        state = "is empty"
    elif not any(name.endswith(ending) for name in names):
        state = f"contains {len(names)} files, but none ends in {ending}, as the images of this dataset do"
    else:
        state = "contains no case that can be preprocessed (nnunet-ssl preprocess lists the reasons)"
    message = f"There is no unlabeled case: {images_folder} {state}"
    if fold is not None:
        splits_file = preprocessed_dataset_folder / SPLITS_FILE
        message += f", and fold {fold} in {splits_file} has no 'unlabeled' list"
    if unread := unread_folders_message(raw_dataset_folder):
        message += f". {unread.removesuffix('.')}"
    return (
        f"{message}. Put images there, named as in {LABELED_IMAGES_FOLDER} (CASE_0000{ending}, one file per "
        "channel), or hide the labels of some training cases with nnunet-ssl split."
    )
