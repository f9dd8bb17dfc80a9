"""Which unlabeled cases there are: images on disk, preprocessed cases, and a fold's `unlabeled` list.

Nothing here opens an image: names, file listings and small JSON records answer every question.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.data.splits import SPLITS_FILE, fold_lists
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import shorten, some_of

IMAGES_FOLDER = "imagesUn"
LABELED_IMAGES_FOLDER = "imagesTr"

# What nnU-Net writes for a preprocessed case.
CASE_FILES = (".b2nd", "_seg.b2nd", ".pkl")


@dataclass(frozen=True)
class RawCase:
    """Images of one case, one file per channel, in order."""

    identifier: str
    images: tuple[Path, ...]


@dataclass(frozen=True)
class CaseProblem:
    """A case that cannot be used, or one that looks odd, and why."""

    identifier: str
    reason: str


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


def find_raw_cases(images_folder: Path, file_ending: str, num_channels: int) -> tuple[list[RawCase], list[CaseProblem]]:
    """Cases named as nnU-Net names them, ``CASE_0000`` + file ending, one file per channel.

    Hidden files, folders and files of another ending are passed over. A missing folder has no cases.

    Args:
        images_folder: such as ``nnUNet_raw/DatasetXXX_Name/imagesUn``.
        file_ending: the dataset's, such as ``.nii.gz``.
        num_channels: files that a case must have.

    Returns:
        the complete cases and, for all others, what is wrong with them, both sorted by name.
    """
    channels, unnamed = _channel_files(images_folder, file_ending)
    cases: list[RawCase] = []
    problems = [
        CaseProblem(
            _as_text(name.removesuffix(file_ending)),
            _as_text(f"{name} has no channel number; name it {name.removesuffix(file_ending)}_0000{file_ending}"),
        )
        for name in unnamed
    ]
    for identifier, names in channels.items():
        missing = [f"{identifier}_{c:04d}{file_ending}" for c in range(num_channels) if c not in names]
        extra = [name for channel, name in sorted(names.items()) if channel >= num_channels]
        reasons = []
        if missing:
            reasons.append(f"missing {', '.join(missing)}")
        if extra:
            reasons.append(f"not expected: {', '.join(extra)} ({num_channels} per case in this dataset)")
        if identifier.endswith("_seg"):
            reasons.append("nnU-Net keeps the ending _seg for segmentations; rename the case")
        if not _is_text(identifier):
            # ITK ends the whole process over such a name.
            reasons.append("its name is no valid UTF-8; rename its files")
        if reasons:
            problems.append(CaseProblem(_as_text(identifier), _as_text("; ".join(reasons))))
        else:
            cases.append(RawCase(identifier, tuple(images_folder / names[c] for c in range(num_channels))))
    cases.sort(key=lambda case: case.identifier)
    problems.sort(key=lambda problem: (problem.identifier, problem.reason))
    return cases, problems


def _is_text(name: str) -> bool:
    return name == _as_text(name)


def _as_text(name: str) -> str:
    # Python keeps bytes that are no UTF-8 as characters that cannot be printed.
    return name.encode(errors="backslashreplace").decode()


def files_per_case(raw_dataset_folder: Path, dataset_json: dict[str, Any]) -> int:
    """How many image files a case of this dataset has: one per channel, unless the labeled cases show otherwise.

    A color image or a 4D volume holds several channels in one file.
    """
    num_channels = len(channel_names(dataset_json))
    if "dataset" in dataset_json:
        counts = Counter(len(case["images"]) for case in dataset_json["dataset"].values())
    else:
        channels, _ = _channel_files(raw_dataset_folder / LABELED_IMAGES_FOLDER, dataset_json["file_ending"])
        counts = Counter(len(names) for names in channels.values())
    return counts.most_common(1)[0][0] if counts else num_channels


def labeled_images(raw_dataset_folder: Path, dataset_json: dict[str, Any]) -> list[Path]:
    """The first image file of each labeled case, sorted; none without imagesTr."""
    if "dataset" in dataset_json:
        return sorted(raw_dataset_folder / case["images"][0] for case in dataset_json["dataset"].values())
    channels, _ = _channel_files(raw_dataset_folder / LABELED_IMAGES_FOLDER, dataset_json["file_ending"])
    return sorted(raw_dataset_folder / LABELED_IMAGES_FOLDER / names[0] for names in channels.values() if 0 in names)


def channel_names(dataset_json: dict[str, Any]) -> dict[str, str]:
    """The dataset's channels; 'modality' is what older datasets call them."""
    return dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]


