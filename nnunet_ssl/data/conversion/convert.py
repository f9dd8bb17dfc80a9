"""Converting a download case by case. Interrupted at any moment, the next run goes on where it stopped.

A file appears under its name only when it is complete. ``conversion.json`` tells what a folder is made from, so that
two downloads are never mixed in one. ``dataset.json`` is written last.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from tqdm import tqdm

from nnunet_ssl.data.conversion.datasets import BENCHMARKS
from nnunet_ssl.data.conversion.folds import check_labeled
from nnunet_ssl.data.conversion.source_dataset import SourceCase, SourceDataset
from nnunet_ssl.data.image_checks import BadImageError
from nnunet_ssl.data.raw_cases import CaseProblem
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import AGAIN, list_names, replacing
from nnunet_ssl.text import one_line, some_of

RECORD = "conversion.json"
NOTES = "conversion_notes.json"
_LEAST_FREE = 2**20
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EIO)
_UNFINISHED = ".unfinished"


@dataclass
class ConversionReport:
    """What :func:`convert_dataset` did.

    Attributes:
        train: training cases in the dataset.
        test: test cases in the dataset.
        written: how many of both were converted now, rather than by an earlier run.
        failed: cases that were left out, and why.
        notes: what to know about single cases.
        remarks: what to know about the dataset.
    """

    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    written: int = 0
    failed: list[CaseProblem] = field(default_factory=list)
    notes: list[CaseProblem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def convert_dataset(
    kind: str, source: Path, dataset_folder: Path, *, labeled: str, test_list: Path | None = None
) -> ConversionReport:
    """Convert a download to nnU-Net's layout.

    Training cases go to imagesTr and labelsTr, test cases to imagesTs, and to labelsTs where they have labels. A case
    that cannot be used is left out and named in the report.

    Args:
        kind: a key of ``BENCHMARKS``.
        source: the folder of the download.
        dataset_folder: ``nnUNet_raw/DatasetXXX_Name``; new, or of an earlier run with the same download.
        labeled: how many are to stay labeled, see :func:`write_folds`; only checked here, before the work begins.
        test_list: a text file with the name of a case or patient per line, to be test cases. By default a list that
            came with the download.

    Raises:
        UserError: too few cases found, an unusable list, a folder that cannot be read or written, or a dataset folder
            with other content.
    """
    benchmark = BENCHMARKS[kind]
    whole = f"Give the folder of the whole download; it should contain {benchmark.expects}."
    try:
        if not source.is_dir():
            raise UserError(f"{source} is not a folder. {whole}")
        source = source.resolve()
        findings = benchmark.find(source)
    except OSError as error:
        raise UserError(
            f"{error.filename or source} cannot be read: {error.strerror}. Check its permissions and run the command "
            "again."
        ) from None
    if not findings.cases:
        raise UserError(f"No case found in {source}. It should contain {benchmark.expects}. Source: {benchmark.source}")
    if all(case.test for case in findings.cases):
        raise UserError(
            f"All cases in {source} are test cases. Give the folder above, which should contain {benchmark.expects}."
        )
    report = ConversionReport(remarks=list(findings.notes))
    cases = _usable(findings.cases, report)
    test_list = test_list or findings.test_list
    if test_list is not None:
        cases = _hold_out(cases, benchmark, test_list, report)
    if report.failed:
        first = report.failed[0]
        whole = f"Cases left out: {len(report.failed)}, the first {first.identifier}: {first.reason}. {whole}"
    check_labeled(labeled, len({benchmark.group(case.name) for case in cases if not case.test}), whole)

    outputs = {case.name: _outputs(case, benchmark, dataset_folder) for case in cases}
    unfinished = dataset_folder / _UNFINISHED
    try:
        _claim(dataset_folder, kind, source, [file for files in outputs.values() for file in files])
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name in ("imagesTr", "labelsTr"):
            (dataset_folder / name).mkdir(exist_ok=True)
        total = sum(len(files) for files in outputs.values())
        with tqdm(total=total, desc=dataset_folder.name, unit="file", disable=None, file=sys.stderr) as progress:
            for case in sorted(cases, key=lambda one: one.name):
                _convert_case(case, benchmark, outputs[case.name], unfinished, report)
                progress.update(len(outputs[case.name]))
        if report.train:
            _describe(benchmark, dataset_folder, unfinished, len(report.train))
    except OSError as error:
        raise UserError(
            f"{dataset_folder} cannot be made or written to: {one_line(error)}. {AGAIN} It continues where it stopped."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    report.notes = [CaseProblem(case, note) for case, note in sorted(_kept_notes(dataset_folder).items())]
    report.failed.sort(key=lambda problem: problem.identifier)
    return report


def _usable(cases: Sequence[SourceCase], report: ConversionReport) -> list[SourceCase]:
    """The cases with a label and a name that is theirs alone; the others are reported."""
    places: dict[str, list[Path]] = {}
    for case in cases:
        places.setdefault(case.name, []).append(case.images[0])
    usable = []
    for case in cases:
        found = places[case.name]
        if len(found) > 1:
            reason = f"found {len(found)} times: {some_of(map(str, sorted(found)), 3)}"
        elif not re.fullmatch(r"\w[\w.-]*", case.name, re.ASCII):
            reason = "its name has characters other than letters, digits, '_', '-' and '.'"
        elif case.label is None and not case.test:
            reason = f"no label next to {case.images[0].name} or in the folder of labels"
        else:
            usable.append(case)
            continue
        problem = CaseProblem(case.name, reason)
        if problem not in report.failed:
            report.failed.append(problem)
    return usable


def _hold_out(
    cases: Sequence[SourceCase], benchmark: SourceDataset, test_list: Path, report: ConversionReport
) -> list[SourceCase]:
    """Make test cases of those that a list names."""
    try:
        lines = [line.strip() for line in test_list.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The list of test cases {test_list} cannot be read: {error}. Give a text file (UTF-8) with one case or "
            "patient per line, and check its permissions."
        ) from None
    groups: set[str] = set()
    for line in filter(None, lines):
        group = benchmark.listed_group(line)
        if group is None:
            raise UserError(
                f"{test_list} names {line!r}, which is not a case of this dataset. Correct or remove the line."
            )
        groups.add(group)
    if not groups:
        raise UserError(f"{test_list} names no case. Give a list with one case per line, or remove it.")
    # A case that cannot be used may be listed all the same.
    known = {
        benchmark.group(name) for name in [case.name for case in cases] + [one.identifier for one in report.failed]
    }
    missing = sorted(groups - known)
    if missing:
        raise UserError(
            f"{test_list} names {some_of(missing)}, which the download does not contain. Complete the download, or "
            "remove these lines."
        )
    report.remarks.append(f"Test cases from {test_list}.")
    return [replace(case, test=True) if benchmark.group(case.name) in groups else case for case in cases]


def _outputs(case: SourceCase, benchmark: SourceDataset, folder: Path) -> list[Path]:
    """The files of a case: images by channel, then the label if it has one."""
    part = "Ts" if case.test else "Tr"
    ending = benchmark.file_ending
    files = [
        folder / f"images{part}" / f"{case.name}_{channel:04d}{ending}" for channel in range(benchmark.image_files)
    ]
    return files + ([folder / f"labels{part}" / f"{case.name}{ending}"] if case.label is not None else [])


def _claim(folder: Path, kind: str, source: Path, outputs: Sequence[Path]) -> None:
    """Begin a dataset's folder, or make sure that it is one of the same conversion."""
    record = {"dataset": kind, "source": str(source)}
    file = folder / RECORD
    remedy = "Choose another number with -d or another name with --name, or remove that folder."
    if folder.exists() and list_names(folder) - {_UNFINISHED}:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder} exists and was not made by nnunet-ssl convert. {remedy}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}. {remedy}") from None
        if found != record:
            raise UserError(f"{folder} was converted from something else: {found}; now it is {record}. {remedy}")
        planned = set(outputs)
        parts = [folder / name for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")]
        others = sorted(
            str(one.relative_to(folder)) for part in parts for one in part.glob("[!.]*") if one not in planned
        )
        if others:
            raise UserError(
                f"{folder} contains files that this conversion would not write, so test and training cases could be "
                f"mixed up: {some_of(others, 5)}. Was it made with another list of test cases? {remedy}"
            )
        return
    unfinished = folder / _UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    with replacing(file, aside=unfinished / RECORD) as made:
        made.write_text(json.dumps(record, indent=4) + "\n", encoding="utf-8")


def _convert_case(
    case: SourceCase, benchmark: SourceDataset, outputs: Sequence[Path], unfinished: Path, report: ConversionReport
) -> None:
    if not all(file.is_file() for file in outputs):
        try:
            with ExitStack() as renames:
                made = [renames.enter_context(replacing(file, aside=unfinished / file.name)) for file in outputs]
                images, label = made[: benchmark.image_files], made[benchmark.image_files :]
                note = benchmark.write(case, images, label[0] if label else None)
                if note:
                    # First: files that are there are not converted again, and the note would be lost.
                    _keep_note(unfinished, case.name, note)
                for file in outputs:
                    file.parent.mkdir(exist_ok=True)
        except UserError:
            raise
        except Exception as error:
            for file in outputs:
                file.unlink(missing_ok=True)
            if unreadable := _unreadable(case, error):
                raise UserError(
                    f"{unreadable} cannot be read: {one_line(error)}. Check its permissions and its disk and run the "
                    f"command again; it continues with {case.name}."
                ) from error
            if _machine_is_at_fault(error, unfinished):
                raise UserError(
                    f"{case.name} could not be written to {unfinished.parent}: {one_line(error)}. {AGAIN} It "
                    "continues with this case. Check free memory too."
                ) from error
            # Whatever is wrong with one case's files, the others can be converted.
            reason = str(error) if isinstance(error, BadImageError) else one_line(error)
            report.failed.append(CaseProblem(case.name, reason))
            return
        report.written += 1
    (report.test if case.test else report.train).append(case.name)


def _unreadable(case: SourceCase, error: Exception) -> Path | None:
    """The file of the download that permissions or a broken disk keep from being read, if there is one."""
    given = [*case.images, *([case.label] if case.label is not None else [])]
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS and error.filename is not None:
        named = Path(os.fsdecode(error.filename))
        if any(named.is_relative_to(one) for one in given):
            return named
    # h5py does not name the file, and SimpleITK does not even name the reason.
    files = (file for one in given for file in (one, *one.rglob("*")))
    return next((file for file in files if os.access(file, os.F_OK) and not os.access(file, os.R_OK)), None)


def _machine_is_at_fault(error: Exception, folder: Path) -> bool:
    """Not the case: leaving it out would make other folds of the others."""
    # SimpleITK does not tell why it could not write.
    full = shutil.disk_usage(folder).free < _LEAST_FREE
    return full or isinstance(error, MemoryError) or getattr(error, "errno", None) in _MACHINE_ERRORS


def _keep_note(unfinished: Path, case: str, note: str) -> None:
    """Notes stay, so that a later run, which does not do the case again, can repeat them."""
    notes = {**_kept_notes(unfinished.parent), case: note}
    with replacing(unfinished.parent / NOTES, aside=unfinished / NOTES) as made:
        made.write_text(json.dumps(notes, indent=4) + "\n", encoding="utf-8")


def _kept_notes(folder: Path) -> dict[str, str]:
    file = folder / NOTES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _describe(benchmark: SourceDataset, folder: Path, unfinished: Path, training_cases: int) -> None:
    with replacing(folder / "dataset.json", aside=unfinished / "dataset.json"):
        generate_dataset_json(
            str(unfinished),
            channel_names=dict(benchmark.channel_names),
            labels=dict(benchmark.labels),
            num_training_cases=training_cases,
            file_ending=benchmark.file_ending,
            regions_class_order=benchmark.regions_class_order,
            dataset_name=benchmark.dataset_name,
            reference=benchmark.source,
            license="see the reference",
            converted_by="nnunet-ssl convert",
        )
