"""Preprocessing of imagesUn: nnU-Net's own preprocessor, incremental, parallel, and safe to interrupt.

Three folders lie beside the preprocessed labeled cases::

    <data_identifier>_unlabeled/           CASE.b2nd, CASE_seg.b2nd, CASE.pkl, as nnU-Net writes them
    <data_identifier>_unlabeled_records/   CASE.json: what the case was made from, and what came of it
    <data_identifier>_unlabeled_tmp/       cases in the making; not there when nothing runs

A case counts only with a record that fits its images and the plans. The record is removed first and written last, so a
case that was cut off at any moment is simply done again.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_ssl.data.cases import (
    CASE_FILES,
    IMAGES_FOLDER,
    CaseProblem,
    RawCase,
    channel_names,
    files_per_case,
    find_raw_cases,
    has_files,
    list_names,
    read_record,
    ready_cases,
    records_folder,
    some_of,
    unlabeled_folder,
)
from nnunet_ssl.data.leak_guard import image_signature
from nnunet_ssl.errors import UserError

__all__ = ["PreprocessingReport", "preprocess_unlabeled", "ready_cases", "records_folder", "unlabeled_folder"]

# Raise it when records or preprocessed cases of an older version must not be used any more.
FORMAT_VERSION = 1

# What of a configuration changes the voxels. Patch and batch size do not: the patch size sets nothing but the block
# sizes on disk, and configurations of several patch sizes may share one folder.
_CONFIGURATION_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)

_SPACING_FACTOR = 2.0
# A wrong spacing in a header can ask for more memory than any machine has.
_MOST_VOXELS = 2**31
_MOST_GROWTH = 8.0
_NIFTI_HEADER = 348  # bytes
_OLD_TEMPORARY_SECONDS = 24 * 3600.0

_DIED = (
    "the process that worked on it was killed, most likely because memory ran out; use fewer processes (-np 1, or "
    "nnUNet_def_n_proc=1 for training)"
)


@dataclass
class PreprocessingReport:
    """What became of the cases of imagesUn; every list is sorted by name.

    Attributes:
        folder: where the preprocessed cases are.
        done: preprocessed now.
        up_to_date: preprocessed earlier, nothing to do.
        removed: preprocessed earlier, but their images are gone.
        failed: not usable, now or already in an earlier run.
        warnings: usable, but unlike the labeled cases; a case may have several.
    """

    folder: Path
    done: list[str] = field(default_factory=list)
    up_to_date: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: list[CaseProblem] = field(default_factory=list)
    warnings: list[CaseProblem] = field(default_factory=list)

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


@dataclass(frozen=True)
class _Labeled:
    """How the labeled cases look; None where it is not known."""

    dimensions: int | None
    spacing: tuple[tuple[float, float], ...] | None
    intensities: tuple[tuple[float, float] | None, ...]


@dataclass(frozen=True)
class _Job:
    """What all cases have in common. It travels to the worker processes, so it is plain data."""

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    fingerprint: str
    labeled: _Labeled
    folder: Path
    records: Path
    temporary: Path


@dataclass(frozen=True)
class _Outcome:
    identifier: str
    failure: str | None = None
    warnings: tuple[str, ...] = ()
    processed: bool = True


class _BadImageError(Exception):
    """The image itself is at fault: trying again is of no use until it changes."""


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
        UserError: impossible arguments, or cases preprocessed with other plans whose images are not there.
    """
    if num_processes < 0:
        raise UserError(f"The number of processes must be 0 or more, got {num_processes}.")
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise UserError(f"Part {part_id} of {num_parts} does not exist: parts count from 0 to --num-parts minus 1.")
    resolved = plans_manager.get_configuration(configuration)
    identifier = resolved.data_identifier
    folder = unlabeled_folder(preprocessed_dataset_folder, identifier)
    records = records_folder(preprocessed_dataset_folder, identifier)
    fingerprint = preprocessing_fingerprint(plans_manager, configuration)
    report = PreprocessingReport(folder)

    images_folder = None if raw_dataset_folder is None else raw_dataset_folder / IMAGES_FOLDER
    if raw_dataset_folder is None or images_folder is None or not images_folder.is_dir():
        _keep(report, ready_cases(preprocessed_dataset_folder, identifier), fingerprint, images_folder)
        return report

    cases, problems = find_raw_cases(
        images_folder, dataset_json["file_ending"], files_per_case(raw_dataset_folder, dataset_json)
    )
    in_images_folder = {case.identifier for case in cases} | {problem.identifier for problem in problems}
    mine = set(sorted(in_images_folder)[part_id::num_parts])
    present = list_names(folder)
    if part_id == 0:
        report.removed = _remove_gone(folder, records, present, in_images_folder)
    for problem in problems:
        if problem.identifier in mine:
            report.failed.append(problem)
    incomplete = mine.intersection(problem.identifier for problem in problems)
    for name in incomplete.difference(case.identifier for case in cases):
        _remove_case(folder, records, name)

    to_do = []
    for case in cases:
        if case.identifier not in mine:
            continue
        outcome = _outcome_on_record(case, records, fingerprint, present)
        if outcome is None:
            to_do.append(case)
        else:
            _add(report, outcome)

    if to_do:
        with _temporary_folder(preprocessed_dataset_folder / f"{identifier}_unlabeled_tmp") as temporary:
            job = _Job(
                plans_manager.plans,
                configuration,
                dataset_json,
                fingerprint,
                _describe_labeled(preprocessed_dataset_folder, plans_manager, len(channel_names(dataset_json))),
                folder,
                records,
                temporary,
            )
            folder.mkdir(exist_ok=True)
            records.mkdir(exist_ok=True)
            # Folds that are started at the same time share the work: each in its own order, skipping what is done.
            random.SystemRandom().shuffle(to_do)
            _run(job, to_do, num_processes, report, log)

    for names in (report.done, report.up_to_date, report.removed):
        names.sort()
    for found in (report.failed, report.warnings):
        found.sort(key=lambda problem: (problem.identifier, problem.reason))
    return report


