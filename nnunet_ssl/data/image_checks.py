"""Reading one image and judging whether it can be used: bad input is named here, not halfway through training."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.nnunet_files import read_fingerprint
from nnunet_ssl.text import by_axis, one_line, unwrap

_SPACING_FACTOR = 2.0
_LEAST_COSINE = 0.5  # an axis that is turned by more than 60 degrees points elsewhere
_MOST_HEADERS = 200
_MOST_VOXELS = 2**31  # a wrong spacing in a header can ask for more memory than any machine has


# Of each of the three axes of a voxel array as stored, in file order, the unit vector (right, anterior, superior).
Direction = tuple[tuple[float, ...], ...]


class BadImageError(Exception):
    """The image itself is at fault: trying again is of no use until it changes."""


@dataclass(frozen=True)
class LabeledImages:
    """How the labeled images look; None where it is not known.

    Attributes:
        dimensions: 2 or 3.
        spacing: smallest and largest of each axis.
        intensities: percentiles 0.5 and 99.5 of each channel's foreground.
        directions: those that occur, see :func:`direction_of`; empty where the reader turns images itself.
    """

    dimensions: int | None
    spacing: tuple[tuple[float, float], ...] | None
    intensities: tuple[tuple[float, float] | None, ...]
    directions: tuple[Direction, ...] = ()


def describe_labeled_images(folder: Path, plans_manager: PlansManager, num_channels: int) -> LabeledImages:
    """What the fingerprint in the preprocessed dataset's folder and the plans tell about the labeled images.

    Raises:
        UserError: see :func:`~nnunet_ssl.data.nnunet_files.read_fingerprint`.
    """
    fingerprint = read_fingerprint(folder)
    dimensions = {2 if shape[0] == 1 else 3 for shape in fingerprint.get("shapes_after_crop", ())}
    spacings = fingerprint.get("spacings")
    properties = plans_manager.foreground_intensity_properties_per_channel
    intensities: list[tuple[float, float] | None] = []
    for channel in range(num_channels):
        found = properties.get(str(channel), {})
        known = "percentile_00_5" in found and "percentile_99_5" in found
        intensities.append((found["percentile_00_5"], found["percentile_99_5"]) if known else None)
    return LabeledImages(
        min(dimensions) if len(dimensions) == 1 else None,
        tuple((min(axis), max(axis)) for axis in zip(*spacings, strict=True)) if spacings else None,
        tuple(intensities),
    )


def directions_of(reader: Any, images: Sequence[Path]) -> tuple[Direction, ...]:
    """The directions that occur among images, by their headers; of very many images, only some are read.

    Args:
        reader: one of nnU-Net's readers.
        images: one file of each case.
    """
    some = images[:: -(-len(images) // _MOST_HEADERS) or 1]
    return tuple(sorted({found for file in some if (found := direction_of(reader, file)) is not None}))


def direction_of(reader: Any, file: Path) -> Direction | None:
    """Where the axes of an image point, by its header.

    Returns:
        see ``Direction``; None for a reader of nnU-Net's that turns images to one direction or knows none, for 2D
        images, and for a header that cannot be read.
    """
    try:
        if isinstance(reader, NibabelIO):
            axes = np.asarray(nibabel.load(file).affine, np.float64)[:3, :3]  # type: ignore[attr-defined]
        elif isinstance(reader, SimpleITKIO) and not isinstance(reader, SimpleITKIOWithReorient):
            header = _read_header(file)
            if header.GetDimension() < 3:
                return None
            axes = np.reshape(header.GetDirection(), (header.GetDimension(),) * 2)[:3, :3] * [[-1], [-1], [1]]
        else:
            return None
    except (RuntimeError, OSError, ValueError, ImageFileError, HeaderDataError):
        return None
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(axes).all() or not lengths.all():
        return None
    return tuple(tuple(float(part) for part in axis) for axis in np.round(axes / lengths, 2).T + 0.0)


def _read_header(file: Path) -> sitk.ImageFileReader:
    header = sitk.ImageFileReader()
    header.SetFileName(str(file))
    header.ReadImageInformation()
    return header


def direction_warnings(direction: Direction | None, labeled: LabeledImages) -> list[str]:
    """A warning if axes are flipped or permuted against those of all labeled images.

    nnU-Net's usual readers take voxels as they are stored, so the network would see such an image mirrored or turned.
    """
    if direction is None or not labeled.directions:
        return []
    cosines = np.sum(np.asarray(direction) * np.asarray(labeled.directions), axis=-1)  # (labeled directions, axis)
    if (cosines.min(axis=1) >= _LEAST_COSINE).any():
        return []
    others = ", ".join(sorted({_axis_codes(one) for one in labeled.directions}))
    return [
        f"its axes point to {_axis_codes(direction)}, those of the labeled images to {others}; nnU-Net does not "
        "reorient images, so the network sees it flipped or rotated"
    ]


def _axis_codes(direction: Direction) -> str:
    return "".join(nibabel.orientations.aff2axcodes(np.pad(np.asarray(direction).T, (0, 1))))


def read_image(reader: Any, files: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any]]:
    """Read one case.

    Args:
        reader: one of nnU-Net's readers.
        files: the case's images, one per channel.

    Returns:
        the image (C, X, Y, Z), and its properties.

    Raises:
        BadImageError: it cannot be read; the text says which file is at fault, or how the channels differ.
    """
    for file in files:
        check_file(reader, file)
    try:
        return reader.read_images([str(file) for file in files])
    except MemoryError:
        raise
    except Exception as error:
        shapes, spacings = {}, {}
        for file in files:
            try:
                image, properties = reader.read_images([str(file)])
            except Exception as cause:
                raise BadImageError(f"{file.name} cannot be read: {one_line(cause)}") from cause
            shapes[file.name] = by_axis(image.shape[1:])
            spacings[file.name] = by_axis([float(size) for size in properties["spacing"]])
        for what, of_file in (("shape", shapes), ("spacing", spacings)):
            if len(set(of_file.values())) > 1:
                found = ", ".join(f"{name} {value}" for name, value in of_file.items())
                raise BadImageError(f"the channels differ in {what}: {found}") from error
        raise BadImageError(f"cannot be read: {one_line(error)}") from error


def check_file(reader: Any, file: Path) -> None:
    """Find what nnU-Net's readers hide or misread in an image or a segmentation.

    Args:
        reader: one of nnU-Net's readers.
        file: of any origin.

    Raises:
        BadImageError: see :func:`check_nifti`; or its voxels are vectors.
    """
    if file.name.endswith((".nii", ".nii.gz")):
        check_nifti(file)
    if isinstance(reader, SimpleITKIO):
        _check_single_values(file)


def _check_single_values(file: Path) -> None:
    """SimpleITK gives vectors as a last axis, which nnU-Net takes for one of the image and the first for channels."""
    try:
        header = _read_header(file)
    except RuntimeError:
        return  # the reader has the last word
    if header.GetNumberOfComponents() > 1 and "vector" in sitk.GetPixelIDValueAsString(header.GetPixelID()):
        raise _not_single(file, header.GetNumberOfComponents())


def _not_single(file: Path, count: int) -> BadImageError:
    kind = {3: "RGB", 4: "RGBA"}.get(count, "vector")
    return BadImageError(
        f"{file.name} has {kind} voxels with {count} values each, but nnU-Net reads one value: store gray values, or "
        "each channel in its own file"
    )


def check_nifti(file: Path) -> None:
    """Find what ITK hides: it fills an incomplete file up with zeros, does not look at checksums, and reads NaN and
    infinite voxels as zero and an axis of size 0 as one of size 1.

    Raises:
        BadImageError: the file is damaged, or hides one of these.
    """
    if file.stat().st_size == 0:
        raise BadImageError(f"{file.name} is empty")
    try:
        if file.suffix == ".gz":
            # Neither ITK nor nibabel goes on to the checksum at the end.
            with gzip.open(file) as opened:
                while opened.read(2**22):
                    pass
        image = nibabel.load(file)
        # As stored: scaled, they would be 64-bit floating numbers.
        voxels = image.dataobj.get_unscaled()  # type: ignore[attr-defined]
    except PermissionError as error:
        raise BadImageError(f"{file.name} cannot be read: {error.strerror}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadImageError(f"{file.name} is damaged or incomplete: {unwrap(error)}") from error
    except (ImageFileError, HeaderDataError, ValueError, OverflowError):
        # What nibabel finds wrong with a header may not trouble the reader, which has the last word.
        return
    if voxels.size == 0:
        raise BadImageError(f"{file.name} has no voxels: an axis has size 0")
    if voxels.dtype.names is not None:
        raise _not_single(file, len(voxels.dtype.names))
    if voxels.ndim == 5 and voxels.shape[4] > 1:
        raise _not_single(file, voxels.shape[4])
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels)) if voxels.dtype.kind in "fc" else 0
    if bad:
        raise BadImageError(f"{file.name} has {bad} voxels that are NaN or infinite")


def check_image(image: np.ndarray, spacing: Sequence[float], *, labeled: LabeledImages) -> list[tuple[float, float]]:
    """Compare an image with the labeled ones, which also tell how many channels it must have.

    Args:
        image: (C, X, Y, Z), as nnU-Net's reader returns it.
        spacing: of the three axes.
        labeled: how the labeled images look.

    Returns:
        lowest and highest value of each channel, for :func:`image_warnings`.

    Raises:
        BadImageError: it cannot be used.
    """
    num_channels = len(labeled.intensities)
    if image.shape[0] != num_channels:
        raise BadImageError(f"{image.shape[0]} channels, but this dataset has {num_channels}")
    if 0 in image.shape:
        raise BadImageError(f"an axis has size 0: {by_axis(image.shape[1:])}")
    if not all(math.isfinite(size) and size > 0 for size in spacing):
        raise BadImageError(f"impossible spacing {by_axis(spacing)}")
    dimensions = 2 if image.shape[1] == 1 else 3
    if labeled.dimensions not in (None, dimensions):
        raise BadImageError(
            f"a {dimensions}D image of {by_axis(image.shape[1:])} voxels, but the labeled images are "
            f"{labeled.dimensions}D"
        )
    lowest = [float(channel.min()) for channel in image]
    highest = [float(channel.max()) for channel in image]
    if not all(map(math.isfinite, [*lowest, *highest])):
        raise BadImageError(f"{np.count_nonzero(~np.isfinite(image))} of {image.size} voxels are NaN or infinite")
    if lowest == highest:
        raise BadImageError(f"all voxels have the same value ({', '.join(f'{value:g}' for value in lowest)})")
    for warning in _spacing_warnings(spacing, labeled):
        assert labeled.spacing is not None
        voxels = image.size * math.prod(size / low for size, (low, _) in zip(spacing, labeled.spacing, strict=True))
        if voxels > _MOST_VOXELS:
            raise BadImageError(f"{warning}; resampled it has {voxels:.2g} voxels; correct the spacing in its header")
    return list(zip(lowest, highest, strict=True))


def image_warnings(
    spacing: Sequence[float], intensities: Sequence[tuple[float, float]], labeled: LabeledImages
) -> list[str]:
    """In what an image that can be used is unlike the labeled ones.

    Args:
        spacing: of the three axes.
        intensities: lowest and highest value of each channel.
        labeled: how the labeled images look, which changes with them and their plans.
    """
    return _spacing_warnings(spacing, labeled) + _intensity_warnings(intensities, labeled)


def _spacing_warnings(spacing: Sequence[float], labeled: LabeledImages) -> list[str]:
    if labeled.spacing is None or all(
        low / _SPACING_FACTOR <= size <= high * _SPACING_FACTOR
        for size, (low, high) in zip(spacing, labeled.spacing, strict=True)
    ):
        return []
    ranges = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in labeled.spacing)
    return [f"spacing {by_axis(spacing)} is far from the labeled images' ({ranges})"]


def _intensity_warnings(intensities: Sequence[tuple[float, float]], labeled: LabeledImages) -> list[str]:
    warnings = []
    for channel, ((low, high), usual) in enumerate(zip(intensities, labeled.intensities, strict=False)):
        if low == high:
            warnings.append(f"all voxels of channel {channel} have the same value ({low:g})")
        elif usual is not None and (high < usual[0] or low > usual[1]):
            warnings.append(
                f"intensities of channel {channel} ({low:g} to {high:g}) are outside the range of the labeled "
                f"foreground ({usual[0]:g} to {usual[1]:g})"
            )
    return warnings
