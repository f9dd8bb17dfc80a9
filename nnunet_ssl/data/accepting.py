"""Corrected segmentations become labels: cases of imagesUn move to the labeled cases, all of them or none.

Everything that takes time or space, and all that may fail, is done aside first; see
:mod:`~nnunet_ssl.data.journal` for the change itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.corrections import Correction, LabelValues, find_corrections, read_correction, write_labels
from nnunet_ssl.data.image_checks import BadImageError, check_image, describe_labeled_images
from nnunet_ssl.data.journal import Journal, new_journal
from nnunet_ssl.data.labeled_folders import (
    LabeledFolder,
    LabeledJob,
    labeled_folders,
    preprocess_labeled,
    unlabeled_copies,
)
from nnunet_ssl.data.leak_guard import check_leaks
from nnunet_ssl.data.nnunet_files import MEND, read_dataset_json, read_descriptions
from nnunet_ssl.data.queue import QUEUE_FILE, case_files
from nnunet_ssl.data.raw_cases import (
    IMAGES_FOLDER,
    LABELED_IMAGES_FOLDER,
    CaseProblem,
    RawCase,
    channel_names,
    files_per_case,
    find_raw_cases,
    labeled_images,
    name_problems,
)
from nnunet_ssl.data.records import source_files
from nnunet_ssl.data.splits import SPLITS_FILE, Fold, add_labeled, current_splits, labeled_cases, read_splits
from nnunet_ssl.data.unlabeled_cases import UnlabeledCase, preprocessed_cases
from nnunet_ssl.data.worker_processes import in_worker_processes
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import AGAIN, list_names
from nnunet_ssl.text import some_of

_LABELS_FOLDER, _REFERENCES = "labelsTr", "gt_segmentations"


@dataclass(frozen=True)
class DatasetFolders:
    """One dataset's folders; ``results`` is None where nnUNet_results is not set."""

    raw: Path
    preprocessed: Path
    results: Path | None

    @property
    def roots(self) -> dict[str, Path]:
        """As the journal wants them."""
        found = {"raw": self.raw, "preprocessed": self.preprocessed, "results": self.results}
        return {name: folder for name, folder in found.items() if folder is not None and folder.is_dir()}


@dataclass(frozen=True)
class Wanted:
    """What to accept.

    Attributes:
        labels: the folder with the corrected segmentations.
        cases: to take; all that the folder has, if empty.
        allow_empty: whether a segmentation may hold no structure.
    """

    labels: Path
    cases: Sequence[str] = ()
    allow_empty: bool = False


@dataclass
class _Acceptance:
    """What is prepared so far."""

    dataset: DatasetFolders
    description: dict[str, Any]
    values: LabelValues
    folders: list[LabeledFolder]
    journal: Journal
    problems: list[CaseProblem] = field(default_factory=list)
    changes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ending(self) -> str:
        return str(self.description["file_ending"])

    @property
    def reader(self) -> Any:
        return PlansManager(self.folders[0].plans).image_reader_writer_class()