def _channel_files(folder: Path, file_ending: str) -> tuple[dict[str, dict[int, str]], list[str]]:
    """{case: {channel: file name}}, and the names that have the ending but no channel number."""
    pattern = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})" + re.escape(file_ending), re.ASCII | re.DOTALL)
    channels: dict[str, dict[int, str]] = {}
    unnamed: list[str] = []
    if not folder.is_dir():
        return channels, unnamed
    with os.scandir(folder) as entries:
        for entry in entries:
            # A dangling link is not passed over: that its image cannot be read must be seen.
            if entry.name.startswith(".") or not entry.name.endswith(file_ending) or _is_folder(entry):
                continue
            match = pattern.fullmatch(entry.name)
            if match is None:
                unnamed.append(entry.name)
            else:
                channels.setdefault(match["case"], {})[int(match["channel"])] = entry.name
    return channels, unnamed


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # links in a circle


def unlabeled_folder(preprocessed_dataset_folder: Path, data_identifier: str) -> Path:
    """Where the preprocessed cases of imagesUn are: nnU-Net's own files and nothing else.

    Raises:
        UserError: see :func:`folder_name`.
    """
    return preprocessed_dataset_folder / f"{folder_name(data_identifier, 'data_identifier')}_unlabeled"


def records_folder(preprocessed_dataset_folder: Path, data_identifier: str) -> Path:
    """Where each of these cases has its record, ``CASE.json``: what it was made from, and what came of it.

    Raises:
        UserError: see :func:`folder_name`.
    """
    return preprocessed_dataset_folder / f"{folder_name(data_identifier, 'data_identifier')}_unlabeled_records"


def folder_name(name: object, entry: str) -> str:
    """A folder's name out of the plans. Plans may come from others, and must not lead out of the dataset's folder.

    Args:
        name: what the plans say.
        entry: under which key, for the message.

    Raises:
        UserError: it is a path, or no name at all.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise UserError(
            f"The plans' {entry} is {shorten(name)}, which is no name of a folder. Plans that nnU-Net makes have "
            "none like this: make them anew with nnUNetv2_plan_and_preprocess, and see SECURITY.md."
        )
    return name


def list_names(folder: Path) -> set[str]:
    """Names in a folder, none if it does not exist."""
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return set()


def preprocessed_cases(folder: Path) -> set[str]:
    """The cases that nnU-Net finds in a folder of preprocessed labeled cases; none if it does not exist."""
    names = list_names(folder)
    blosc = {name.removesuffix(".b2nd") for name in names if name.endswith(".b2nd") and not name.endswith("_seg.b2nd")}
    return blosc | {name.removesuffix(".npz") for name in names if name.endswith(".npz")}


def read_record(file: Path) -> dict[str, Any] | None:
    """One case's record; None if it does not exist or is no record."""
    try:
        record = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


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


def has_files(identifier: str, names: set[str]) -> bool:
    """Whether all files of a preprocessed case are among the names."""
    return all(identifier + ending in names for ending in CASE_FILES)


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

    both = sorted(set(listed) & set(lists["train"]))
    if both:
        raise UserError(
            f"Fold {fold} in {splits_file} lists {some_of(both)} as 'train' and as 'unlabeled', so training would see "
            "labels that it must not. Keep each case in one of the two lists."
        )
    labeled_folder = preprocessed_dataset_folder / data_identifier
    missing = sorted(set(listed) - preprocessed_cases(labeled_folder))
    if missing:
        raise UserError(
            f"The 'unlabeled' list of fold {fold} in {splits_file} names {some_of(missing)}, but {labeled_folder} "
            "holds no such case. Correct the list, or preprocess the dataset again (nnUNetv2_preprocess)."
        )
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
        state = f"holds {len(names)} files, of which none ends in {ending} as this dataset's images do"
    else:
        state = "holds no case that could be preprocessed (nnunet-ssl preprocess lists the reasons)"
    message = f"There is no unlabeled case: {images_folder} {state}"
    if fold is not None:
        splits_file = preprocessed_dataset_folder / SPLITS_FILE
        message += f", and fold {fold} in {splits_file} has no 'unlabeled' list"
    return (
        f"{message}. Put images there, named as in {LABELED_IMAGES_FOLDER} (CASE_0000{ending}, one file per channel), "
        "or leave only some of the training cases labeled with nnunet-ssl split."
    )
