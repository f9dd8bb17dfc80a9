"""Preprocessing of imagesUn: nnU-Net's own preprocessor, incremental, parallel, and safe to interrupt."""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_ssl.data.image_checks import LabeledImages, describe_labeled_images, directions_of, image_warnings
from nnunet_ssl.data.journal import refuse_unfinished
from nnunet_ssl.data.preprocess_case import CaseJob, failed_record, preprocess_case
from nnunet_ssl.data.raw_cases import (
    IMAGES_FOLDER,
    CaseProblem,
    RawCase,
    channel_names,
    files_per_case,
    find_raw_cases,
    labeled_images,
    unread_folders_message,
)
from nnunet_ssl.data.records import PreprocessedFolder
from nnunet_ssl.data.unlabeled_cases import ready_cases
from nnunet_ssl.data.worker_processes import in_worker_processes
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import list_names, remove_abandoned
from nnunet_ssl.text import some_of

_STORED_FILE = re.compile(r"(.+?)(_seg\.b2nd|\.b2nd|\.pkl|\.json)", re.DOTALL)

_DIED = (
    "the process that worked on it was killed, most likely because memory ran out; use fewer processes (-np 1, or "
    "nnUNet_def_n_proc=1 for training)"
)


@dataclass
class PreprocessingReport:
    """What became of the cases of imagesUn; every list is sorted by name.

    Attributes:
        folder: where the preprocessed cases are.
        labeled: what the labeled images are like now.
        done: preprocessed now.
        up_to_date: preprocessed earlier, nothing to do.
        removed: preprocessed earlier, but their images are gone.
        failed: not usable, now or already in an earlier run.
        warnings: usable, but unlike the labeled cases; a case may have several.
    """

    folder: Path
    labeled: LabeledImages
    done: list[str] = field(default_factory=list)
    up_to_date: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: list[CaseProblem] = field(default_factory=list)
    warnings: list[CaseProblem] = field(default_factory=list)

    def add(self, identifier: str, record: dict[str, Any], new: bool) -> None:
        """Enter a case by its record; `new` if that was made now."""
        if record["status"] == "failed":
            self.failed.append(CaseProblem(identifier, record["reason"]))
        else:
            (self.done if new else self.up_to_date).append(identifier)
            # Labeled images and plans may have changed since, where that leaves the case's voxels as they are.
            seen = (record["spacing"], record["intensities"]) if "intensities" in record else None
            unlike = image_warnings(*seen, self.labeled) if seen is not None else []
            self.warnings.extend(CaseProblem(identifier, warning) for warning in [*record["warnings"], *unlike])

    def table(self) -> str:
        """For the terminal: one line of counts, then one line per failure and warning."""
        parts = [
            f"{len(self.done) + len(self.up_to_date)} ready ({len(self.done)} preprocessed now)",
            f"{len(self.removed)} removed",
            f"{len(self.failed)} failed",
            f"{len(self.warnings)} warnings",
        ]
        rows = [("failed", problem) for problem in self.failed] + [("warning", one) for one in self.warnings]
        width = max((len(problem.identifier) for _, problem in rows), default=0)
        lines = [f"{kind:<7}  {problem.identifier:<{width}}  {problem.reason}" for kind, problem in rows]
        return "\n".join([f"{self.folder.name}: {', '.join(parts)}", *lines])

    def sort(self) -> None:
        """Sort every list by name."""
        for names in (self.done, self.up_to_date, self.removed):
            names.sort()
        for found in (self.failed, self.warnings):
            found.sort(key=lambda problem: (problem.identifier, problem.reason))


