"""What converters share: the description of a dataset, looking through a download, reading and writing images."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.data.image_checks import BadImageError, check_nifti
from nnunet_ssl.text import by_axis, some_of

Label = int | tuple[int, ...]
_TEST_FOLDER = re.compile(r"test(ing)?([ _-]?set)?", re.IGNORECASE)


@dataclass(frozen=True)
class SourceCase:
    """One case of a download.

    Attributes:
        name: the case in nnU-Net.
        images: the files or the folder that its images are made from.
        label: None if the download has none.
        test: one of the official test cases.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    test: bool = False


@dataclass(frozen=True)
class Findings:
    """What a download holds.

    Attributes:
        cases: in any order.
        test_list: a list of test cases that came with the download.
        notes: what the user should know about this download.
    """

    cases: list[SourceCase]
    test_list: Path | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SourceDataset:
    """How a dataset is found, converted and described.

    Attributes:
        dataset_name: the NAME of DatasetXXX_NAME.
        channel_names: as in dataset.json.
        labels: as in dataset.json.
        file_ending: of the files written.
        image_files: image files of a case, numbered from 0000.
        source: the official source.
        expects: what the folder given must hold, for messages.
        find: lists the cases of a download.
        write: converts a case into the image files and the label file given, the latter None if it has no label;
            returns a note for the user, mostly empty. Any exception means that this case cannot be used.
        listed_group: the group that a line of a list of test cases names; None if it is no such name.
        group: what must not be torn apart by a split: a patient, or the case itself.
        regions_class_order: as in dataset.json.
    """

    dataset_name: str
    channel_names: Mapping[str, str]
    labels: Mapping[str, Label]
    file_ending: str
    image_files: int
    source: str
    expects: str
    find: Callable[[Path], Findings]
    write: Callable[[SourceCase, Sequence[Path], Path | None], str]
    listed_group: Callable[[str], str | None]
    group: Callable[[str], str] = str
    regions_class_order: tuple[int, ...] | None = None


def walk(source: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder of a download once, with its subfolders and files, through links too.

    As with ``os.walk``, subfolders that the caller removes from their list are not entered.

    Raises:
        OSError: a folder cannot be read.
    """
    pending, seen = [source], set()
    while pending:
        for name, subfolders, files in os.walk(pending.pop(0), onerror=_raise):
            folder = Path(name)
            if folder.resolve() in seen:
                subfolders.clear()
                continue
            seen.add(folder.resolve())
            subfolders.sort()
            yield folder, subfolders, files
            # Links come last: what lies in the download itself is found where it lies, which may make it a test case.
            pending += [folder / one for one in subfolders if (folder / one).is_symlink()]


def _raise(error: OSError) -> None:
    raise error


def read_image(file: Path) -> sitk.Image:
    """Read a 3D image of one component.

    Raises:
        BadImageError: it is damaged, or has other dimensions.
        RuntimeError: SimpleITK cannot read it.
    """
    if file.name.endswith((".nii", ".nii.gz")):
        check_nifti(file)
    image = sitk.ReadImage(str(file))
    dimensions, components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if dimensions != 3 or components != 1:
        raise BadImageError(f"{file.name} has {dimensions} dimensions and {components} components, expected 3 and 1")
    return image


def write_image(image: sitk.Image, file: Path) -> None:
    """Write an image, compressed."""
    sitk.WriteImage(image, str(file), useCompression=True)


def check_sizes(image: sitk.Image, other: sitk.Image, name: str = "its label") -> None:
    """Raise BadImageError if an image and its label, or what the name says, differ in size."""
    if image.GetSize() != other.GetSize():
        raise BadImageError(
            f"the image has {by_axis(image.GetSize())} voxels, {name} {by_axis(other.GetSize())}; they do not belong "
            "together, or one is damaged"
        )


def check_spacings(image: sitk.Image, other: sitk.Image, name: str = "its label") -> None:
    """Raise BadImageError if the spacings differ by more than rounding."""
    if not np.allclose(image.GetSpacing(), other.GetSpacing(), rtol=0.01):
        raise BadImageError(
            f"the image's spacing is {by_axis(image.GetSpacing())} mm, {name}'s {by_axis(other.GetSpacing())} mm"
        )


def check_values(label: sitk.Image, file: Path, expected: Collection[int]) -> None:
    """Raise BadImageError if a label read from a file has other values."""
    unknown = set(np.unique(sitk.GetArrayViewFromImage(label)).tolist()) - set(expected)
    if unknown:
        raise BadImageError(
            f"{file.name} has the value {min(unknown):g}; expected {', '.join(map(str, sorted(expected)))}"
        )


def binary_mask(label: np.ndarray) -> np.ndarray:
    """A mask of 0 and 1 from one of 0 and 1 or 0 and 255.

    Raises:
        BadImageError: it holds other values, or no foreground.
    """
    values = [float(value) for value in np.unique(label)]
    if values in ([0.0], []):
        raise BadImageError("the label is empty")
    if not (set(values) <= {0.0, 1.0} or set(values) <= {0.0, 255.0}):
        shown = some_of((f"{value:g}" for value in values), 5)
        raise BadImageError(f"the label has the values {shown}; expected 0 and 255")
    return (label > 0).astype(np.uint8)


def image_from_array(array: np.ndarray, like: sitk.Image) -> sitk.Image:
    """An image of an array (Z, Y, X) on the grid of another image."""
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(like)
    return image


def in_test_folder(file: Path, source: Path) -> bool:
    """Whether one of the folders between the download's and the file is called test or testing something.

    The download's own folder and what links lead to may have any name. There, only an official one counts, and only
    where no folder between says that it is for training.
    """
    below = file.relative_to(source).parts[:-1]
    if any(part.lower().startswith("test") for part in below):
        return True
    folders = list(file.parents)[: len(below) + 1]
    return any(_TEST_FOLDER.fullmatch(folder.resolve().name) for folder in folders) and not any(
        part.lower().startswith("train") for part in below
    )
