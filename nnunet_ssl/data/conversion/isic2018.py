"""ISIC 2018, task 1: the boundary of skin lesions in dermoscopic photographs.

nnU-Net takes no JPEG for a dataset, so the pixels that its reader decodes are written as PNG, without loss. A color
image is one file with three channels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

from nnunet_ssl.data.conversion.source_dataset import Findings, SourceCase, SourceDataset, binary_mask, walk
from nnunet_ssl.data.image_checks import BadImageError

_INPUTS = "ISIC2018_Task1-2_{}_Input"
_MASKS = "ISIC2018_Task1_{}_GroundTruth"


def _find(source: Path) -> Findings:
    cases: list[SourceCase] = []
    notes: list[str] = []
    named: dict[str, list[Path]] = {source.name: [source]}
    for inner, subfolders, _ in walk(source):
        for name in subfolders:
            named.setdefault(name, []).append(inner / name)
    for part in ("Training", "Test"):
        folders, masks = (named.get(name.format(part), []) for name in (_INPUTS, _MASKS))
        for image in sorted(file for folder in folders for file in folder.glob("ISIC_*.jpg")):
            found = [folder / f"{image.stem}_segmentation.png" for folder in masks]
            label = next((file for file in found if file.is_file()), None)
            cases.append(SourceCase(image.stem, (image,), label, test=part == "Test"))
    if _INPUTS.format("Validation") in named:
        notes.append("The official validation images are left out: nnU-Net validates on a part of the training images.")
    return Findings(cases, notes=notes)


def _write(case: SourceCase, images: Sequence[Path], label: Path | None) -> str:
    image = _read(case.images[0], channels=3)
    _save(image.transpose(1, 2, 0), images[0])
    if label is not None and case.label is not None:
        mask = _read(case.label, channels=1)[0]
        if mask.shape != image.shape[1:]:
            raise BadImageError(f"the image has {image.shape[1:]} pixels, its label {mask.shape}")
        _save(binary_mask(mask), label)
    return ""


def _read(file: Path, *, channels: int) -> np.ndarray:
    """The pixels (C, Y, X), 0 to 255."""
    pixels = NaturalImage2DIO().read_images([str(file)])[0][:, 0]
    if len(pixels) != channels or pixels.max() > 255:
        raise BadImageError(
            f"{file.name} has {len(pixels)} channels up to {pixels.max():g}; expected {channels} of 8 bit"
        )
    return pixels.astype(np.uint8)


def _save(pixels: np.ndarray, file: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(pixels), isVector=pixels.ndim == 3), str(file))


def _listed(line: str) -> str | None:
    match = re.fullmatch(r"(ISIC_\d{7})(\.jpg|\.png)?", line)
    return match[1] if match else None


ISIC2018 = SourceDataset(
    dataset_name="ISIC2018",
    channel_names={"0": "R", "1": "G", "2": "B"},
    labels={"background": 0, "lesion": 1},
    file_ending=".png",
    image_files=1,
    source="ISIC Challenge 2018, task 1, https://challenge.isic-archive.com/data/#2018",
    expects=f"{_INPUTS.format('Training')}/*.jpg and {_MASKS.format('Training')}/*_segmentation.png",
    find=_find,
    write=_write,
    listed_group=_listed,
)