def preprocess_unlabeled(
    *,
    raw_dataset_folder: Path | None,
    preprocessed_dataset_folder: Path,
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: dict[str, Any],
    num_processes: int,
    num_parts: int = 1,
    part_id: int = 0,
    log: Callable[[str], None] = print,
) -> PreprocessingReport:
    """Bring the preprocessed cases of imagesUn up to date with their images and the plans.

    Several runs at the same time, on one machine or many, do not disturb each other.

    Args:
        raw_dataset_folder: the dataset in nnUNet_raw. If it is None or has no imagesUn, as on a machine that only
            trains, the cases preprocessed elsewhere are left as they are.
        preprocessed_dataset_folder: the dataset in nnUNet_preprocessed.
        plans_manager: nnU-Net's plans.
        configuration: one of their configurations.
        dataset_json: nnU-Net's description of the dataset.
        num_processes: worker processes, each of which holds one case in memory; 0 works in this process.
        num_parts: into how many parts the sorted cases are dealt.
        part_id: the part to do; part 0 also removes what has no images any more.
        log: takes lines of progress.

    Raises:
        UserError: impossible arguments, folders that are links, cases preprocessed with other plans whose images are
            not there, or a change of the dataset that was cut off.
    """
    _check_arguments(num_processes, num_parts, part_id)
    refuse_unfinished(preprocessed_dataset_folder)
    if raw_dataset_folder is not None and (unread := unread_folders_message(raw_dataset_folder)):
        log(f"WARNING: {unread}")
    place = PreprocessedFolder.of_plans(preprocessed_dataset_folder, plans_manager, configuration)
    labeled = describe_labeled_images(preprocessed_dataset_folder, plans_manager, len(channel_names(dataset_json)))
    report = PreprocessingReport(place.folder, labeled)
    images_folder = None if raw_dataset_folder is None else raw_dataset_folder / IMAGES_FOLDER
    if raw_dataset_folder is None or images_folder is None or not images_folder.is_dir():
        identifier = plans_manager.get_configuration(configuration).data_identifier
        _keep(place, report, ready_cases(preprocessed_dataset_folder, identifier), images_folder)
        return report

    _refuse_links(place)
    found = find_raw_cases(images_folder, dataset_json["file_ending"], files_per_case(raw_dataset_folder, dataset_json))
    to_do = []
    for case in _usable_cases(place, report, *found, num_parts=num_parts, part_id=part_id):
        record = place.valid_record(case)
        if record is None:
            to_do.append(case)
        else:
            report.add(case.identifier, record, False)
    if to_do:
        remove_abandoned(place.folder.parent, place.temporary_prefix)
        _make_folders(place)
        reader = plans_manager.image_reader_writer_class()
        labeled = replace(
            labeled, directions=directions_of(reader, sorted(labeled_images(raw_dataset_folder, dataset_json).values()))
        )
        # Folds that are started at the same time share the work: each in its own order, skipping what is done.
        random.SystemRandom().shuffle(to_do)
        job = CaseJob(plans_manager.plans, configuration, dataset_json, labeled, place)
        _run(job, to_do, num_processes, report, log)
    report.sort()
    return report


def _check_arguments(num_processes: int, num_parts: int, part_id: int) -> None:
    if num_processes < 0:
        raise UserError(f"The number of processes must be 0 or more, got {num_processes}.")
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise UserError(f"Part {part_id} of {num_parts} does not exist: parts count from 0 to --num-parts minus 1.")


def _refuse_links(place: PreprocessedFolder) -> None:
    for folder in (place.folder, place.records):
        if folder.is_symlink():
            # What has no image any more is removed from them, whatever they contain.
            raise UserError(
                f"{folder} is a link, and files would be removed from its target. Remove the link; to keep the "
                "preprocessed cases elsewhere, link the dataset's whole folder."
            )