def accept(
    dataset: DatasetFolders,
    values: LabelValues,
    wanted: Wanted,
    *,
    num_processes: int = 0,
    log: Callable[[str], None] = print,
) -> tuple[list[str], list[tuple[str, str]]]:
    """Accept corrected segmentations. To be called with the lock of the folds held, after a recovery.

    Args:
        dataset: its folders.
        values: what a segmentation may hold.
        wanted: which segmentations.
        num_processes: worker processes, each of which holds one case in memory; 0 works in this process.
        log: takes lines of progress.

    Returns:
        the cases, and rows of what changed: where, and how.

    Raises:
        UserError: anything is wrong with any of the cases, or something cannot be written; nothing has changed then.
    """
    _, description = read_descriptions(dataset.raw, dataset.preprocessed)
    folders = labeled_folders(dataset.preprocessed)
    for folder in (LABELED_IMAGES_FOLDER, _LABELS_FOLDER):
        if not (dataset.raw / folder).is_dir():
            raise UserError(f"There is no folder {dataset.raw / folder} for the accepted cases.")
    if not (dataset.preprocessed / _REFERENCES).is_dir():
        raise UserError(
            f"There is no folder {dataset.preprocessed / _REFERENCES}. Finish nnUNetv2_plan_and_preprocess first."
        )
    work = _Acceptance(dataset, description, values, folders, new_journal(dataset.roots, ()))
    with _prepared(work.journal):
        corrections = _corrections(work, wanted)
        staged = [found for one in corrections if (found := _stage_labels(work, one, wanted)) is not None]
        _raise_problems(work.problems)
        cases = [case for case, _ in staged]
        work.journal.cases = [case.identifier for case in cases]
        _preprocess(work, staged, num_processes, log)
        _raise_problems(work.problems)
        _refuse_copies(work, log)
        _move_images(work, cases)
        _remove_copies(work)
        _update_lists(work)
        if elsewhere := work.journal.on_other_file_systems():
            raise UserError(
                "These files would have to move to another file system, which cannot be done in one step: "
                f"{some_of(elsewhere, 3)}. Keep the folders of a dataset in nnUNet_raw on one file system, and those "
                "in nnUNet_preprocessed."
            )
    try:
        work.journal.commit()
    except OSError as error:
        raise _not_accepted(error) from error
    return work.journal.cases, work.changes


@contextlib.contextmanager
def _prepared(journal: Journal) -> Iterator[None]:
    """What is prepared aside is removed again if anything goes wrong."""
    try:
        yield
    except OSError as error:
        journal.discard()
        raise _not_accepted(error) from error
    except BaseException:
        journal.discard()
        raise


def _not_accepted(error: OSError) -> UserError:
    return UserError(
        f"Nothing was accepted: {error.filename or 'a file'} cannot be written ({error.strerror or error}). {AGAIN}"
    )


def _raise_problems(problems: Sequence[CaseProblem]) -> None:
    if problems:
        raise UserError(f"Nothing was accepted, because of {name_problems(problems)}")


# The cases, and their labels


def _corrections(work: _Acceptance, wanted: Wanted) -> list[Correction]:
    _refuse_unlooked(wanted)
    images = work.dataset.raw / IMAGES_FOLDER
    cases, unusable = find_raw_cases(images, work.ending, files_per_case(work.dataset.raw, work.description))
    found, problems = find_corrections(wanted.labels, cases, wanted.cases, work.reader, work.ending)
    labeled = find_raw_cases(work.dataset.raw / LABELED_IMAGES_FOLDER, work.ending, 1)
    there = f"it is in {LABELED_IMAGES_FOLDER} already; move its file elsewhere, or name the cases to accept"
    reasons = {one.identifier: there for found in labeled for one in found}
    reasons |= {problem.identifier: problem.reason for problem in unusable}
    work.problems += [CaseProblem(one.identifier, reasons.get(one.identifier, one.reason)) for one in problems]
    if not found and not work.problems:
        raise UserError(f"{wanted.labels} contains no segmentation: no file ends in {work.ending}.")
    return found


def _refuse_unlooked(wanted: Wanted) -> None:
    """Of a queue, take only what a person says to have corrected: the rest of it are pseudo-labels, or no labels.

    Raises:
        UserError: the folder is one of a queue, and no case is named or the folder is not that of the consensus.
    """
    folder = Path(os.path.realpath(wanted.labels))
    if not (folder.parent / QUEUE_FILE).is_file():
        return
    consensus = case_files(folder.parent, "case", "").consensus.parent
    if folder != consensus:
        raise UserError(f"{folder} was made by nnunet-ssl rank and holds no segmentations. They are in {consensus}.")
    if not wanted.cases:
        raise UserError(
            f"{folder} also holds what nobody has corrected. Name the cases that you have corrected: --labels "
            f"{wanted.labels} CASE ..."
        )


