"""The NIH pancreas: Pancreas-CT of The Cancer Imaging Archive, scans as DICOM and labels as NIfTI.

The labels do not fit the scans by their headers. Published pipelines therefore leave the headers aside and take the
voxels as they are stored: columns and rows as in the DICOM slices, slices from inferior to superior. Those that first
converted the scans with dcm2niix, which turns the rows round, have to turn the labels round too (deedsBCV's README).

Here a label's header is believed where it puts the label exactly onto the scan, whatever the order of its axes. Where
it does not, the voxels are taken as they are stored. A label that then lies in air is refused. Scans and labels are
written with their axes to left, posterior and superior, so that nnU-Net, which looks at voxels and not at headers,
always sees patients in the same position.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.data.conversion.source_dataset import (
    Findings,
    SourceCase,
    SourceDataset,
    binary_mask,
    check_sizes,
    check_spacings,
    image_from_array,
    read_image,
    walk,
    write_image,
)
from nnunet_ssl.data.image_checks import BadImageError

_SCAN = re.compile(r"(?:PANCREAS_|image)(\d{4})(?:\.nii(?:\.gz)?)?", re.IGNORECASE)
_LABEL = re.compile(r"label(\d{4})\.nii(?:\.gz)?")
_TOLERANCE = 0.4  # voxels between the corners of scan and label: rounded headers, but no shift
_AIR = -300.0  # HU, between fat and lung
_MOST_AIR = 0.2


def _find(source: Path) -> Findings:
    labels: dict[str, Path] = {}
    scans: list[tuple[str, Path]] = []
    for folder, subfolders, files in walk(source):
        for name in sorted(files):
            if match := _LABEL.fullmatch(name):
                labels[match[1]] = folder / name
            elif (match := _SCAN.fullmatch(name)) and ".nii" in name:
                scans.append((match[1], folder / name))
        for name in sorted(subfolders):
            match = _SCAN.fullmatch(name)
            if match and ".nii" not in name:
                scans.append((match[1], folder / name))
                subfolders.remove(name)
    return Findings([SourceCase(f"PANCREAS_{number}", (scan,), labels.get(number)) for number, scan in sorted(scans)])


def _write(case: SourceCase, images: Sequence[Path], label: Path | None) -> str:
    (scan,) = case.images
    image = sitk.DICOMOrient(read_series(scan) if scan.is_dir() else read_image(scan), "LPS")
    write_image(image, images[0])
    if label is None or case.label is None:
        return ""
    mask, note = match_label(image, read_image(case.label))
    write_image(mask, label)
    return note


def read_series(folder: Path) -> sitk.Image:
    """Read the one DICOM series in a folder and the folders in it.

    Raises:
        BadImageError: there is none, or several, or slices are missing.
    """
    series = []
    for inner, _, files in walk(folder):
        if files:
            for identifier in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(inner)):
                slices = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(inner), identifier)
                if len(slices) > 1:
                    series.append(slices)
    if len(series) != 1:
        found = f"{len(series)} DICOM series" if series else "no DICOM series of several slices"
        raise BadImageError(f"{folder} contains {found}, expected one")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(series[0])
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    normal = np.reshape(image.GetDirection(), (3, 3))[:, 2]
    positions = [
        np.dot(normal, [float(value) for value in reader.GetMetaData(index, "0020|0032").split("\\")])
        for index in range(len(series[0]))
    ]
    steps = np.diff(positions)
    usual = float(np.median(steps))
    if usual <= 0 or steps.min() < 0.5 * usual or steps.max() > 1.5 * usual:
        raise BadImageError(
            f"the slices are {steps.min():.3g} to {steps.max():.3g} mm apart: some are missing or duplicated"
        )
    return image


def match_label(image: sitk.Image, label: sitk.Image) -> tuple[sitk.Image, str]:
    """Bring a label onto the grid of its scan; see this module's text.

    Args:
        image: with its axes to left, posterior and superior (LPS).
        label: as downloaded.

    Returns:
        a mask of 0 and 1 on the scan's grid, and a note if the label's header was left aside.

    Raises:
        BadImageError: sizes or spacings differ, or the label lies in air.
    """
    oriented = sitk.DICOMOrient(label, "LPS")
    note = ""
    if not _covers(image, oriented):
        check_sizes(image, label)
        check_spacings(image, label)
        oriented = label
        note = "the label's header does not fit the scan; its voxels were taken in the order of the DICOM slices"
    mask = binary_mask(sitk.GetArrayFromImage(oriented))
    air = float((sitk.GetArrayViewFromImage(image)[mask > 0] < _AIR).mean())
    if air > _MOST_AIR:
        raise BadImageError(f"{air:.0%} of the label is in air or lung: it does not fit the scan, or is flipped")
    return image_from_array(mask, image), note


def _covers(image: sitk.Image, label: sitk.Image) -> bool:
    """Whether each voxel of the label is one of the image's, by their headers."""
    if image.GetSize() != label.GetSize():
        return False
    for corner in itertools.product(*((0, size - 1) for size in image.GetSize())):
        # In voxels of the image, so that the tolerance is one in voxels.
        where = image.TransformPhysicalPointToContinuousIndex(label.TransformIndexToPhysicalPoint(corner))
        if np.abs(np.subtract(where, corner)).max() > _TOLERANCE:
            return False
    return True


def _listed(line: str) -> str | None:
    match = re.fullmatch(r"(?:PANCREAS_|image|label)?(\d{4})(?:_norm)?(?:\.h5|\.nii\.gz)?", line, re.IGNORECASE)
    return f"PANCREAS_{match[1]}" if match else None


PANCREAS = SourceDataset(
    dataset_name="NIHPancreas",
    channel_names={"0": "CT"},
    labels={"background": 0, "pancreas": 1},
    file_ending=".nii.gz",
    image_files=1,
    source="Pancreas-CT, The Cancer Imaging Archive, https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU",
    expects="folders PANCREAS_0001 of DICOM files (or PANCREAS_0001.nii.gz), and label0001.nii.gz, in any subfolders",
    find=_find,
    write=_write,
    listed_group=_listed,
)
