"""BraTS 2019: brain tumors in four MRI sequences.

Channels, labels and regions are those of nnU-Net's own converter, ``Dataset043_BraTS19``. That is a script without a
function to call; its function for the labels is called here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.dataset_conversion.Dataset043_BraTS19 import copy_BraTS_segmentation_and_convert_labels_to_nnUNet

from nnunet_ssl.data.conversion.source_dataset import (
    Findings,
    SourceCase,
    SourceDataset,
    check_sizes,
    check_spacings,
    check_values,
    read_image,
    walk,
    write_image,
)
from nnunet_ssl.data.image_checks import BadImageError

SEQUENCES = ("t1", "t1ce", "t2", "flair")
_NAME = re.compile(r"BraTS19_\w+", re.ASCII)


def _find(source: Path) -> Findings:
    cases = []
    for folder in sorted(inner / name for inner, subfolders, _ in walk(source) for name in subfolders):
        if not _NAME.fullmatch(folder.name):
            continue
        images = tuple(_file(folder, sequence) for sequence in SEQUENCES)
        label = _file(folder, "seg")
        if not any(image.is_file() for image in images):
            continue
        # The official validation set, whose labels are not public, has no folders for the tumors' grades.
        graded = folder.parent.name.upper() in ("HGG", "LGG")
        has_label = label.is_file()
        cases.append(SourceCase(folder.name, images, label if has_label else None, test=not (graded or has_label)))
    return Findings(cases)


def _file(folder: Path, sequence: str) -> Path:
    plain = folder / f"{folder.name}_{sequence}.nii"
    return plain if plain.is_file() else plain.with_name(f"{plain.name}.gz")


def _write(case: SourceCase, images: Sequence[Path], label: Path | None) -> str:
    missing = [file.name for file in case.images if not file.is_file()]
    if missing:
        raise BadImageError(f"{', '.join(missing)} is missing")
    first = read_image(case.images[0])
    for file, destination in zip(case.images, images, strict=True):
        image = read_image(file)
        check_sizes(first, image, file.name)
        check_spacings(first, image, file.name)
        # nnU-Net takes no channels whose spacings differ, be it by rounding.
        image.SetSpacing(first.GetSpacing())
        write_image(image, destination)
    if label is not None and case.label is not None:
        mask = read_image(case.label)
        check_sizes(first, mask)
        check_spacings(first, mask)
        check_values(mask, case.label, (0, 1, 2, 4))
        copy_BraTS_segmentation_and_convert_labels_to_nnUNet(str(case.label), str(label))
    return ""


def _listed(line: str) -> str | None:
    match = re.fullmatch(r"(BraTS19_\w+?)(\.h5)?", line, re.ASCII)
    return match[1] if match else None


BRATS19 = SourceDataset(
    dataset_name="BraTS2019",
    channel_names={"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"},
    labels={"background": 0, "whole tumor": (1, 2, 3), "tumor core": (2, 3), "enhancing tumor": (3,)},
    file_ending=".nii.gz",
    image_files=len(SEQUENCES),
    source="Multimodal Brain Tumor Segmentation Challenge 2019, https://www.med.upenn.edu/cbica/brats2019/",
    expects="HGG/CASE and LGG/CASE, each with CASE_t1.nii, CASE_t1ce.nii, CASE_t2.nii, CASE_flair.nii and CASE_seg.nii",
    find=_find,
    write=_write,
    listed_group=_listed,
    regions_class_order=(1, 2, 3),
)
