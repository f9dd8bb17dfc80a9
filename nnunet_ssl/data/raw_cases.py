"""Cases as a dataset has them on disk: images in imagesUn and imagesTr, named as nnU-Net names them.

Nothing here opens an image: names, file listings and small JSON files answer every question.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.text import closest

IMAGES_FOLDER = "imagesUn"
_NNUNETS_FOLDERS = {"imagesTr", "labelsTr", "imagesTs", "labelsTs"}
LABELED_IMAGES_FOLDER = "imagesTr"
# Of images in the formats that nnU-Net reads, and of those that people convert from.
_IMAGE_ENDINGS = (
    *(".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".gipl.gz", ".png", ".bmp", ".tif", ".tiff"),
    *(".jpg", ".jpeg", ".dcm", ".h5"),
)


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


def name_problems(problems: Sequence[CaseProblem], limit: int = 50) -> str:
    """What is wrong with cases, one a line, for a message."""
    lines = [f"\n  {problem.identifier}: {problem.reason}" for problem in problems[:limit]]
    more = f"\n  and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"{len(problems)} problem(s):{''.join(lines)}{more}"


def find_raw_cases(images_folder: Path, file_ending: str, num_channels: int) -> tuple[list[RawCase], list[CaseProblem]]:
    """Cases named as nnU-Net names them, ``CASE_0000`` + file ending, one file per channel.

    Hidden files, folders and files that are no images are passed over. A missing folder has no cases.

    Args:
        images_folder: such as ``nnUNet_raw/DatasetXXX_Name/imagesUn``.
        file_ending: the dataset's, such as ``.nii.gz``.
        num_channels: files that a case must have.

    Returns:
        the complete cases and, for all others, what is wrong with them, both sorted by name. An image of another ending
        is a problem under its file's name, since a case of that name may be there.
    """
    channels, unnamed, foreign = _channel_files(images_folder, file_ending)
    cases: list[RawCase] = []
    problems = [
        CaseProblem(
            _as_text(name.removesuffix(file_ending)),
            _as_text(f"{name} has no channel number; name it {name.removesuffix(file_ending)}_0000{file_ending}"),
        )
        for name in unnamed
    ] + [
        CaseProblem(
            _as_text(name),
            f"it does not end in {file_ending} as the images of this dataset do; convert it, or remove it from here",
        )
        for name in foreign
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
            reasons.append("its name is not valid UTF-8; rename its files")
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
        channels, _, _ = _channel_files(raw_dataset_folder / LABELED_IMAGES_FOLDER, dataset_json["file_ending"])
        counts = Counter(len(names) for names in channels.values())
    return counts.most_common(1)[0][0] if counts else num_channels


def labeled_images(raw_dataset_folder: Path, dataset_json: dict[str, Any]) -> dict[str, Path]:
    """The first image file of each labeled case by its name, sorted; none without imagesTr."""
    if "dataset" in dataset_json:
        listed = sorted(dataset_json["dataset"].items())
        return {name: raw_dataset_folder / case["images"][0] for name, case in listed}
    channels, _, _ = _channel_files(raw_dataset_folder / LABELED_IMAGES_FOLDER, dataset_json["file_ending"])
    folder = raw_dataset_folder / LABELED_IMAGES_FOLDER
    return {name: folder / names[0] for name, names in sorted(channels.items()) if 0 in names}


def channel_names(dataset_json: dict[str, Any]) -> dict[str, str]:
    """The dataset's channels; 'modality' is what older datasets call them."""
    return dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]


def misnamed_folders(raw_dataset_folder: Path) -> list[str]:
    """Folders whose names are almost that of the unlabeled images, in a dataset without a folder of this name."""
    if not raw_dataset_folder.is_dir() or (raw_dataset_folder / IMAGES_FOLDER).is_dir():
        return []
    names = {entry.name for entry in raw_dataset_folder.iterdir() if entry.is_dir()} - _NNUNETS_FOLDERS
    meant = re.compile(r"images?_?-?un|unlabel+ed", re.IGNORECASE)
    return sorted(name for name in names if meant.match(name) or closest(name, [IMAGES_FOLDER], cutoff=0.8))


def unread_folders_message(raw_dataset_folder: Path) -> str:
    """That there are :func:`misnamed_folders` and what to do; empty where there are none."""
    names = ", ".join(misnamed_folders(raw_dataset_folder))
    return (
        names and f"{raw_dataset_folder} has {names}, which nothing reads: unlabeled images belong in {IMAGES_FOLDER}."
    )


def _channel_files(folder: Path, file_ending: str) -> tuple[dict[str, dict[int, str]], list[str], list[str]]:
    """{case: {channel: file name}}, names that have the ending but no channel number, and images of other endings."""
    pattern = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})" + re.escape(file_ending), re.ASCII | re.DOTALL)
    channels: dict[str, dict[int, str]] = {}
    unnamed: list[str] = []
    foreign: list[str] = []
    if not folder.is_dir():
        return channels, unnamed, foreign
    with os.scandir(folder) as entries:
        for entry in entries:
            # A dangling link is not passed over: that its image cannot be read must be seen.
            if entry.name.startswith(".") or _is_folder(entry):
                continue
            if not entry.name.endswith(file_ending):
                if entry.name.lower().endswith(_IMAGE_ENDINGS):
                    foreign.append(entry.name)
                continue
            match = pattern.fullmatch(entry.name)
            if match is None:
                unnamed.append(entry.name)
            else:
                channels.setdefault(match["case"], {})[int(match["channel"])] = entry.name
    return channels, unnamed, foreign


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # links in a circle