def preprocessing_fingerprint(plans_manager: PlansManager, configuration: str) -> str:
    """A hash of everything in the plans that changes a preprocessed image."""
    resolved = plans_manager.get_configuration(configuration).configuration
    relevant = {key: resolved.get(key) for key in _CONFIGURATION_KEYS}
    relevant["transpose_forward"] = plans_manager.transpose_forward
    relevant["image_reader_writer"] = plans_manager.plans["image_reader_writer"]
    relevant["intensities"] = plans_manager.foreground_intensity_properties_per_channel
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


# Before anything is opened


def _keep(
    report: PreprocessingReport, ready: dict[str, dict[str, Any]], fingerprint: str, images_folder: Path | None
) -> None:
    outdated = [name for name, record in ready.items() if not _fits_plans(record, fingerprint)]
    if outdated:
        where = f"{images_folder} does not exist" if images_folder else "nnUNet_raw is not set"
        raise UserError(
            f"{len(outdated)} unlabeled case(s) in {report.folder} were preprocessed with other plans "
            f"({some_of(outdated)}), and their images are not at hand: {where}. Make the images available, or copy the "
            f"folder and {report.folder.name}_records from where they were preprocessed with these plans."
        )
    for name, record in ready.items():
        _add(report, _Outcome(name, None, tuple(record.get("warnings", ())), processed=False))


def _remove_gone(folder: Path, records: Path, present: set[str], in_images_folder: set[str]) -> list[str]:
    preprocessed = {name[: -len(".json")] for name in list_names(records) if name.endswith(".json")}
    for name in present:
        ending = next((ending for ending in reversed(CASE_FILES) if name.endswith(ending)), None)
        if ending is not None:
            preprocessed.add(name[: -len(ending)])
    gone = sorted(preprocessed - in_images_folder)
    for name in gone:
        _remove_case(folder, records, name)
    return gone


def _remove_case(folder: Path, records: Path, identifier: str) -> None:
    (records / f"{identifier}.json").unlink(missing_ok=True)
    for ending in CASE_FILES:
        (folder / f"{identifier}{ending}").unlink(missing_ok=True)


def _outcome_on_record(case: RawCase, records: Path, fingerprint: str, present: set[str]) -> _Outcome | None:
    """What an earlier run made of the case; None if it has to be done."""
    record = read_record(records / f"{case.identifier}.json")
    if record is None or not _fits_plans(record, fingerprint):
        return None
    try:
        if record.get("sources") != _describe_files(case.images):
            return None
    except OSError:
        return None
    if record["status"] == "ok":
        if not has_files(case.identifier, present):
            return None
        return _Outcome(case.identifier, None, tuple(record["warnings"]), processed=False)
    return _Outcome(case.identifier, record["reason"], processed=False)


