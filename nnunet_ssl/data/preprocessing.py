"""Preprocessing of imagesUn: nnU-Net's own preprocessor, incremental, parallel, and safe to interrupt.

Beside the preprocessed labeled cases lie::

    <data_identifier>_unlabeled/           CASE.b2nd, CASE_seg.b2nd, CASE.pkl, as nnU-Net writes them
    <data_identifier>_unlabeled_records/   CASE.json: what the case was made from, and what came of it
    <data_identifier>_unlabeled_tmp_*/     a case in the making

A case counts only with a record that fits its images and the plans. The record is removed first and written last, so a
case that was cut off at any moment is simply done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
    labeled_images,
    list_names,
    read_record,
    ready_cases,
    records_folder,
    unlabeled_folder,
)
from nnunet_ssl.data.image_checks import (
    BadImageError,
    LabeledImages,
    check_image,
    describe_labeled_images,
    direction_of,
    direction_warnings,
    directions_of,
    read_image,
)
from nnunet_ssl.data.leak_guard import image_signature
from nnunet_ssl.data.worker_processes import in_worker_processes
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import flush_to_disk, replacing
from nnunet_ssl.text import one_line, some_of

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

# What nnU-Net's normalizations read of the labeled images' intensities. Others may read all of it.
_INTENSITIES_READ: dict[str, tuple[str, ...]] = {
    "ZScoreNormalization": (),
    "NoNormalization": (),
    "RescaleTo01Normalization": (),
    "RGBTo01Normalization": (),
    "CTNormalization": ("mean", "std", "percentile_00_5", "percentile_99_5"),
}

_STORED_FILE = re.compile(r"(.+?)(_seg\.b2nd|\.b2nd|\.pkl|\.json)", re.DOTALL)
# Far longer than a case takes.
_ABANDONED_SECONDS = 24 * 3600.0


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

    def add(self, identifier: str, record: dict[str, Any], new: bool) -> None:
        """Enter a case by its record; `new` if that was made now."""
        if record["status"] == "failed":
            self.failed.append(CaseProblem(identifier, record["reason"]))
        else:
            (self.done if new else self.up_to_date).append(identifier)
            self.warnings.extend(CaseProblem(identifier, warning) for warning in record["warnings"])

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
class _Job:
    """What all cases have in common. It travels to the worker processes, so it is plain data."""

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    fingerprint: str
    earlier_fingerprint: str
    labeled: LabeledImages
    folder: Path
    records: Path

    @property
    def temporary_prefix(self) -> str:
        return f"{self.folder.name}_tmp_"


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
        UserError: impossible arguments, folders that are links, or cases preprocessed with other plans whose images
            are not there.
    """
    if num_processes < 0:
        raise UserError(f"The number of processes must be 0 or more, got {num_processes}.")
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise UserError(f"Part {part_id} of {num_parts} does not exist: parts count from 0 to --num-parts minus 1.")
    identifier = plans_manager.get_configuration(configuration).data_identifier
    job = _Job(
        plans_manager.plans,
        configuration,
        dataset_json,
        preprocessing_fingerprint(plans_manager, configuration),
        _earlier_fingerprint(plans_manager, configuration),
        describe_labeled_images(preprocessed_dataset_folder, plans_manager, len(channel_names(dataset_json))),
        unlabeled_folder(preprocessed_dataset_folder, identifier),
        records_folder(preprocessed_dataset_folder, identifier),
    )
    report = PreprocessingReport(job.folder)
    images_folder = None if raw_dataset_folder is None else raw_dataset_folder / IMAGES_FOLDER
    if raw_dataset_folder is None or images_folder is None or not images_folder.is_dir():
        _keep(job, report, ready_cases(preprocessed_dataset_folder, identifier), images_folder)
        return report

    for folder in (job.folder, job.records):
        if folder.is_symlink():
            # What has no image any more is removed from them, whatever they contain.
            raise UserError(
                f"{folder} is a link, and files would be removed from where it leads. Remove the link; to keep the "
                "preprocessed cases elsewhere, link the dataset's whole folder."
            )
    cases, problems = find_raw_cases(
        images_folder, dataset_json["file_ending"], files_per_case(raw_dataset_folder, dataset_json)
    )
    everyone = {case.identifier for case in cases} | {problem.identifier for problem in problems}
    mine = set(sorted(everyone)[part_id::num_parts])
    clashing = _clashing(job, cases)
    cases = [case for case in cases if case.identifier in mine - {problem.identifier for problem in clashing}]
    report.failed = [problem for problem in problems if problem.identifier in mine]
    for name in {problem.identifier for problem in report.failed} - {case.identifier for case in cases}:
        _remove_case(job, name)
    if part_id == 0:
        report.removed = _remove_gone(job, everyone)
    report.failed += [problem for problem in clashing if problem.identifier in mine]

    to_do = []
    for case in cases:
        record = _valid_record(job, case)
        if record is None:
            to_do.append(case)
        else:
            report.add(case.identifier, record, False)
    if to_do:
        remove_abandoned(job.folder.parent, job.temporary_prefix)
        _make_folders(job)
        reader = plans_manager.image_reader_writer_class()
        directions = directions_of(reader, labeled_images(raw_dataset_folder, dataset_json))
        job = replace(job, labeled=replace(job.labeled, directions=directions))
        # Folds that are started at the same time share the work: each in its own order, skipping what is done.
        random.SystemRandom().shuffle(to_do)
        _run(job, to_do, num_processes, report, log)

    for names in (report.done, report.up_to_date, report.removed):
        names.sort()
    for found in (report.failed, report.warnings):
        found.sort(key=lambda problem: (problem.identifier, problem.reason))
    return report


