"""Segmentations of unlabeled cases that a person has corrected, as ITK-SNAP, 3D Slicer and MITK write them.

They come from elsewhere. Their names are compared with a listing of imagesUn and lead nowhere, and what nnU-Net gets is
a new label map, in the geometry of the image.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from numpy.typing import NDArray

from nnunet_ssl.data.geometry import Geometry
from nnunet_ssl.data.image_checks import BadImageError, check_file, read_image
from nnunet_ssl.data.raw_cases import CaseProblem, RawCase
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import one_line, some_of

# What ITK reads in one file. A header in a file of its own (.mhd, .nhdr) would name another file.
_OF_ITK = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".gipl")
# nnU-Net puts these next to the segmentations that it predicts.
_NOT_SEGMENTATIONS = (".json", ".npz", ".pkl")
_ELSEWHERE = re.compile(rb"^\s*(data ?file\s*:|ElementDataFile\s*=(?!\s*LOCAL\s*$))", re.IGNORECASE | re.MULTILINE)
_HEADER_BYTES = 2**20
_GRID = (
    "Save the segmentation on the grid of the image, neither cropped nor resampled (3D Slicer: export to a label map "
    "with the image as reference volume)"
)


@dataclass(frozen=True)
class Correction:
    """A case of imagesUn and the file with its segmentation."""

    case: RawCase
    file: Path


@dataclass(frozen=True)
class LabelValues:
    """What a segmentation of the dataset may hold.

    Attributes:
        names: label values by structure, as dataset.json has them; a region has several.
        allowed: all values, background and ignore label too.
        ignore: the ignore label, if there is one.
    """

    names: Mapping[str, Any]
    allowed: Collection[int]
    ignore: int | None


def find_corrections(
    folder: Path, cases: Sequence[RawCase], asked: Sequence[str], reader: Any, file_ending: str
) -> tuple[list[Correction], list[CaseProblem]]:
    """The segmentations in a folder.

    Args:
        folder: that the user names.
        cases: of imagesUn.
        asked: cases to take; by default all that the folder has.
        reader: one of nnU-Net's readers.
        file_ending: the dataset's.

    Returns:
        those to take, sorted by case, and what is wrong with files and with what was asked for.

    Raises:
        UserError: the folder cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(
            f"--labels is {folder}, which is not a folder. Name the folder with the corrected segmentations."
        )
    try:
        names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}. Check its permissions.") from None
    known = {case.identifier: case for case in cases}
    endings = readable_endings(reader, file_ending)
    files: dict[str, list[str]] = {}
    problems = []
    for name in names:
        ending = next((one for one in endings if name.lower().endswith(one) and len(name) > len(one)), None)
        if ending is not None:
            files.setdefault(name[: -len(ending)], []).append(name)
        elif (case := _case_of(name, known)) is not None and (not asked or case in asked):
            problems.append(
                CaseProblem(case, f"{_shown(name)} cannot be read here; save it as {case}{file_ending}"),
            )
    wanted = list(dict.fromkeys(asked)) or sorted(files)
    found = []
    for identifier in wanted:
        of_case = files.get(identifier, [])
        if identifier not in known:
            problems.append(CaseProblem(_shown(identifier), _no_such_case(of_case, file_ending)))
        elif not of_case:
            if not any(problem.identifier == identifier for problem in problems):
                problems.append(CaseProblem(identifier, f"there is no {identifier}{file_ending} in {folder}"))
        elif len(of_case) > 1:
            problems.append(CaseProblem(identifier, f"it has several files: {some_of(map(_shown, of_case))}"))
        else:
            found.append(Correction(known[identifier], folder / of_case[0]))
    return sorted(found, key=lambda one: one.case.identifier), problems


def readable_endings(reader: Any, file_ending: str) -> list[str]:
    """Endings of files that a reader reads, in lower case, the longest first."""
    endings = {file_ending.lower(), *reader.supported_file_endings}
    if isinstance(reader, SimpleITKIO):
        endings |= set(_OF_ITK)
    return sorted(endings, key=lambda ending: (-len(ending), ending))


def _case_of(name: str, known: Mapping[str, RawCase]) -> str | None:
    """The case of imagesUn to which a file that cannot be read seems to belong."""
    if name.endswith(_NOT_SEGMENTATIONS):
        return None
    starts = (name[: match.start()] for match in re.finditer(r"\.", name))
    return next((start for start in starts if start in known), None)


def _no_such_case(files: Sequence[str], file_ending: str) -> str:
    where = f"{_shown(files[0])}: " if files else ""
    return (
        f"{where}imagesUn has no such case; name the segmentation CASE{file_ending}, as the case's images without _0000"
    )