def _stage_labels(work: _Acceptance, correction: Correction, wanted: Wanted) -> tuple[RawCase, Path] | None:
    """Read, check and write a case's labels aside; what is wrong goes to the problems."""
    case = correction.case
    problems = [CaseProblem(case.identifier, reason) for reason in _obstacles(work, case)]
    files: list[Path] = []
    try:
        labels, image, properties = read_correction(
            work.reader, correction, work.values, allow_empty=wanted.allow_empty
        )
        manager = PlansManager(work.folders[0].plans)
        count = len(channel_names(work.description))
        like = describe_labeled_images(work.dataset.preprocessed, manager, count)
        check_image(image, [float(size) for size in properties["spacing"]], labeled=like)
        place = f"{_LABELS_FOLDER}/{case.identifier}{work.ending}"
        files = write_labels(work.reader, labels, work.journal.aside("raw", place), properties)
    except BadImageError as problem:
        problems.append(CaseProblem(case.identifier, str(problem)))
    work.problems += problems
    if problems:
        return None
    for file in files:
        work.journal.put("raw", f"{_LABELS_FOLDER}/{file.name}")
    reference = f"{_REFERENCES}/{files[0].name}"
    shutil.copy2(files[0], work.journal.aside("preprocessed", reference))
    work.journal.put("preprocessed", reference)
    return case, files[0]


def _obstacles(work: _Acceptance, case: RawCase) -> Iterator[str]:
    """Why a case's files could not move: something is in their place, or a link would lead elsewhere."""
    raw, preprocessed = work.dataset.raw, work.dataset.preprocessed
    name = case.identifier
    places = [raw / LABELED_IMAGES_FOLDER / file.name for file in source_files(case)]
    places += [raw / _LABELS_FOLDER / f"{name}{work.ending}", preprocessed / _REFERENCES / f"{name}{work.ending}"]
    places += [preprocessed / one.identifier / f"{name}{end}" for one in work.folders for end in (".b2nd", ".pkl")]
    for place in places:
        if os.path.lexists(place):
            yield f"{place} exists already; remove it, or rename the case"
    folder = os.path.realpath(raw / LABELED_IMAGES_FOLDER)
    for file in case.images:
        if file.is_symlink() and os.path.realpath(Path(folder, file.readlink())) != os.path.realpath(file):
            yield (
                f"{file.name} is a link that would lead to another place from {LABELED_IMAGES_FOLDER}; make it absolute"
            )


# Preprocessing


def _preprocess(
    work: _Acceptance, staged: Sequence[tuple[RawCase, Path]], num_processes: int, log: Callable[[str], None]
) -> None:
    jobs = []
    for folder in work.folders:
        for case, labels in staged:
            target = work.journal.aside("preprocessed", f"{folder.identifier}/{case.identifier}")
            jobs.append(LabeledJob(case, labels, folder, work.description, target))
    log(f"Preprocessing {len(staged)} case(s) for {some_of(one.configuration for one in work.folders)}")
    for job, reason in in_worker_processes(preprocess_labeled, jobs, min(num_processes, len(jobs))):
        if reason is not None:
            work.problems.append(CaseProblem(job.case.identifier, reason))
        elif not job.target.with_name(f"{job.target.name}.pkl").is_file():
            died = "the process that worked on it was killed, most likely because memory ran out; use fewer (-np)"
            work.problems.append(CaseProblem(job.case.identifier, died))
    for folder in work.folders:
        for name in sorted(list_names(work.journal.aside("preprocessed", folder.identifier))):
            work.journal.put("preprocessed", f"{folder.identifier}/{name}")
        work.changes.append((folder.identifier, f"{len(staged)} case(s) preprocessed"))


def _refuse_copies(work: _Acceptance, log: Callable[[str], None]) -> None:
    """Refuse cases that are validation cases under another name: the leak guard looks at unlabeled cases only.

    Raises:
        UserError: there are some.
    """
    folder = work.folders[0]
    labeled = work.dataset.preprocessed / folder.identifier
    held_back = {case for fold in _folds(work)[0] for case in fold["val"]}
    check_leaks(
        unlabeled=[
            UnlabeledCase(case, work.journal.aside("preprocessed", folder.identifier), IMAGES_FOLDER)
            for case in work.journal.cases
        ],
        labeled_folder=labeled,
        train=[],
        val=sorted(held_back & preprocessed_cases(labeled)),
        allow_transductive=False,
        log=log,
    )


# Moves, removals and lists