def _make_folders(job: _Job) -> None:
    try:
        for folder in (job.folder, job.records):
            folder.mkdir(exist_ok=True)
            # What is there already may belong to somebody else.
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"Nothing can be written into {job.folder.parent} ({error.strerror}), where preprocessed images go. Get "
            "permission or space there, or let nnUNet_preprocessed lead to another folder."
        ) from None


def _run(
    job: _Job, cases: Sequence[RawCase], num_processes: int, report: PreprocessingReport, log: Callable[[str], None]
) -> None:
    start = time.monotonic()
    workers = min(num_processes, len(cases))
    log(f"Preprocessing {len(cases)} unlabeled case(s) into {job.folder} with {max(1, workers)} process(es)")
    process = partial(_process, job)
    results = in_worker_processes(process, cases, workers) if workers else ((case, process(case)) for case in cases)
    for case, result in tqdm(results, "unlabeled cases", len(cases), unit="case", disable=None, file=sys.stderr):
        report.add(case.identifier, *(result or (_failed(_DIED), True)))
    log(f"Preprocessed {len(report.done)} unlabeled case(s) in {time.monotonic() - start:.1f} s")


def preprocessing_fingerprint(plans_manager: PlansManager, configuration: str) -> str:
    """A hash of everything in the plans that changes a preprocessed image."""
    return _hash(plans_manager, configuration, _intensities_read(plans_manager, configuration))


def _earlier_fingerprint(plans_manager: PlansManager, configuration: str) -> str:
    """The one of records until November 2026, which had all intensities in it, read or not."""
    return _hash(plans_manager, configuration, plans_manager.foreground_intensity_properties_per_channel)


def _intensities_read(plans_manager: PlansManager, configuration: str) -> dict[str, dict[str, Any]]:
    """What normalization reads of the labeled images' intensities, by channel."""
    resolved = plans_manager.get_configuration(configuration).configuration
    known = _INTENSITIES_READ if resolved.get("preprocessor_name") == "DefaultPreprocessor" else {}
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


# What is there already


def _keep(job: _Job, report: PreprocessingReport, ready: dict[str, dict[str, Any]], images_folder: Path | None) -> None:
    outdated = [name for name, record in ready.items() if not _fits_plans(job, record)]
    if outdated:
        where = f"{images_folder} does not exist" if images_folder else "nnUNet_raw is not set"
        raise UserError(
            f"{len(outdated)} unlabeled case(s) in {report.folder} were preprocessed with other plans "
            f"({some_of(outdated)}), and their images are not at hand: {where}. Make the images available, or copy the "
            f"folder and {job.records.name} from where they were preprocessed with these plans."
        )
    for name, record in ready.items():
        report.add(name, record, False)


def _remove_gone(job: _Job, in_images_folder: set[str]) -> list[str]:
    stored = (_STORED_FILE.fullmatch(name) for name in list_names(job.folder) | list_names(job.records))
    gone = sorted({match[1] for match in stored if match} - in_images_folder)
    for name in gone:
        _remove_case(job, name)
    return gone


def _remove_case(job: _Job, identifier: str) -> None:
    (job.records / f"{identifier}.json").unlink(missing_ok=True)
    for ending in CASE_FILES:
        (job.folder / f"{identifier}{ending}").unlink(missing_ok=True)


def _clashing(job: _Job, cases: Sequence[RawCase]) -> list[CaseProblem]:
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
            f"its files would replace those of {other}, because the file system of {job.folder.parent} takes the two "
            "names for one; rename its images",
        )
        for name, other in alike
        if _one_file(job, name, other)
    ]


