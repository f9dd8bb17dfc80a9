"""The left atrium: the 2018 Atrial Segmentation Challenge, and the h5 files made of its training set.

The h5 files are those of UA-MT (Yu et al., MICCAI 2019), which most papers use: cropped around the atrium in the plane,
and normalized to zero mean and unit standard deviation. Their arrays are (X, Y, Z), the order in which pynrrd reads the
challenge's files. They hold no spacing; the challenge's scans have 0.625 mm in each direction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.data.conversion.source_dataset import (
    Findings,
    SourceCase,
    SourceDataset,
    binary_mask,
    check_sizes,
    image_from_array,
    in_test_folder,
    read_image,
    walk,
    write_image,
)
from nnunet_ssl.data.image_checks import BadImageError
from nnunet_ssl.errors import UserError

SPACING = 0.625  # mm
_IMAGE, _LABEL, _H5, _TEST_LIST = "lgemri.nrrd", "laendo.nrrd", "mri_norm2.h5", "test.list"


def _find(source: Path) -> Findings:
    found = sorted(folder / name for folder, _, files in walk(source) for name in files if name in (_IMAGE, _H5))
    images, cases = [file for file in found if file.name == _IMAGE], []
    notes: list[str] = []
    for image in images:
        label = image.with_name(_LABEL)
        is_test = in_test_folder(image, source)
        cases.append(SourceCase(image.parent.name, (image,), label if label.is_file() else None, is_test))
    if not cases:
        # Only without the original files: where both lie side by side, the h5 files were made from them.
        images = found
        cases = [SourceCase(file.parent.name, (file,), file) for file in images]
        if cases:
            _h5py()
    test_list = _find_test_list(source, images[0].parent.parent) if images else None
    if cases and test_list is None and not any(case.test for case in cases):
        notes.append(
            f"No {_TEST_LIST} found in the folder of the cases or above it, so all of them are training cases."
        )
    return Findings(cases, test_list, notes)


def _find_test_list(source: Path, cases: Path) -> Path | None:
    """Next to the cases' folders or above, up to the folder given; above that where it holds the cases itself."""
    folders = [folder for folder in (cases, *cases.parents) if folder.is_relative_to(source)]
    if cases == source:
        folders.append(source.parent)
    return next((folder / _TEST_LIST for folder in folders if (folder / _TEST_LIST).is_file()), None)


def _write(case: SourceCase, images: Sequence[Path], label: Path | None) -> str:
    mask: sitk.Image | None
    if case.images[0].name == _H5:
        image, mask = _read_h5(case.images[0])
    else:
        image = read_image(case.images[0])
        mask = read_image(case.label) if case.label is not None else None
    write_image(image, images[0])
    if label is not None and mask is not None:
        check_sizes(image, mask)
        # Voxel by voxel, as every paper on this dataset takes them; the label's own header is not looked at.
        write_image(image_from_array(binary_mask(sitk.GetArrayFromImage(mask)), image), label)
    return ""


def _read_h5(file: Path) -> tuple[sitk.Image, sitk.Image]:
    arrays = []
    with _h5py().File(file, "r") as opened:
        for name in ("image", "label"):
            dataset = opened.get(name)
            if getattr(dataset, "ndim", None) != 3 or dataset.dtype.kind not in "fiu":
                raise BadImageError(f"{file.name} has no three-dimensional array {name!r}")
            arrays.append(dataset[()])
    image, label = arrays
    if not np.isfinite(image).all():
        raise BadImageError(f"{file.name} has voxels that are NaN or infinite")
    read = []
    for array in (image.astype(np.float32), label):
        # SimpleITK's arrays are (Z, Y, X).
        one = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
        one.SetSpacing([SPACING] * 3)
        read.append(one)
    return read[0], read[1]


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise UserError(
            f"{_H5} files are read with h5py, which is not installed. Install it: pip install h5py"
        ) from None
    return h5py


def _listed(line: str) -> str | None:
    match = re.fullmatch(rf"([A-Za-z0-9_-]+)(?:/{re.escape(_H5)}|\.h5)?", line)
    return match[1] if match else None


LEFT_ATRIUM = SourceDataset(
    dataset_name="LA2018",
    channel_names={"0": "LGE-MRI"},
    labels={"background": 0, "left atrium": 1},
    file_ending=".nii.gz",
    image_files=1,
    source="2018 Atrial Segmentation Challenge, https://www.cardiacatlas.org/atriaseg2018-challenge/",
    expects=f"folders CASE/{_IMAGE} with CASE/{_LABEL} (in 'Training Set' and 'Testing Set'), or CASE/{_H5}",
    find=_find,
    write=_write,
    listed_group=_listed,
)
