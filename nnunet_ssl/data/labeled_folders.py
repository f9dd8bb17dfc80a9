"""Preprocessed folders of a dataset: the plans and configuration of each, one more labeled case, unlabeled copies."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.nnunet_files import read_any_json, read_plans
from nnunet_ssl.data.raw_cases import RawCase
from nnunet_ssl.data.records import CASE_FILES, folder_name, records_folder, unlabeled_folder
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import list_names
from nnunet_ssl.text import dataset_number, one_line, planning_command

_NOT_PLANS = ("dataset.json", "dataset_fingerprint.json", "splits_final.json")


@dataclass(frozen=True)
class LabeledFolder:
    """A folder of preprocessed labeled cases.

    Attributes:
        identifier: its name.
        plans: that name it.
        configuration: the first one of the plans that does; others differ in what leaves the voxels alone.
    """

    identifier: str
    plans: dict[str, Any]
    configuration: str


def labeled_folders(preprocessed: Path) -> list[LabeledFolder]:
    """Those that hold cases, of all plans in the dataset's folder.

    Raises:
        UserError: there are none, or plans are broken, or cases are stored as old versions of nnU-Net stored them.
    """
    found = []
    for one in _named_folders(preprocessed):
        names = list_names(preprocessed / one.identifier)
        if any(name.endswith(".npz") for name in names):
            raise UserError(
                f"{preprocessed / one.identifier} was written by an older nnU-Net (.npz). Preprocess again: "
                f"nnUNetv2_preprocess -d {dataset_number(preprocessed.name)}."
            )
        if any(name.endswith(".b2nd") for name in names):
            found.append(one)
    if not found:
        raise UserError(
            f"{preprocessed} contains no preprocessed labeled case. Run {planning_command(preprocessed.name)} first."
        )
    return found


@dataclass(frozen=True)
class LabeledJob:
    """A labeled case to preprocess; it travels to worker processes, so it is plain data."""

    case: RawCase
    labels: Path
    folder: LabeledFolder
    dataset_json: dict[str, Any]
    target: Path


def preprocess_labeled(job: LabeledJob) -> str | None:
    """Preprocess a case as nnU-Net preprocesses labeled ones; returns why it failed, if it did."""
    manager = PlansManager(job.folder.plans)
    configuration = manager.get_configuration(job.folder.configuration)
    images = [str(file) for file in job.case.images]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            configuration.preprocessor_class(verbose=False).run_case_save(
                str(job.target), images, str(job.labels), manager, configuration, job.dataset_json
            )
    except MemoryError:
        return "memory ran out; use fewer processes (-np)"
    except OSError as error:
        return f"{error.filename or job.target} cannot be read or written: {error.strerror or error}"
    except Exception as error:
        return f"nnU-Net's preprocessing for {job.folder.configuration} failed: {one_line(error)}"
    return None


def unlabeled_copies(preprocessed: Path, cases: Sequence[str]) -> dict[str, list[str]]:
    """Preprocessed files and records of unlabeled cases, by the folders that hold any.

    Raises:
        UserError: a folder is a link, or plans are broken.
    """
    found = {}
    for one in _named_folders(preprocessed):
        endings = {
            unlabeled_folder(preprocessed, one.identifier): CASE_FILES,
            records_folder(preprocessed, one.identifier): (".json",),
        }
        for folder, of_case in endings.items():
            names = {f"{case}{ending}" for case in cases for ending in of_case} & list_names(folder)
            if names and folder.is_symlink():
                raise UserError(f"{folder} is a link, and files would be removed from its target. Remove the link.")
            if names:
                found[folder.name] = sorted(names)
    return found


def _named_folders(preprocessed: Path) -> Iterator[LabeledFolder]:
    """One for each folder that plans name, whether it is there or not; nnU-Net's own plans first."""
    known = set()
    files = sorted(preprocessed.glob("*.json"), key=lambda file: (file.name != "nnUNetPlans.json", file.name))
    again = f"Make them again with {planning_command(preprocessed.name)}, or move the file away."
    for file in files:
        if file.name in _NOT_PLANS or not _looks_like_plans(read_any_json(file, otherwise=again)):
            continue
        plans = read_plans(file, otherwise=again)
        manager = PlansManager(plans)
        for name in manager.available_configurations:
            try:
                identifier = manager.get_configuration(name).data_identifier
            except (KeyError, RecursionError) as error:
                raise UserError(f"Configuration {name!r} in {file} is incomplete ({error}). {again}") from None
            if folder_name(identifier, "data_identifier") not in known:
                known.add(identifier)
                yield LabeledFolder(identifier, plans, name)


def _looks_like_plans(content: Any) -> bool:
    return isinstance(content, dict) and "configurations" in content