def _one_file(job: _Job, name: str, other: str) -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix=job.temporary_prefix, dir=job.folder.parent) as folder:
            Path(folder, other).touch()
            return Path(folder, name).exists()
    except OSError:
        return False  # that nothing can be written there is told elsewhere


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove folders in the making that killed runs have left.

    Args:
        folder: that holds them.
        prefix: of their names.
    """
    for name in list_names(folder):
        if name.startswith(prefix):
            left = folder / name
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(left)


def _valid_record(job: _Job, case: RawCase) -> dict[str, Any] | None:
    """What an earlier run made of the case; None if it has to be done."""
    record = read_record(job.records / f"{case.identifier}.json")
    if record is None or not _fits_plans(job, record):
        return None
    try:
        if record.get("sources") != _describe_files(_source_files(case)):
            return None
    except OSError:
        return None
    files = (job.folder / f"{case.identifier}{ending}" for ending in CASE_FILES)
    return record if record["status"] == "failed" or all(file.is_file() for file in files) else None


def _fits_plans(job: _Job, record: dict[str, Any]) -> bool:
    fingerprints = (job.fingerprint, job.earlier_fingerprint)
    return record.get("format_version") == FORMAT_VERSION and record.get("fingerprint") in fingerprints


def _source_files(case: RawCase) -> list[Path]:
    """The images, and the file beside them in which nnU-Net's TIFF reader looks for the spacing."""
    spacing_file = case.images[0].with_name(f"{case.identifier}.json")
    return [*case.images, spacing_file] if spacing_file.is_file() else list(case.images)


def _describe_files(files: Sequence[Path]) -> list[dict[str, Any]]:
    found = [(file.name, file.stat()) for file in files]
    return [{"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in found]


# One case


def _process(job: _Job, case: RawCase) -> tuple[dict[str, Any], bool]:
    """Preprocess one case and put it in place. Whatever is wrong with it ends up in its record.

    Returns:
        the record, and whether it was made now.
    """
    earlier = _valid_record(job, case)
    if earlier is not None:
        # Another run has done it in the meantime.
        return earlier, False
    record_file = job.records / f"{case.identifier}.json"
    # In the folder's own file system, so that files move at once or not at all.
    options: dict[str, Any] = {"prefix": job.temporary_prefix, "dir": job.folder.parent, "ignore_cleanup_errors": True}
    try:
        record_file.unlink(missing_ok=True)
        # Taken before reading: a file that changes meanwhile is done again next time.
        sources = _describe_files(_source_files(case))
        for file in case.images:
            if file.exists() and not file.is_file():
                # Opening a pipe would wait for ever.
                raise OSError(f"{file.name} is no regular file")
            file.open("rb").close()
        with tempfile.TemporaryDirectory(**options) as folder:
            try:
                record = _preprocess(job, case, Path(folder))
                for ending in CASE_FILES:
                    Path(folder, case.identifier + ending).replace(job.folder / f"{case.identifier}{ending}")
            except BadImageError as problem:
                record = _failed(str(problem))
                _remove_case(job, case.identifier)
            record |= {"format_version": FORMAT_VERSION, "fingerprint": job.fingerprint, "sources": sources}
            # On the disk first: after a power cut a record must not be empty, nor stand beside an empty image.
            with replacing(record_file, aside=Path(folder, record_file.name), durable=True) as written:
                written.write_text(json.dumps(record), encoding="utf-8")
    except MemoryError:
        record = _failed("memory ran out; use fewer processes (-np)")
    except Exception as error:
        # A full disk or missing permissions: nothing is recorded, so the next run tries again.
        record = _failed(f"could not be read or stored: {one_line(error)}")
    return record, True


def _failed(reason: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason}


def _preprocess(job: _Job, case: RawCase, folder: Path) -> dict[str, Any]:
    """Read, check and preprocess; nnU-Net's files are in the folder afterwards.

    Returns:
        what its record says of it.
    """
    plans_manager = PlansManager(job.plans)
    configuration = plans_manager.get_configuration(job.configuration)
    # nnU-Net's readers and preprocessors print; lines of many processes would tear up the progress bar.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        reader = plans_manager.image_reader_writer_class()
        image, properties = read_image(reader, case.images)
        lines = printed.getvalue().splitlines()
        warnings = [line.removeprefix("WARNING").lstrip("! ") for line in lines if line.startswith("WARNING")]
        warnings += check_image(image, properties["spacing"], labeled=job.labeled)
        warnings += direction_warnings(direction_of(reader, case.images[0]), job.labeled)
        try:
            image, segmentation, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
                image, None, properties, plans_manager, configuration, job.dataset_json
            )
        except MemoryError:
            raise
        except Exception as error:
            raise BadImageError(f"nnU-Net's preprocessing failed: {one_line(error)}") from error
    image = image.astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        raise BadImageError("the preprocessed image has NaN or infinite voxels")
    _save(folder / case.identifier, image, segmentation.astype(np.int16, copy=False), properties, configuration)
    return {"status": "ok", "warnings": warnings, "signature": image_signature(image)}


def _save(
    target: Path,
    image: np.ndarray,
    segmentation: np.ndarray,
    properties: dict[str, Any],
    configuration: ConfigurationManager,
) -> None:
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
        flush_to_disk(target.with_name(target.name + ending))
