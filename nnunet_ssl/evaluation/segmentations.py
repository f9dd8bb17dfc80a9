"""How a dataset stores its segmentations: which structures, which files, and where their voxels lie."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from numpy.typing import NDArray

from nnunet_ssl.data.geometry import Geometry
from nnunet_ssl.data.image_checks import BadImageError, check_nifti
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.metrics import Labels
from nnunet_ssl.text import one_line


@dataclass(frozen=True)
class Segmentations:
    """How the segmentations of a dataset are stored, and what they hold.

    Attributes:
        labels: label values by structure, background left out.
        file_ending: such as ``.nii.gz``.
        ignore_label: voxels with this value in the reference count for neither side.
        reader: name of the nnU-Net reader that dataset.json asks for, if it does.
        complete: whether there are no other labels, so that one would be a mistake.
    """

    labels: Labels
    file_ending: str
    ignore_label: int | None = None
    reader: str | None = None
    complete: bool = False

    @property
    def values(self) -> set[int]:
        """All label values that are named, and background."""
        named = {value for values in self.labels.values() for value in np.atleast_1d(values).tolist()}
        return named | {0} | ({self.ignore_label} if self.ignore_label is not None else set())

    @classmethod
    def from_dataset_json(cls, file: Path) -> Segmentations:
        """What a dataset.json says; a prediction's folder has one too.

        Raises:
            UserError: the file is missing, no JSON, or lacks labels or file ending.
        """
        try:
            content = json.loads(file.read_bytes())
            labels = dict(content["labels"])
            if not all(_is_label(value) for value in labels.values()):
                raise TypeError(
                    "labels should give each name its number, or its list of numbers (the first nnU-Net had it the "
                    "other way round: nnUNetv2_convert_old_nnUNet_dataset)"
                )
            if not _is_ending(content["file_ending"]):
                raise TypeError('file_ending should be such as ".nii.gz"')
            ignore_label = labels.pop("ignore", None)
            # A region may be called background as well; it is recognized by its value, as nnU-Net does.
            structures = {name: value for name, value in labels.items() if value not in (0, [0])}
            return cls(
                structures, content["file_ending"], ignore_label, content.get("overwrite_image_reader_writer"), True
            )
        except FileNotFoundError:
            raise UserError(f"There is no {file}, which gives the labels and the file ending.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a dataset.json of nnU-Net: {one_line(error)}") from None

    @classmethod
    def from_options(cls, labels: Sequence[str], file_ending: str, ignore_label: int | None) -> Segmentations:
        """From a command line.

        Args:
            labels: such as ``2``, ``tumor=2`` or, for a region, ``whole=1,2,3``.
            file_ending: such as ``.nii.gz``.
            ignore_label: see the class.

        Raises:
            UserError: a label cannot be read or is given twice.
        """
        structures: dict[str, int | list[int]] = {}
        for text in labels:
            name, _, values = text.rpartition("=")
            try:
                numbers = [int(value) for value in values.split(",")]
            except ValueError:
                raise UserError(
                    f"--labels {text}: give numbers, such as 2, tumor=2 or, for a region, whole=1,2,3."
                ) from None
            name = name or values
            if min(numbers) < 1:
                raise UserError(f"--labels {text}: labels are 1 or more; 0 is the background.")
            if name in structures:
                raise UserError(f"--labels names {name} twice.")
            structures[name] = numbers[0] if len(numbers) == 1 else numbers
        if not _is_ending(file_ending):
            raise UserError(f"--file-ending {file_ending}: give it with its dot, such as .nii.gz or .png.")
        return cls(structures, file_ending, ignore_label)

    def cases(self, folder: Path) -> list[str]:
        """The cases in a folder, sorted.

        Raises:
            UserError: the folder cannot be listed.
        """
        ending = self.file_ending
        try:
            files = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
        except OSError as error:
            raise UserError(f"{folder} cannot be listed: {error.strerror}. Check its permissions.") from None
        return sorted(name[: -len(ending)] for name in files if name.endswith(ending) and not name.startswith("."))

    def read_image(self, file: Path) -> NDArray[np.floating]:
        """One image as (Z, Y, X), its channels averaged if it has several, as a color picture has.

        Raises:
            BadImageError: the file is missing or cannot be read.
        """
        return self._read(file, lambda reader: reader.read_images([str(file)]))[0].mean(axis=0)

    def read(self, file: Path) -> tuple[NDArray[np.integer], Geometry]:
        """Read one segmentation with nnU-Net's reader.

        Returns:
            the label map (Z, Y, X), with an axis of one voxel for a two-dimensional image; its geometry.

        Raises:
            BadImageError: the file is missing, damaged, or holds no label map.
        """
        array, properties = self._read(file, lambda reader: reader.read_seg(str(file)))
        if len(array) != 1:
            raise BadImageError(f"{file} has {len(array)} channels: it is an image, not a label map")
        labels = array[0].astype(np.int64)
        if not np.array_equal(labels, array[0]):
            raise BadImageError(f"{file} has values that are not whole numbers: it is not a label map")
        return labels, Geometry.of(labels, properties)

    def _read(self, file: Path, read: Callable[[Any], tuple[NDArray[Any], dict[str, Any]]]) -> Any:
        if not file.is_file():
            raise BadImageError(f"{file} does not exist")
        if file.name.endswith((".nii", ".nii.gz")):
            try:
                check_nifti(file)
            except BadImageError as error:
                # Prediction and reference have one name.
                raise BadImageError(f"in {file.parent}, {error}") from error
        asked = {"file_ending": self.file_ending, "overwrite_image_reader_writer": self.reader or "None"}
        try:
            # nnU-Net's readers print what troubles them; what matters comes with the error.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                reader = determine_reader_writer_from_dataset_json(asked, str(file), verbose=False)
                return read(reader())
        except Exception as error:
            raise BadImageError(f"{file} cannot be read: {one_line(error)}") from error


def _is_label(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return bool(numbers) and all(type(number) is int for number in numbers)


def _is_ending(value: object) -> bool:
    return isinstance(value, str) and value.startswith(".") and len(value) > 1