def _fits_plans(record: dict[str, Any], fingerprint: str) -> bool:
    return record.get("format_version") == FORMAT_VERSION and record.get("fingerprint") == fingerprint


def _describe_files(files: Sequence[Path]) -> list[dict[str, Any]]:
    described = []
    for file in files:
        found = file.stat()
        described.append({"name": file.name, "size": found.st_size, "mtime_ns": found.st_mtime_ns})
    return described


def _add(report: PreprocessingReport, outcome: _Outcome) -> None:
    if outcome.failure is not None:
        report.failed.append(CaseProblem(outcome.identifier, outcome.failure))
        return
    (report.done if outcome.processed else report.up_to_date).append(outcome.identifier)
    report.warnings.extend(CaseProblem(outcome.identifier, warning) for warning in outcome.warnings)


def _describe_labeled(preprocessed_dataset_folder: Path, plans_manager: PlansManager, num_channels: int) -> _Labeled:
    try:
        labeled = json.loads((preprocessed_dataset_folder / "dataset_fingerprint.json").read_bytes())
    except FileNotFoundError:
        labeled = {}
    flat = [shape[0] == 1 for shape in labeled.get("shapes_after_crop", ())]
    dimensions = None if not flat or (any(flat) and not all(flat)) else (2 if flat[0] else 3)
    spacings = labeled.get("spacings")
    spacing = tuple((min(axis), max(axis)) for axis in zip(*spacings, strict=True)) if spacings else None
    properties = plans_manager.foreground_intensity_properties_per_channel
    intensities = []
    for channel in range(num_channels):
        found = properties.get(str(channel), {})
        known = "percentile_00_5" in found and "percentile_99_5" in found
        intensities.append((found["percentile_00_5"], found["percentile_99_5"]) if known else None)
    return _Labeled(dimensions, spacing, tuple(intensities))


@contextlib.contextmanager
def _temporary_folder(base: Path) -> Iterator[Path]:
    """A folder of this run's own in `base`. What runs that were killed left there is removed."""
    base.mkdir(parents=True, exist_ok=True)
    prefix = f"{socket.gethostname()}-"
    for left in base.iterdir():
        if _is_abandoned(left, prefix):
            shutil.rmtree(left, ignore_errors=True)
    own = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=base))
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        with contextlib.suppress(OSError):
            base.rmdir()


def _is_abandoned(folder: Path, prefix: str) -> bool:
    process = folder.name.removeprefix(prefix).split("-")[0]
    # On Windows os.kill ends the process whatever the signal, so there only age counts.
    if os.name != "nt" and folder.name.startswith(prefix) and process.isdigit():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
    try:
        return time.time() - folder.stat().st_mtime > _OLD_TEMPORARY_SECONDS
    except OSError:
        return False


# Worker processes


def _run(
    job: _Job, cases: Sequence[RawCase], num_processes: int, report: PreprocessingReport, log: Callable[[str], None]
) -> None:
    start = time.monotonic()
    failed_before = len(report.failed)
    workers = min(num_processes, len(cases))
    log(f"Preprocessing {len(cases)} unlabeled case(s) into {job.folder} with {max(1, workers)} process(es)")
    with tqdm(total=len(cases), desc="unlabeled cases", unit="case", disable=None, file=sys.stderr) as bar:

        def finish(outcome: _Outcome) -> None:
            _add(report, outcome)
            bar.update()

        if workers == 0:
            for case in cases:
                finish(_process(job, case))
        else:
            _run_parallel(job, cases, workers, finish)
    failed = len(report.failed) - failed_before
    log(f"Preprocessed {len(report.done)} unlabeled case(s) in {time.monotonic() - start:.1f} s, {failed} failed")


def _run_parallel(job: _Job, cases: Sequence[RawCase], workers: int, finish: Callable[[_Outcome], None]) -> None:
    waiting = deque(cases)
    while waiting:
        with _pool(workers) as pool:
            suspects = _until_a_worker_dies(pool, job, waiting, workers, finish)
        _one_by_one(job, suspects, finish)


