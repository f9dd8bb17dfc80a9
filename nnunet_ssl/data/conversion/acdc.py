"""ACDC, the Automated Cardiac Diagnosis Challenge: two frames of each patient, end-diastole and end-systole.

Names and labels are those of nnU-Net's own converter, ``Dataset027_ACDC``. Its ``convert_acdc`` cannot be called: it
takes ``nnUNet_raw`` for text, which it is not any more in nnU-Net 2.8; besides, it leaves out the labels of the test
cases, which are public by now. Its folds by patient, ``create_ACDC_split``, are used as they are.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import SimpleITK as sitk

from nnunet_ssl.data.conversion.source_dataset import (
    Findings,
    SourceCase,
    SourceDataset,
    check_sizes,
    check_spacings,
    check_values,
    in_test_folder,
    read_image,
    walk,
    write_image,
)

_ENDING = ".nii.gz"
_IMAGE = re.compile(r"(patient\d{3}_frame\d{2})\.nii(\.gz)?")
_PATIENT = len("patient000")


def _find(source: Path) -> Findings:
    cases = []
    for file in sorted(folder / name for folder, _, files in walk(source) for name in files):
        match = _IMAGE.fullmatch(file.name)
        if match is None:
            continue
        label = file.with_name(f"{match[1]}_gt.nii{match[2] or ''}")
        cases.append(SourceCase(match[1], (file,), label if label.is_file() else None, in_test_folder(file, source)))
    return Findings(cases)


def _write(case: SourceCase, images: Sequence[Path], label: Path | None) -> str:
    image = read_image(case.images[0])
    _copy(case.images[0], image, images[0])
    if label is not None and case.label is not None:
        mask = read_image(case.label)
        check_sizes(image, mask)
        check_spacings(image, mask)
        check_values(mask, case.label, range(4))
        _copy(case.label, mask, label)
    return ""


def _copy(file: Path, image: sitk.Image, destination: Path) -> None:
    if file.name.endswith(_ENDING):
        shutil.copyfile(file, destination)
    else:
        write_image(image, destination)


def _patient(case: str) -> str:
    """The patient of a frame: ``patient001`` of ``patient001_frame12``."""
    return case[:_PATIENT]


def _listed(line: str) -> str | None:
    # Lists that go round number a patient's frames 01 and 02, whatever they are in the download.
    match = re.fullmatch(r"(patient\d{3})(_frame\d{2})?(\.h5|\.nii\.gz)?", line)
    return match[1] if match else None


ACDC = SourceDataset(
    dataset_name="ACDC",
    channel_names={"0": "cineMRI"},
    labels={"background": 0, "RV": 1, "MLV": 2, "LVC": 3},
    file_ending=_ENDING,
    image_files=1,
    source="Automated Cardiac Diagnosis Challenge, https://www.creatis.insa-lyon.fr/Challenge/acdc/",
    expects="training/patient001/patient001_frameXX.nii.gz with patient001_frameXX_gt.nii.gz, and testing likewise",
    find=_find,
    write=_write,
    listed_group=_listed,
    group=_patient,
)