def _move_images(work: _Acceptance, cases: Sequence[RawCase]) -> None:
    names = [file.name for case in cases for file in source_files(case)]
    for name in names:
        work.journal.move("raw", f"{IMAGES_FOLDER}/{name}", f"{LABELED_IMAGES_FOLDER}/{name}")
    work.changes.insert(0, (f"{IMAGES_FOLDER} -> {LABELED_IMAGES_FOLDER}", f"{len(names)} file(s) moved"))
    work.changes.insert(1, (f"{_LABELS_FOLDER}, {_REFERENCES}", f"labels of {len(cases)} case(s) written"))


def _remove_copies(work: _Acceptance) -> None:
    """Those of the unlabeled cases; of the previous stage's segmentations of a case, one becomes that of its labels.

    They come from networks that have not seen its labels, as nnU-Net's own do, which it writes for validation cases.
    """
    cases = work.journal.cases
    for folder, names in unlabeled_copies(work.dataset.preprocessed, cases).items():
        for name in names:
            work.journal.take_away("preprocessed", f"{folder}/{name}")
        work.changes.append((folder, f"{len(names)} file(s) removed"))
    results = work.dataset.results
    if results is None:
        return
    given: set[str] = set()
    for stage in sorted(results.glob("*/predicted_next_stage/*_unlabeled/fold_*/imagesUn")):
        labeled = stage.parents[1].with_name(stage.parents[1].name.removesuffix("_unlabeled"))
        for name in sorted({f"{case}.b2nd" for case in cases} & list_names(stage)):
            source, target = (path.relative_to(results).as_posix() for path in (stage / name, labeled / name))
            if target in given or not labeled.is_dir() or os.path.lexists(labeled / name):
                work.journal.take_away("results", source)
            else:
                work.journal.move("results", source, target)
                given.add(target)
        work.changes.append((stage.relative_to(results).as_posix(), "segmentations of the previous stage removed"))


def _update_lists(work: _Acceptance) -> None:
    """Bring dataset.json and splits_final.json up to date, in nnUNet_raw and in nnUNet_preprocessed."""
    raw, preprocessed = work.dataset.raw, work.dataset.preprocessed
    cases = work.journal.cases
    number = len(labeled_images(raw, work.description))
    for root, folder in (("raw", raw), ("preprocessed", preprocessed)):
        description = read_dataset_json(folder / "dataset.json", otherwise=MEND)
        _put_json(work, root, "dataset.json", {**description, "numTraining": number + len(cases)})
    work.changes.append(("numTraining in dataset.json", f"{number} -> {number + len(cases)}"))
    folds, source = _folds(work)
    after = [add_labeled(fold, cases) for fold in folds]
    _put_json(work, "preprocessed", SPLITS_FILE, after)
    if (raw / SPLITS_FILE).is_file():
        # nnU-Net's planner wants the two files alike.
        _put_json(work, "raw", SPLITS_FILE, [add_labeled(fold, cases) for fold in read_splits(raw / SPLITS_FILE)])
    if source != preprocessed / SPLITS_FILE:
        work.changes.append((SPLITS_FILE, f"made, {source or 'with the folds that nnU-Net would make'}"))
    for index, (before, now) in enumerate(zip(folds, after, strict=True)):
        counts = [
            f"{name} {len(before.get(name, ()))} -> {len(now[name])}"
            for name in ("train", "unlabeled")
            if len(before.get(name, ())) != len(now.get(name, ()))
        ]
        kept = sorted(set(cases) & set(before["val"]))
        counts += [f"{some_of(kept)} stays a validation case"] if kept else []
        work.changes.append((f"fold {index} of {SPLITS_FILE}", ", ".join(counts) or "as it was"))


def _folds(work: _Acceptance) -> tuple[list[Fold], Path | None]:
    """As they are, or as nnU-Net would make them."""
    raw, preprocessed = work.dataset.raw, work.dataset.preprocessed
    return current_splits(preprocessed, raw, labeled_cases(preprocessed, raw))


def _put_json(work: _Acceptance, root: str, name: str, content: Any) -> None:
    work.journal.aside(root, name).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    work.journal.put(root, name)
