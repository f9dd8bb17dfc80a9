"""Preprocessed cases of imagesUn on disk, each with a record: what it was made from, and what came of it.

Next to the preprocessed labeled cases lie::

    <data_identifier>_unlabeled/           CASE.b2nd, CASE_seg.b2nd, CASE.pkl, as nnU-Net writes them
    <data_identifier>_unlabeled_records/   CASE.json: what the case was made from, and what came of it
    <data_identifier>_unlabeled_tmp_*/     a case in the making

A case counts only with a record that fits its images and the plans.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.raw_cases import RawCase
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import shorten, some_of

# Raise it when records or preprocessed cases of an older version must not be used any more.
FORMAT_VERSION = 1
# What nnU-Net writes for a preprocessed case.
CASE_FILES = (".b2nd", "_seg.b2nd", ".pkl")

IMAGE_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
)
"""What of a configuration changes the voxels of a preprocessed image."""

# The same for an image with its segmentation. Patch and batch size do not: the patch size sets nothing but the block
# sizes on disk, and configurations of several patch sizes may share one folder.
_CONFIGURATION_KEYS = (
    *IMAGE_KEYS,
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)

# Of these nnU-Net has no default.
_NEEDED = ("spacing", "normalization_schemes", "use_mask_for_norm")

# What nnU-Net's normalizations read of the labeled images' intensities. Others may read all of it.
INTENSITIES_READ: dict[str, tuple[str, ...]] = {
    "ZScoreNormalization": (),
    "NoNormalization": (),
    "RescaleTo01Normalization": (),
    "RGBTo01Normalization": (),
    "CTNormalization": ("mean", "std", "percentile_00_5", "percentile_99_5"),
}


@dataclass(frozen=True)
class PreprocessedFolder:
    """The preprocessed cases of imagesUn for one configuration. It travels to worker processes, so it is plain data.

    Attributes:
        folder: see :func:`unlabeled_folder`.
        records: see :func:`records_folder`.
        fingerprint: see :func:`preprocessing_fingerprint`.
        earlier_fingerprint: that of records until November 2026.
    """

    folder: Path
    records: Path
    fingerprint: str
    earlier_fingerprint: str

    @classmethod
    def of_plans(
        cls, preprocessed_dataset_folder: Path, plans_manager: PlansManager, configuration: str
    ) -> PreprocessedFolder:
        """That of a configuration.

        Raises:
            UserError: see :func:`folder_name`; or the plans lack what preprocessing reads.
        """
        resolved = plans_manager.get_configuration(configuration)
        if missing := [key for key in _NEEDED if key not in resolved.configuration]:
            raise UserError(
                f"Configuration {configuration!r} of the plans {plans_manager.plans_name} has no {some_of(missing)}, "
                "which nnU-Net v2 writes there. Make the plans again with nnUNetv2_plan_experiment."
            )
        identifier = resolved.data_identifier
        return cls(
            unlabeled_folder(preprocessed_dataset_folder, identifier),
            records_folder(preprocessed_dataset_folder, identifier),
            preprocessing_fingerprint(plans_manager, configuration),
            _earlier_fingerprint(plans_manager, configuration),
        )

    @property
    def temporary_prefix(self) -> str:
        """What the names of folders in the making begin with; they lie beside ``folder``."""
        return f"{self.folder.name}_tmp_"

    def record_file(self, identifier: str) -> Path:
        """A case's record, which may not exist."""
        return self.records / f"{identifier}.json"

    def fits_plans(self, record: Mapping[str, Any]) -> bool:
        """Whether a record was made with these plans, and by a version of this package whose cases still count."""
        fingerprints = (self.fingerprint, self.earlier_fingerprint)
        return record.get("format_version") == FORMAT_VERSION and record.get("fingerprint") in fingerprints

    def valid_record(self, case: RawCase) -> dict[str, Any] | None:
        """What an earlier run made of the case; None if it has to be done."""
        record = read_record(self.record_file(case.identifier))
        if record is None or not self.fits_plans(record):
            return None
        try:
            if record.get("sources") != describe_files(source_files(case)):
                return None
        except OSError:
            return None
        files = (self.folder / f"{case.identifier}{ending}" for ending in CASE_FILES)
        return record if record["status"] == "failed" or all(file.is_file() for file in files) else None

    def provenance(self, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a record says of how the case was made; ``sources`` as :func:`describe_files` returns them."""
        return {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, "sources": sources}

    def remove(self, identifier: str) -> None:
        """Remove a case and its record, the record first."""
        self.record_file(identifier).unlink(missing_ok=True)
        for ending in CASE_FILES:
            (self.folder / f"{identifier}{ending}").unlink(missing_ok=True)


def unlabeled_folder(preprocessed_dataset_folder: Path, data_identifier: str) -> Path:
    """Where the preprocessed cases of imagesUn are: nnU-Net's own files and nothing else.

    Raises:
        UserError: see :func:`folder_name`.
    """
    return preprocessed_dataset_folder / f"{folder_name(data_identifier, 'data_identifier')}_unlabeled"


def records_folder(preprocessed_dataset_folder: Path, data_identifier: str) -> Path:
    """Where each of these cases has its record, ``CASE.json``: what it was made from, and what came of it.

    Raises:
        UserError: see :func:`folder_name`.
    """
    return preprocessed_dataset_folder / f"{folder_name(data_identifier, 'data_identifier')}_unlabeled_records"


def folder_name(name: object, entry: str) -> str:
    """A folder's name out of the plans. Plans may come from others, and must not lead out of the dataset's folder.

    Args:
        name: what the plans say.
        entry: under which key, for the message.

    Raises:
        UserError: it is a path, or no name at all.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise UserError(
            f"The plans' {entry} is {shorten(name)}, which is not a folder name. nnU-Net makes no such plans: make "
            "them again with nnUNetv2_plan_and_preprocess, and see SECURITY.md."
        )
    return name


def read_record(file: Path) -> dict[str, Any] | None:
    """One case's record; None if it does not exist or is no record."""
    try:
        record = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def has_files(identifier: str, names: set[str]) -> bool:
    """Whether all files of a preprocessed case are among the names."""
    return all(identifier + ending in names for ending in CASE_FILES)


def source_files(case: RawCase) -> list[Path]:
    """The images, and the file next to them in which nnU-Net's TIFF reader looks for the spacing."""
    spacing_file = case.images[0].with_name(f"{case.identifier}.json")
    return [*case.images, spacing_file] if spacing_file.is_file() else list(case.images)


def describe_files(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Names, sizes and times of files, by which a change shows."""
    found = [(file.name, file.stat()) for file in files]
    return [{"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in found]


def preprocessing_fingerprint(plans_manager: PlansManager, configuration: str) -> str:
    """A hash of everything in the plans that changes a preprocessed image."""
    return _hash(plans_manager, configuration, _intensities_read(plans_manager, configuration))


def _earlier_fingerprint(plans_manager: PlansManager, configuration: str) -> str:
    """The one of records until November 2026, which had all intensities in it, read or not."""
    return _hash(plans_manager, configuration, plans_manager.foreground_intensity_properties_per_channel)


def _intensities_read(plans_manager: PlansManager, configuration: str) -> dict[str, dict[str, Any]]:
    """What normalization reads of the labeled images' intensities, by channel."""
    resolved = plans_manager.get_configuration(configuration).configuration
    known = INTENSITIES_READ if resolved.get("preprocessor_name") == "DefaultPreprocessor" else {}
    read = {}
    for channel, scheme in enumerate(resolved["normalization_schemes"]):
        found = plans_manager.foreground_intensity_properties_per_channel.get(str(channel), {})
        read[str(channel)] = {name: found.get(name) for name in known.get(scheme, found)}
    return read


def _hash(plans_manager: PlansManager, configuration: str, intensities: Mapping[str, Any]) -> str:
    resolved = plans_manager.get_configuration(configuration).configuration
    relevant = {key: resolved.get(key) for key in _CONFIGURATION_KEYS}
    relevant["transpose_forward"] = plans_manager.transpose_forward
    relevant["image_reader_writer"] = plans_manager.plans["image_reader_writer"]
    relevant["intensities"] = intensities
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