def _until_a_worker_dies(
    pool: ProcessPoolExecutor,
    job: _Job,
    waiting: deque[RawCase],
    workers: int,
    finish: Callable[[_Outcome], None],
) -> list[RawCase]:
    """Take cases from `waiting` until none is left or a worker dies; the cases that were being done then."""
    running: dict[Future[_Outcome], RawCase] = {}
    suspects: list[RawCase] = []
    while running or (waiting and not suspects):
        # One case per worker and none in a queue: so the cases under way are all that can have killed a worker.
        while waiting and not suspects and len(running) < workers:
            try:
                running[pool.submit(_process, job, waiting[0])] = waiting[0]
            except BrokenProcessPool:
                suspects.append(waiting[0])
            waiting.popleft()
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            case = running.pop(future)
            try:
                finish(future.result())
            except BrokenProcessPool:
                suspects.append(case)
    return suspects


def _one_by_one(job: _Job, suspects: Sequence[RawCase], finish: Callable[[_Outcome], None]) -> None:
    """Each case with all memory to itself; one that kills its process again has failed."""
    waiting = deque(suspects)
    while waiting:
        with _pool(1) as pool:
            try:
                pool.submit(os.getpid).result()
            except BrokenProcessPool:
                raise UserError(
                    "Worker processes end as soon as they start, so unlabeled cases cannot be preprocessed in "
                    "parallel. Is memory free on this machine? In a Python script, is the call under "
                    "if __name__ == '__main__'?"
                ) from None
            while waiting:
                case = waiting.popleft()
                try:
                    outcome = pool.submit(_process, job, case).result()
                except BrokenProcessPool:
                    finish(_Outcome(case.identifier, _DIED))
                    break
                finish(outcome)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned worker processes that end with this one, even when it is killed, and at once when it is interrupted."""
    context = multiprocessing.get_context("spawn")
    # The system closes the writing end when this process ends, however it ends.
    reading, writing = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(reading,))
    try:
        yield pool
    except BaseException:
        writing.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        writing.close()
        reading.close()


def _start_worker(parent: Connection) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    import SimpleITK
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _end_with(parent: Connection) -> None:
    multiprocessing.connection.wait([parent])
    os._exit(1)


# One case


def _process(job: _Job, case: RawCase) -> _Outcome:
    """Preprocess one case and put it in place. Whatever is wrong with it ends up in the outcome."""
    # Another run may have done it in the meantime.
    earlier = _outcome_on_record(case, job.records, job.fingerprint, _existing_files(job.folder, case.identifier))
    if earlier is not None:
        return earlier
    record_file = job.records / f"{case.identifier}.json"
    record: dict[str, Any] = {"format_version": FORMAT_VERSION, "fingerprint": job.fingerprint}
    try:
        record_file.unlink(missing_ok=True)
        # Taken before reading: a file that changes meanwhile is done again next time.
        record["sources"] = _describe_files(case.images)
        for file in case.images:
            with file.open("rb"):
                pass
        try:
            warnings, signature = _preprocess(job, case)
        except _BadImageError as problem:
            _remove_case(job.folder, job.records, case.identifier)
            _write_record(record_file, job.temporary, {**record, "status": "failed", "reason": str(problem)})
            return _Outcome(case.identifier, str(problem))
        for ending in CASE_FILES:
            (job.temporary / f"{case.identifier}{ending}").replace(job.folder / f"{case.identifier}{ending}")
        ok = {"status": "ok", "warnings": warnings, "signature": signature}
        _write_record(record_file, job.temporary, {**record, **ok})
    except MemoryError:
        return _Outcome(case.identifier, "memory ran out; use fewer processes (-np)")
    except Exception as error:
        # A full disk or missing permissions: nothing is recorded, so the next run tries again.
        return _Outcome(case.identifier, f"could not be read or stored: {_one_line(error)}")
    return _Outcome(case.identifier, None, tuple(warnings))


def _existing_files(folder: Path, identifier: str) -> set[str]:
    """Names of a preprocessed case's files that exist."""
    return {identifier + ending for ending in CASE_FILES if (folder / f"{identifier}{ending}").is_file()}


def _write_record(file: Path, temporary: Path, record: dict[str, Any]) -> None:
    written = temporary / file.name
    written.write_text(json.dumps(record), encoding="utf-8")
    _flush(written)
    written.replace(file)