def _shown(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def read_correction(
    reader: Any, correction: Correction, values: LabelValues, *, allow_empty: bool
) -> tuple[NDArray[np.integer], NDArray[np.floating], dict[str, Any]]:
    """Read and check one segmentation.

    Args:
        reader: one of nnU-Net's readers.
        correction: what to read.
        values: that it may hold.
        allow_empty: whether it may hold no structure.

    Returns:
        the label map (Z, Y, X); the image (C, Z, Y, X) and its properties, as the reader returns them.

    Raises:
        BadImageError: image or segmentation cannot be used.
    """
    # nnU-Net's readers print what troubles them; what matters comes with the error.
    with contextlib.redirect_stdout(io.StringIO()):
        image, properties = read_image(reader, correction.case.images)
    name = _shown(correction.file.name)
    labels, difference = read_label_map(reader, correction.file, Geometry.of(image[0], properties))
    if difference is not None:
        raise BadImageError(f"{name} is not on the grid of its image: {difference}. {_GRID}")
    _check_values(labels, values, name, allow_empty)
    if correction.file.name.lower().endswith(".nrrd"):
        _check_names(correction.file, values, name)
    return labels, image, properties


def read_label_map(reader: Any, file: Path, image: Geometry) -> tuple[NDArray[np.int64], str | None]:
    """Read a segmentation of any origin.

    Args:
        reader: one of nnU-Net's readers.
        file: to read.
        image: where the voxels of its image lie.

    Returns:
        the label map (Z, Y, X), and in what its voxels do not lie on those of the image, if they do not.

    Raises:
        BadImageError: the file cannot be read, or holds no label map.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        array, properties = _read_segmentation(reader, file)
    name = _shown(file.name)
    if len(array) != 1:
        raise BadImageError(f"{name} has {len(array)} values for each voxel; save one 3D label map")
    with np.errstate(invalid="ignore"):
        labels = array[0].astype(np.int64)
    if not np.array_equal(labels, array[0]):
        raise BadImageError(f"{name} has values that are not whole numbers, so it is not a label map")
    return labels, _difference(Geometry.of(labels, properties), image)


def _read_segmentation(reader: Any, file: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    try:
        if not file.is_file():
            raise BadImageError(f"{_shown(file.name)} is not a regular file")
        if file.name.lower().endswith((".nrrd", ".mha")) and _ELSEWHERE.search(_header(file)):
            raise BadImageError(f"{_shown(file.name)} says that its voxels are in another file; save it as one file")
        check_file(reader, file)
        return reader.read_seg(str(file))
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        raise BadImageError(f"{_shown(file.name)} cannot be read: {one_line(error)}") from error


def _header(file: Path) -> bytes:
    """Of a NRRD file, the lines before the first empty one; of a MetaImage, those up to where its voxels begin."""
    with file.open("rb") as opened:
        start = opened.read(_HEADER_BYTES)
    return re.split(rb"\r?\n\r?\n|(?<=LOCAL)\r?\n", start, maxsplit=1, flags=re.IGNORECASE)[0]


def _difference(own: Geometry, image: Geometry) -> str | None:
    if own.size == image.size and len(own.origin) != len(image.origin):
        return f"it has {len(own.origin)} dimensions, the image {len(image.origin)}"
    # Formats without a place tell no spacing either.
    return own.difference(image) if own.origin or own.size != image.size else None


def _check_values(labels: NDArray[np.integer], values: LabelValues, name: str, allow_empty: bool) -> None:
    found = set(np.unique(labels).tolist())
    if unknown := sorted(found - set(values.allowed)):
        names = ", ".join(f"{structure} {value}" for structure, value in values.names.items())
        raise BadImageError(
            f"{name} contains the value(s) {some_of(map(str, unknown))}, which dataset.json does not define ({names})"
        )
    if not found - {0, values.ignore} and not allow_empty:
        raise BadImageError(
            f"{name} contains no structure; if the scan really shows none, accept it with --allow-empty"
        )


def _check_names(file: Path, values: LabelValues, name: str) -> None:
    """3D Slicer numbers segments in their order, and writes their names next to the numbers."""
    header = sitk.ImageFileReader()
    header.SetFileName(str(file))
    header.ReadImageInformation()
    keys = (re.fullmatch(r"(Segment\d+_)Name", key) for key in header.GetMetaDataKeys())
    for start in sorted(match[1] for match in keys if match):
        segment = header.GetMetaData(f"{start}Name")
        number = header.GetMetaData(f"{start}LabelValue") if header.HasMetaDataKey(f"{start}LabelValue") else ""
        value = next((one for known, one in values.names.items() if known.lower() == segment.lower()), None)
        if isinstance(value, int) and number not in ("", str(value)):
            raise BadImageError(
                f"{name} has the value {_shown(number)} for {_shown(segment)}, which is {value} in dataset.json; "
                "export it with the numbers of dataset.json, or as a label map"
            )


def write_labels(reader: Any, labels: NDArray[np.integer], file: Path, properties: Mapping[str, Any]) -> list[Path]:
    """Write a label map as nnU-Net writes what it predicts.

    Returns:
        the files: with TIFF, spacing is in a second one.

    Raises:
        BadImageError: this format cannot hold it.
        OSError: the file cannot be written.
    """
    try:
        reader.write_seg(labels, str(file), dict(properties))
    except OSError:
        raise
    except Exception as error:
        raise BadImageError(f"its labels cannot be stored as {file.name}: {one_line(error)}") from error
    # A full disk is no error to every library.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            # ITK fills a file that was cut off up with background, of which most label maps end.
            check_file(reader, file)
            stored = reader.read_seg(str(file))[0][0]
    except Exception as error:
        raise BadImageError(
            f"its labels cannot be stored as {file.name}: what was written cannot be read again. Is the disk full?"
        ) from error
    if not np.array_equal(stored, labels):
        raise BadImageError(
            f"its labels cannot be stored as {file.name}: what was written reads differently. Is the disk full?"
        )
    spacing = file.with_name(f"{file.name.rpartition('.')[0]}.json")
    return [file, spacing] if spacing.is_file() else [file]
