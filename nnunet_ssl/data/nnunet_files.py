"""nnU-Net's own JSON files, which a user may have edited, cut short or brought from another version."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.text import dataset_number, planning_command, shorten

MEND = "Correct it, or copy it from where the dataset came from."
"""What to do about a broken file of a dataset."""

_PLANS: dict[str, type] = {
    "dataset_name": str,
    "plans_name": str,
    "image_reader_writer": str,
    "transpose_forward": list,
    "transpose_backward": list,
    "foreground_intensity_properties_per_channel": dict,
    "configurations": dict,
}
_KINDS: dict[type, str] = {str: "a text", list: "a list", dict: "a table"}
# UTF-32 first: its mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_any_json(file: Path, *, otherwise: str) -> Any:
    """What a JSON file holds, as long as nnU-Net can read it too: UTF-8 without a byte-order mark.

    Args:
        file: of any origin.
        otherwise: what to do where it is missing or broken.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no {file}. {otherwise}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). {otherwise}") from None
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            raise UserError(
                f"{file} begins with a byte-order mark ({encoding}), with which nnU-Net cannot read it. Save it as "
                "UTF-8 without a byte-order mark."
            )
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}). {otherwise}") from None


def read_json(file: Path, *, otherwise: str, entries: Mapping[str, type] = MappingProxyType({})) -> dict[str, Any]:
    """A file that holds a table.

    Args:
        file: of any origin.
        otherwise: what to do where it is missing or broken.
        entries: that the table has to have, and of which type: str, list or dict.

    Raises:
        UserError: it is missing, cannot be read, or is something else.
    """
    content = read_any_json(file, otherwise=otherwise)
    if not isinstance(content, dict):
        raise UserError(f"{file} contains no table, but {shorten(content)}. {otherwise}")
    for key, kind in entries.items():
        if key not in content:
            raise UserError(f"{file} has no {key!r}, which nnU-Net v2 writes there. {otherwise}")
        if not isinstance(content[key], kind):
            raise UserError(f"{key!r} in {file} must be {_KINDS[kind]}, not {shorten(content[key])}. {otherwise}")
    return content


def read_plans(file: Path, *, otherwise: str) -> dict[str, Any]:
    """nnU-Net's plans; arguments and errors as for :func:`read_json`."""
    plans = read_json(file, otherwise=otherwise, entries=_PLANS)
    for name, configuration in plans["configurations"].items():
        if not isinstance(configuration, dict):
            raise UserError(f"Configuration {name!r} in {file} must be a table. {otherwise}")
    return plans


def read_dataset_json(file: Path, *, otherwise: str) -> dict[str, Any]:
    """nnU-Net's description of a dataset; arguments and errors as for :func:`read_json`."""
    description = read_json(file, otherwise=otherwise, entries={"labels": dict, "file_ending": str})
    # Older datasets call their channels modality.
    if not any(isinstance(description.get(name), dict) for name in ("channel_names", "modality")):
        raise UserError(f"{file} has no table 'channel_names'. {otherwise}")
    return description


def read_descriptions(raw: Path, preprocessed: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dataset's dataset.json in nnUNet_raw and in nnUNet_preprocessed.

    Args:
        raw: ``nnUNet_raw/DatasetXXX_Name``.
        preprocessed: ``nnUNet_preprocessed/DatasetXXX_Name``.

    Raises:
        UserError: one cannot be read, they contradict each other, or cases lie elsewhere than nnU-Net's folders.
    """
    again = f"Plan and preprocess again: {planning_command(raw.name)}."
    planned = read_dataset_json(preprocessed / "dataset.json", otherwise=again)
    description = read_dataset_json(raw / "dataset.json", otherwise=MEND)
    if "dataset" in description:
        raise UserError(
            f"{raw / 'dataset.json'} names its files one by one ('dataset'). Labeled cases must be in imagesTr and "
            "labelsTr for this."
        )
    for key in ("labels", "file_ending", "regions_class_order"):
        if planned.get(key) != description.get(key):
            raise UserError(f"{key!r} in {raw / 'dataset.json'} has changed since planning. {again}")
    return description, planned


def read_fingerprint(preprocessed_dataset: Path) -> dict[str, Any]:
    """What nnU-Net has measured of the labeled images; empty where its file is not there.

    Raises:
        UserError: it cannot be read.
    """
    file = preprocessed_dataset / "dataset_fingerprint.json"
    if not file.is_file():
        return {}
    number = dataset_number(preprocessed_dataset.name)
    again = f"Make it again with nnUNetv2_extract_fingerprint -d {number} --clean."
    return read_json(file, otherwise=again, entries={"shapes_after_crop": list, "spacings": list})
