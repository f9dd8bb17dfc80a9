"""A new dataset in which the cases that models agree on carry the models' consensus as labels.

Voxels on which the models disagree carry nnU-Net's ignore label, for which nnU-Net's losses do not count. Labeled cases
stay as they are; plans are those of the source, with another name of the dataset in them.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl import __version__
from nnunet_ssl.data.accepting import DatasetFolders
from nnunet_ssl.data.corrections import LabelValues, read_label_map, write_labels
from nnunet_ssl.data.geometry import Geometry
from nnunet_ssl.data.image_checks import BadImageError, read_image
from nnunet_ssl.data.journal import refuse_unfinished
from nnunet_ssl.data.leak_guard import copies_of, image_signature
from nnunet_ssl.data.new_dataset import NewDataset, new_dataset
from nnunet_ssl.data.nnunet_files import read_descriptions, read_fingerprint, read_plans
from nnunet_ssl.data.queue import RELIABLE, Queue, case_files, read_queue
from nnunet_ssl.data.raw_cases import (
    IMAGES_FOLDER,
    LABELED_IMAGES_FOLDER,
    CaseProblem,
    RawCase,
    name_problems,
)
from nnunet_ssl.data.records import source_files
from nnunet_ssl.data.seen_labels import FORMAT_VERSION, RECORD, check_model, labels_seen, read_record
from nnunet_ssl.data.self_training_cases import Cases, choose_cases, sort_cases
from nnunet_ssl.data.splits import SPLITS_FILE, write_splits
from nnunet_ssl.data.worker_processes import in_worker_processes
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import dataset_number, planning_command, some_of

_LABELS_FOLDER = "labelsTr"
_FINGERPRINT = "dataset_fingerprint.json"
_RANK_AGAIN = "Rank the cases again (nnunet-ssl rank)"


@dataclass(frozen=True)
class Wanted:
    """What to make.

    Attributes:
        name: of the new dataset, ``DatasetXXX_Name``.
        queue: the folder that nnunet-ssl rank has written.
        verdicts: cases of the queue with one of them get pseudo-labels.
        cases: these get them instead, whatever their verdict.
        best: as many get them instead, those on which the models agree most: a number, or a share such as "50%".
        copy: whether images are copied; links lead to them otherwise.
    """

    name: str
    queue: Path
    verdicts: Sequence[str] = (RELIABLE,)
    cases: Sequence[str] = ()
    best: str | None = None
    copy: bool = False


@dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        cases: by what they have, and folds.
        ignored: share of voxels with the ignore label, by pseudo-labeled case.
        plans: name of the plans that were taken over.
        configuration: with which the cases were ranked.
    """

    cases: Cases
    ignored: dict[str, float]
    plans: str
    configuration: str


def self_train(
    source: DatasetFolders,
    values: LabelValues,
    wanted: Wanted,
    *,
    num_processes: int = 0,
    log: Callable[[str], None] = print,
) -> Made:
    """Make the dataset. To be called with the lock of the source's folds held.

    Args:
        source: the ranked dataset's folders.
        values: what a segmentation of the source may hold.
        wanted: what to make.
        num_processes: worker processes, each of which holds one case in memory; 0 works in this process.
        log: takes lines of progress.

    Raises:
        UserError: anything is wrong, or something cannot be written; nothing was made then.
    """
    roots = source.raw.parent, source.preprocessed.parent
    results = None if source.results is None else source.results.parent
    with new_dataset(*roots, results, wanted.name, record=RECORD) as made:
        refuse_unfinished(source.preprocessed)
        _refuse_second_hand(source.raw.name, *roots)
        description, _ = read_descriptions(source.raw, source.preprocessed)
        queue = read_queue(wanted.queue)
        _check_queue(queue, wanted.queue, source.raw.name, description)
        plans = _read_plans(source, queue)
        seen = _labels_seen(source, queue)
        chosen = choose_cases(queue, wanted.queue, wanted.verdicts, wanted.cases, wanted.best)
        cases = sort_cases(source.raw, source.preprocessed, description, chosen, seen, strict=bool(wanted.cases))

        ignore = values.ignore if values.ignore is not None else max(values.allowed) + 1
        work = _Work(source, queue, wanted.queue, values, ignore, cases, plans, made)
        ignored = _write_pseudo_labels(work, num_processes, log)
        _place_images(work, wanted.copy)
        labels = {**description["labels"], "ignore": ignore}
        number = len(cases.labeled) + len(cases.pseudo_labeled)
        record = _record(work, ignored, seen)
        for folder in (made.raw, made.preprocessed):
            _write_json(folder / "dataset.json", {**description, "labels": labels, "numTraining": number})
            _write_json(folder / RECORD, record)
        _write_json(made.preprocessed / f"{queue.plans}.json", {**plans, "dataset_name": wanted.name})
        shutil.copyfile(source.preprocessed / _FINGERPRINT, made.preprocessed / _FINGERPRINT)
        write_splits(made.preprocessed / SPLITS_FILE, cases.splits)
    return Made(cases, ignored, queue.plans, queue.configuration)