def _usable_cases(
    place: PreprocessedFolder,
    report: PreprocessingReport,
    cases: Sequence[RawCase],
    problems: Sequence[CaseProblem],
    *,
    num_parts: int,
    part_id: int,
) -> list[RawCase]:
    """This part's cases that can be preprocessed; the others are reported, and what earlier runs made of them removed.

    Args:
        place: where the preprocessed cases are.
        report: gets the failed and the removed cases.
        cases: see :func:`~nnunet_ssl.data.raw_cases.find_raw_cases`.
        problems: see there.
        num_parts: into how many parts the sorted cases are dealt.
        part_id: this part; part 0 also removes what has no images any more.
    """
    everyone = {case.identifier for case in cases} | {problem.identifier for problem in problems}
    mine = set(sorted(everyone)[part_id::num_parts])
    clashing = _clashing(place, cases)
    usable = [case for case in cases if case.identifier in mine - {problem.identifier for problem in clashing}]
    report.failed = [problem for problem in problems if problem.identifier in mine]
    for name in {problem.identifier for problem in report.failed} - {case.identifier for case in usable}:
        place.remove(name)
    if part_id == 0:
        report.removed = _remove_gone(place, everyone)
    report.failed += [problem for problem in clashing if problem.identifier in mine]
    return usable


def _make_folders(place: PreprocessedFolder) -> None:
    try:
        for folder in (place.folder, place.records):
            folder.mkdir(exist_ok=True)
            # What is there already may belong to somebody else.
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"Nothing can be written into {place.folder.parent} ({error.strerror}), the folder for preprocessed "
            "images. Check permissions and free space there, or set nnUNet_preprocessed to another folder."
        ) from None


def _run(
    job: CaseJob, cases: Sequence[RawCase], num_processes: int, report: PreprocessingReport, log: Callable[[str], None]
) -> None:
    start = time.monotonic()
    workers = min(num_processes, len(cases))
    log(f"Preprocessing {len(cases)} unlabeled case(s) into {job.place.folder} with {max(1, workers)} process(es)")
    results = in_worker_processes(partial(preprocess_case, job), cases, workers)
    for case, result in tqdm(results, "unlabeled cases", len(cases), unit="case", disable=None, file=sys.stderr):
        report.add(case.identifier, *(result or (failed_record(_DIED), True)))
    log(f"Preprocessed {len(report.done)} unlabeled case(s) in {time.monotonic() - start:.1f} s")


# What is there already


def _keep(
    place: PreprocessedFolder, report: PreprocessingReport, ready: dict[str, dict[str, Any]], images_folder: Path | None
) -> None:
    outdated = [name for name, record in ready.items() if not place.fits_plans(record)]
    if outdated:
        where = f"{images_folder} does not exist" if images_folder else "nnUNet_raw is not set"
        raise UserError(
            f"{len(outdated)} unlabeled case(s) in {report.folder} were preprocessed with other plans "
            f"({some_of(outdated)}), and their images are not available: {where}. Make the images available, or copy "
            f"the folder and {place.records.name} from where they were preprocessed with these plans."
        )
    for name, record in ready.items():
        report.add(name, record, False)


def _remove_gone(place: PreprocessedFolder, in_images_folder: set[str]) -> list[str]:
    stored = (_STORED_FILE.fullmatch(name) for name in list_names(place.folder) | list_names(place.records))
    gone = sorted({match[1] for match in stored if match} - in_images_folder)
    for name in gone:
        place.remove(name)
    return gone


def _clashing(place: PreprocessedFolder, cases: Sequence[RawCase]) -> list[CaseProblem]:
    """Cases whose files would replace those of another, where the file system takes their names for one."""
    first: dict[str, str] = {}
    alike = []
    for case in cases:
        other = first.setdefault(unicodedata.normalize("NFC", case.identifier).casefold(), case.identifier)
        if other != case.identifier:
            alike.append((case.identifier, other))
    return [
        CaseProblem(
            name,
            f"its files would replace those of {other}, because the file system of {place.folder.parent} does not "
            "distinguish the two names; rename its images",
        )
        for name, other in alike
        if _one_file(place, name, other)
    ]


def _one_file(place: PreprocessedFolder, name: str, other: str) -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix=place.temporary_prefix, dir=place.folder.parent) as folder:
            Path(folder, other).touch()
            return Path(folder, name).exists()
    except OSError:
        return False  # that nothing can be written there is told elsewhere