def _flush(file: Path) -> None:
    """Get a file to the disk, so that after a power cut a record never stands beside an empty image."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def _preprocess(job: _Job, case: RawCase) -> tuple[list[str], dict[str, Any]]:
    """Read, check and preprocess; nnU-Net's files are in the temporary folder afterwards.

    Returns:
        warnings, and the signature of the preprocessed image.
    """
    plans_manager = PlansManager(job.plans)
    configuration = plans_manager.get_configuration(job.configuration)
    # nnU-Net's readers and preprocessors print; lines of many processes would tear up the progress bar.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        image, properties = _read(plans_manager.image_reader_writer_class(), case)
        warnings = [line for line in printed.getvalue().splitlines() if line.startswith("WARNING")]
        warnings = [line.removeprefix("WARNING!").strip() for line in warnings]
        warnings += _check_image(job, plans_manager, configuration, image, properties["spacing"])
        preprocessor = configuration.preprocessor_class(verbose=False)
        try:
            image, segmentation, properties = preprocessor.run_case_npy(
                image, None, properties, plans_manager, configuration, job.dataset_json
            )
        except MemoryError:
            raise
        except Exception as error:
            raise _BadImageError(f"nnU-Net's preprocessing failed: {_one_line(error)}") from error
    image = image.astype(np.float32, copy=False)
    segmentation = segmentation.astype(np.int16, copy=False)
    if not np.isfinite(image).all():
        raise _BadImageError("the preprocessed image has NaN or infinite voxels")
    _save(job.temporary / case.identifier, image, segmentation, properties, configuration)
    return warnings, image_signature(image)


def _save(
    target: Path,
    image: np.ndarray,
    segmentation: np.ndarray,
    properties: dict[str, Any],
    configuration: ConfigurationManager,
) -> None:
    # What a worker left behind that was killed while saving.
    for ending in CASE_FILES:
        target.with_name(target.name + ending).unlink(missing_ok=True)
    patch_size = tuple(configuration.patch_size)
    blocks, chunks = comp_blosc2_params(image.shape, patch_size, image.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(segmentation.shape, patch_size, segmentation.itemsize)
    nnUNetDatasetBlosc2.save_case(
        image,
        segmentation,
        properties,
        str(target),
        chunks=chunks,
        blocks=blocks,
        chunks_seg=chunks_seg,
        blocks_seg=blocks_seg,
    )
    for ending in CASE_FILES:
        _flush(target.with_name(target.name + ending))


def _read(reader: Any, case: RawCase) -> tuple[np.ndarray, dict[str, Any]]:
    """The image (C, X, Y, Z) and its properties.

    Raises:
        _BadImageError: it cannot be read; the text says which file is at fault, or how the channels differ.
    """
    for file in case.images:
        _check_file(file)
    try:
        return reader.read_images([str(file) for file in case.images])
    except MemoryError:
        raise
    except Exception as error:
        alone = {}
        for file in case.images:
            try:
                image, properties = reader.read_images([str(file)])
            except Exception as cause:
                raise _BadImageError(f"{file.name} cannot be read: {_one_line(cause)}") from cause
            alone[file.name] = (image.shape[1:], tuple(float(size) for size in properties["spacing"]))
        if len({shape for shape, _ in alone.values()}) > 1:
            shapes = ", ".join(f"{name} {_times(shape)}" for name, (shape, _) in alone.items())
            raise _BadImageError(f"the channels differ in shape: {shapes}") from error
        if len({spacing for _, spacing in alone.values()}) > 1:
            spacings = ", ".join(f"{name} {_times(spacing)}" for name, (_, spacing) in alone.items())
            raise _BadImageError(f"the channels differ in spacing: {spacings}") from error
        raise _BadImageError(f"cannot be read: {_one_line(error)}") from error


def _check_file(file: Path) -> None:
    """Find what ITK hides: it fills a cut-off NIfTI file up with zeros, reads NaN and infinite voxels as zero and an
    axis of size 0 as one of size 1.

    Raises:
        _BadImageError: the file is damaged, or hides one of these.
    """
    if not file.name.endswith((".gz", ".nii")):
        return
    expected, bad = None, 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            header = opened.read(_NIFTI_HEADER)
            layout = _nifti_layout(header)
            read = len(header)
            if layout is not None:
                offset, expected, dtype = layout
                if offset == expected:
                    raise _BadImageError(f"{file.name} has no voxels: an axis has size 0")
                read += len(opened.read(offset - read))
            while block := opened.read(2**22):
                read += len(block)
                if layout is not None and dtype is not None:
                    voxels = np.frombuffer(block, dtype, len(block) // dtype.itemsize)
                    bad += voxels.size - int(np.isfinite(voxels).sum())
    except (EOFError, OSError, zlib.error) as error:
        raise _BadImageError(f"{file.name} is damaged or incomplete: {_one_line(error)}") from error
    if expected is not None and read < expected:
        raise _BadImageError(f"{file.name} is incomplete: {read} bytes instead of {expected}")
    if bad:
        raise _BadImageError(f"{file.name} has {bad} voxels that are NaN or infinite")


def _nifti_layout(header: bytes) -> tuple[int, int, np.dtype | None] | None:
    """Of a single-file NIfTI-1 image: where the voxels start and end, and their type if it is a floating one."""
    if len(header) < _NIFTI_HEADER or header[344:347] != b"n+1":
        return None
    order = "<" if struct.unpack_from("<i", header)[0] == _NIFTI_HEADER else ">"
    dimensions, *sizes = struct.unpack_from(f"{order}8h", header, 40)
    datatype, bits = struct.unpack_from(f"{order}2h", header, 70)
    offset = max(_NIFTI_HEADER, int(struct.unpack_from(f"{order}f", header, 108)[0]))
    dtype = {16: np.dtype(f"{order}f4"), 64: np.dtype(f"{order}f8")}.get(datatype)
    return offset, offset + math.prod(sizes[:dimensions]) * bits // 8, dtype


def _check_image(
    job: _Job,
    plans_manager: PlansManager,
    configuration: ConfigurationManager,
    image: np.ndarray,
    spacing: Sequence[float],
) -> list[str]:
    """Warnings about an image (C, X, Y, Z) that can be used.

    Raises:
        _BadImageError: it cannot be used.
    """
    expected = len(channel_names(job.dataset_json))
    if image.shape[0] != expected:
        raise _BadImageError(f"{image.shape[0]} channels, but this dataset has {expected}")
    if 0 in image.shape:
        raise _BadImageError(f"an axis has size 0: {_times(image.shape[1:])}")
    if not all(math.isfinite(size) and size > 0 for size in spacing):
        raise _BadImageError(f"impossible spacing {_times(spacing)}")
    dimensions = 2 if image.shape[1] == 1 else 3
    if job.labeled.dimensions not in (None, dimensions):
        raise _BadImageError(
            f"a {dimensions}D image of {_times(image.shape[1:])} voxels, but the labeled images are "
            f"{job.labeled.dimensions}D"
        )
    lowest = [float(channel.min()) for channel in image]
    highest = [float(channel.max()) for channel in image]
    if not all(map(math.isfinite, [*lowest, *highest])):
        count = image.size - int(np.isfinite(image).sum())
        raise _BadImageError(f"{count} of {image.size} voxels are NaN or infinite")
    if lowest == highest:
        values = ", ".join(f"{value:g}" for value in lowest)
        raise _BadImageError(f"all voxels have the same value ({values})")
    _check_growth(plans_manager, configuration, image, spacing)

    warnings = []
    if job.labeled.spacing is not None:
        for size, (low, high) in zip(spacing, job.labeled.spacing, strict=True):
            if not low / _SPACING_FACTOR <= size <= high * _SPACING_FACTOR:
                ranges = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in job.labeled.spacing)
                warnings.append(f"spacing {_times(spacing)} is far from the labeled images' ({ranges})")
                break
    for channel, labeled in enumerate(job.labeled.intensities):
        low, high = lowest[channel], highest[channel]
        if low == high:
            warnings.append(f"all voxels of channel {channel} have the same value ({low:g})")
        elif labeled is not None and (high < labeled[0] or low > labeled[1]):
            warnings.append(
                f"intensities of channel {channel} ({low:g} to {high:g}) lie outside the labeled foreground's "
                f"({labeled[0]:g} to {labeled[1]:g})"
            )
    return warnings


def _check_growth(
    plans_manager: PlansManager, configuration: ConfigurationManager, image: np.ndarray, spacing: Sequence[float]
) -> None:
    given = [spacing[axis] for axis in plans_manager.transpose_forward]
    # A 2D configuration leaves the spacing between slices as it is.
    target = [*given[: len(given) - len(configuration.spacing)], *configuration.spacing]
    growth = math.prod(have / want for have, want in zip(given, target, strict=True))
    if growth > _MOST_GROWTH and image.size * growth > _MOST_VOXELS:
        raise _BadImageError(
            f"with its spacing {_times(spacing)} it would have {image.size * growth:.2g} voxels after resampling; "
            "correct the spacing in its header"
        )


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)


def _one_line(error: BaseException) -> str:
    """An exception in one line; of a library's long report, the last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if isinstance(error, (RuntimeError, OSError)) else f"{type(error).__name__}: {lines[-1]}"