# What goes in


def _refuse_second_hand(dataset: str, *roots: Path) -> None:
    if (record := read_record(dataset, *roots)) is not None:
        first = record["source"]
        raise UserError(
            f"{dataset} was made by self-training, so pseudo-labels would count as labels. The next round starts from "
            f"{first} too: rank its cases with the models that were trained on {dataset}, then nnunet-ssl self-train "
            f"-d {first}."
        )


def _check_queue(queue: Queue, folder: Path, dataset: str, description: dict[str, Any]) -> None:
    if queue.dataset != dataset:
        raise UserError(f"{folder} has cases of {queue.dataset}, not of {dataset}. Give the queue of {dataset}.")
    order = description.get("regions_class_order")
    for key, ranked, now in (
        ("labels", queue.labels, description["labels"]),
        ("file_ending", queue.file_ending, description["file_ending"]),
        ("regions_class_order", queue.regions_class_order, None if order is None else tuple(order)),
    ):
        if ranked != now:
            raise UserError(f"{key!r} in dataset.json of {dataset} is not what {folder} was made with. {_RANK_AGAIN}.")


def _labels_seen(source: DatasetFolders, queue: Queue) -> dict[str, set[str]]:
    """Cases whose labels the models have seen, by model; seeds of a model count as one."""
    name = source.raw.name
    seen: dict[str, set[str]] = {}
    for model in queue.models:
        if source.results is not None:
            check_model(model, name, source.results.parent)
        labels = labels_seen(model, name, source.raw.parent, source.preprocessed.parent)
        seen.setdefault(str(model), set()).update(labels)
    return seen


def _read_plans(source: DatasetFolders, queue: Queue) -> dict[str, Any]:
    """The plans of the models; training needs the fingerprint beside them."""
    again = f"Make it again with {planning_command(source.raw.name)}."
    plans = read_plans(source.preprocessed / f"{queue.plans}.json", otherwise=again)
    if queue.configuration not in plans["configurations"]:
        raise UserError(
            f"The plans {queue.plans} of {source.raw.name} have no configuration {queue.configuration}, with which the "
            "cases were ranked. Put it back, or rank again."
        )
    if PlansManager(plans).get_configuration(queue.configuration).previous_stage_name is not None:
        raise UserError(
            f"{queue.configuration} is the second stage of a cascade, which needs the first stage's segmentation of "
            "each training case. nnU-Net makes these only of cases that a fold validates, so it could not train with "
            "pseudo-labeled ones. Rank with another configuration, such as 3d_fullres."
        )
    if not read_fingerprint(source.preprocessed):
        raise UserError(
            f"There is no {source.preprocessed / _FINGERPRINT}, which training needs. Make it again: "
            f"nnUNetv2_extract_fingerprint -d {dataset_number(source.raw.name)}."
        )
    return plans


# Pseudo-labels


@dataclass(frozen=True)
class _Work:
    """All that writing needs."""

    source: DatasetFolders
    queue: Queue
    queue_folder: Path
    values: LabelValues
    ignore: int
    cases: Cases
    plans: dict[str, Any]
    made: NewDataset

    @property
    def ending(self) -> str:
        return self.queue.file_ending


@dataclass(frozen=True)
class _Job:
    """A case to read and, with a target, to label; it travels to worker processes, so it is plain data."""

    case: RawCase
    plans: dict[str, Any]
    values: LabelValues
    ignore: int
    consensus: Path | None = None
    disagreement: Path | None = None
    target: Path | None = None


def _write_pseudo_labels(work: _Work, num_processes: int, log: Callable[[str], None]) -> dict[str, float]:
    """Write them all; returns the share of ignored voxels by case."""
    folder = work.made.raw / _LABELS_FOLDER
    folder.mkdir()
    log(f"Labeling {len(work.cases.pseudo_labeled)} case(s) with the consensus of {len(work.queue.models)} model(s)")
    jobs = []
    for name, case in work.cases.pseudo_labeled.items():
        files = case_files(work.queue_folder, name, work.ending)
        target = folder / f"{name}{work.ending}"
        jobs.append(_Job(case, work.plans, work.values, work.ignore, files.consensus, files.disagreement, target))
    held_back = [work.cases.labeled[name] for name in work.cases.validation]
    jobs += [_Job(case, work.plans, work.values, work.ignore) for case in held_back]
    problems, ignored, signatures = [], {}, {}
    for job, result in in_worker_processes(_do, jobs, min(num_processes, len(jobs))):
        if not isinstance(result, tuple):
            died = "the process that worked on it was killed, most likely because memory ran out; use fewer (-np)"
            problems.append(CaseProblem(job.case.identifier, result or died))
            continue
        signatures[job.case] = result[0]
        if job.target is not None:
            ignored[job.case.identifier] = result[1]
    if problems:
        problems.sort(key=lambda problem: problem.identifier)
        raise UserError(
            f"Nothing was made, because of {name_problems(problems)}\n{_RANK_AGAIN}, or leave these cases out."
        )
    _refuse_copies(work, held_back, signatures)
    return dict(sorted(ignored.items()))


def _do(job: _Job) -> tuple[dict[str, Any], float] | str:
    """Read a case's image and write its pseudo-label.

    Returns:
        the image's signature and the share of ignored voxels; or what is wrong.
    """
    reader = PlansManager(job.plans).image_reader_writer_class()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            image, properties = read_image(reader, job.case.images)
        ignored = 0.0
        if job.consensus is not None and job.disagreement is not None and job.target is not None:
            place = Geometry.of(image[0], properties)
            labels = _read(reader, job.consensus, place)
            if unknown := sorted(set(np.unique(labels).tolist()) - set(job.values.allowed)):
                names = ", ".join(f"{structure} {value}" for structure, value in job.values.names.items())
                return (
                    f"its consensus holds the value(s) {some_of(map(str, unknown))}, which dataset.json does not have "
                    f"({names})"
                )
            unsure = _read(reader, job.disagreement, place) != 0
            labels[unsure] = job.ignore
            ignored = float(unsure.mean())
            write_labels(reader, labels, job.target, properties)
        return image_signature(image), ignored
    except BadImageError as problem:
        return str(problem)
    except MemoryError:
        return "memory ran out; use fewer processes (-np)"
    except OSError as error:
        return f"{error.filename or job.target} cannot be read or written: {error.strerror or error}"


def _read(reader: Any, file: Path, place: Geometry) -> Any:
    """A label map of the queue (Z, Y, X), which lies on the image."""
    try:
        labels, difference = read_label_map(reader, file, place)
    except BadImageError as error:
        raise BadImageError(f"in {file.parent}, {error}") from error
    if difference is not None:
        raise BadImageError(f"{file} does not lie on the image: {difference}")
    return labels


def _refuse_copies(work: _Work, held_back: Sequence[RawCase], signatures: dict[RawCase, Any]) -> None:
    """Refuse pseudo-labeled cases that are validation cases under another name."""

    def read(case: RawCase) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return read_image(PlansManager(work.plans).image_reader_writer_class(), case.images)[0]

    copies = copies_of(list(work.cases.pseudo_labeled.values()), held_back, signatures, read)
    if copies:
        names = [f"{case.identifier} = {twin.identifier}" for case, twin in copies]
        raise UserError(
            f"Nothing was made: {len(copies)} case(s) to train on are validation cases under another name "
            f"({some_of(names)}), so that validation would be too good. Remove them from {IMAGES_FOLDER}, or leave "
            "them out."
        )


# Everything else


def _place_images(work: _Work, copy: bool) -> None:
    """Images of all cases, and labels of the labeled ones."""
    folders = {
        LABELED_IMAGES_FOLDER: [*work.cases.labeled.values(), *work.cases.pseudo_labeled.values()],
        IMAGES_FOLDER: work.cases.unlabeled.values(),
    }
    for name, cases in folders.items():
        folder = work.made.raw / name
        folder.mkdir()
        _place((file for case in cases for file in source_files(case)), folder, copy)
    labels = work.source.raw / _LABELS_FOLDER
    files = [labels / f"{case}{work.ending}" for case in work.cases.labeled]
    # With TIFF, spacing is in a second file.
    spacings = [file for case in work.cases.labeled if (file := labels / f"{case}.json").is_file()]
    # Copied even if images are linked: they are small, and may be corrected in the source.
    _place([*files, *spacings], work.made.raw / _LABELS_FOLDER, copy=True)


def _place(files: Iterable[Path], folder: Path, copy: bool) -> None:
    for file in files:
        if copy:
            shutil.copy2(file, folder / file.name)
        else:
            (folder / file.name).symlink_to(file.resolve(strict=True))


def _record(work: _Work, ignored: dict[str, float], seen: dict[str, set[str]]) -> dict[str, Any]:
    """What a later round has to know, and a reader may want to."""
    return {
        "version": FORMAT_VERSION,
        "made_by": f"nnunet-ssl {__version__}",
        "source": work.source.raw.name,
        "folds": [one.number for one in work.cases.carried],
        "ignore_label": work.ignore,
        "pseudo_labeled": {case: {"ignored": round(share, 6)} for case, share in ignored.items()},
        "labels_seen": sorted(set().union(*seen.values())),
        "models": [asdict(model) for model in work.queue.models],
    }


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
