"""Runs in parts, at the same time, cut off and of thousands of cases."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from preprocessing_cases import IDENTIFIER, _with, reasons
from tiny_dataset import TinyDataset, read_preprocessed, voxels

from nnunet_ssl.data import preprocess_case, preprocessing, records
from nnunet_ssl.data.preprocessing import preprocess_unlabeled
from nnunet_ssl.data.raw_cases import RawCase
from nnunet_ssl.data.records import FORMAT_VERSION, preprocessing_fingerprint
from nnunet_ssl.data.unlabeled_cases import ready_cases
from nnunet_ssl.errors import UserError


@pytest.fixture
def dataset(tmp_path: Path) -> TinyDataset:
    return TinyDataset(tmp_path)


@pytest.fixture
def three(dataset: TinyDataset) -> TinyDataset:
    for number in range(3):
        dataset.add(f"U{number}", voxels(number))
    return dataset


def test_a_tiff_image_is_done_again_when_the_spacing_beside_it_changes(tmp_path: Path) -> None:
    dataset = TinyDataset(tmp_path)
    dataset.dataset_json["file_ending"] = ".tif"
    dataset.plans["image_reader_writer"] = "Tiff3DIO"
    for name in ("U0", "U1"):
        tifffile.imwrite(dataset.images / f"{name}_0000.tif", voxels(0))
    without = dataset.run()
    assert without.done == ["U0", "U1"]
    assert [warning.reason[:15] for warning in without.warnings] == ["no spacing file"] * 2
    for spacing, shape in (([1, 1, 2], (20, 24, 48)), ([2, 1, 1], (40, 24, 24))):
        (dataset.images / "U1.json").write_text(json.dumps({"spacing": spacing}))
        report = dataset.run()
        assert (report.done, report.up_to_date, report.failed) == (["U1"], ["U0"], [])
        assert [warning.identifier for warning in report.warnings] == ["U0"]
        assert read_preprocessed(dataset.folder, "U1").shape == (1, *shape)
    assert dataset.run().up_to_date == ["U0", "U1"]
    (dataset.images / "U1.json").unlink()
    assert dataset.run().done == ["U1"]


def test_parts_make_exactly_the_whole(tmp_path: Path) -> None:
    whole, shared = TinyDataset(tmp_path / "whole"), TinyDataset(tmp_path / "shared")
    for dataset in (whole, shared):
        for number in range(7):
            dataset.add(f"U{number}", voxels(number))
        (dataset.images / "U3x.nii.gz").write_bytes(b"")
    complete = whole.run()
    reports = [shared.run(num_parts=3, part_id=part) for part in (2, 0, 1)]
    assert sorted(name for report in reports for name in report.done) == complete.done
    assert [problem for report in reports for problem in report.failed] == complete.failed
    assert max(len(report.done) for report in reports) <= 3
    assert list(ready_cases(shared.preprocessed, IDENTIFIER)) == complete.done
    for name in complete.done:
        np.testing.assert_array_equal(read_preprocessed(whole.folder, name), read_preprocessed(shared.folder, name))
    assert shared.run().up_to_date == complete.done


@pytest.mark.parametrize("options", [{"num_parts": 0}, {"num_parts": 2, "part_id": 2}, {"part_id": -1}])
def test_impossible_parts(dataset: TinyDataset, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="does not exist"):
        dataset.run(**options)


def test_negative_number_of_processes(dataset: TinyDataset) -> None:
    with pytest.raises(UserError, match="0 or more"):
        dataset.run(num_processes=-1)


def test_case_that_another_run_finished_meanwhile_is_not_done_twice(
    three: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = preprocessing.preprocess_case
    calls = 0

    def late(job: Any, case: RawCase) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            monkeypatch.setattr(preprocessing, "preprocess_case", process)
            three.run()
        return process(job, case)

    monkeypatch.setattr(preprocessing, "preprocess_case", late)
    report = three.run()
    assert (report.done, report.up_to_date) == ([], ["U0", "U1", "U2"])


def test_what_killed_runs_left_is_removed_once_it_is_old(three: TinyDataset) -> None:
    young, old, other = (
        three.preprocessed / name
        for name in (
            f"{IDENTIFIER}_unlabeled_tmp_a",
            f"{IDENTIFIER}_unlabeled_tmp_b",
            f"{IDENTIFIER}_x_unlabeled_tmp_c",
        )
    )
    for folder in (young, old, other):
        folder.mkdir()
        (folder / "U1.b2nd").write_bytes(b"half a case")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    assert three.run().done == ["U0", "U1", "U2"]
    assert three.temporary() == [young] and other.exists()


def test_runs_at_the_same_time_do_not_disturb_each_other(three: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run does the case between this one's preprocessing and its last steps."""
    preprocess = preprocess_case.make_case
    finished = []

    def slow(job: Any, case: RawCase, folder: Path) -> Any:
        record = preprocess(job, case, folder)
        with monkeypatch.context() as patch:
            patch.setattr(preprocess_case, "make_case", preprocess)
            three.run()
        finished.append(list(ready_cases(three.preprocessed, IDENTIFIER)))
        return record

    monkeypatch.setattr(preprocess_case, "make_case", slow)
    report = three.run()
    assert sorted(report.done + report.up_to_date) == ["U0", "U1", "U2"] and report.failed == []
    assert len(report.done) == 1 and finished == [["U0", "U1", "U2"]]
    assert list(ready_cases(three.preprocessed, IDENTIFIER)) == ["U0", "U1", "U2"]
    assert three.temporary() == []


@pytest.mark.parametrize("step", range(1, 6))
def test_cut_off_after_any_step_nothing_half_done_is_believed(
    three: TinyDataset, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Five operations put a changed case in place: its record goes, three files come, its record comes."""
    three.run()
    old = read_preprocessed(three.folder, "U1")
    three.add("U1", voxels(50, (22, 24, 24)))
    operations = 0

    class KilledError(BaseException):
        pass

    def cut_off(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Path, *args: Any, **options: Any) -> Any:
            nonlocal operations
            counts = self.name.startswith("U1") and (function is replace or self.parent == three.records)
            if counts and operations == step:
                raise KilledError
            operations += counts
            return function(self, *args, **options)

        return call

    replace, unlink = Path.replace, Path.unlink
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Path, "replace", cut_off(replace))
        patch.setattr(Path, "unlink", cut_off(unlink))
        three.run()
        raise KilledError
    assert operations == step
    assert ("U1" in ready_cases(three.preprocessed, IDENTIFIER)) == (step == 5)
    three.run()
    assert list(ready_cases(three.preprocessed, IDENTIFIER)) == ["U0", "U1", "U2"]
    assert read_preprocessed(three.folder, "U1").shape != old.shape


_process = preprocessing.preprocess_case


def process_unless_deadly(job: Any, case: RawCase) -> Any:
    """In a worker process: U1 kills it."""
    if case.identifier == "U1":
        os._exit(9)
    return _process(job, case)


def test_worker_processes_and_one_that_is_killed(three: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3, 6):
        three.add(f"U{number}", voxels(number))
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "preprocess_case", process_unless_deadly)
        report = three.run(num_processes=2)
    assert report.done == ["U0", "U2", "U3", "U4", "U5"]
    assert "fewer processes" in reasons(report.failed)["U1"] and len(report.failed) == 1
    # It was not the image's fault for certain, so it is tried again.
    lines: list[str] = []
    assert three.run(log=lines.append).done == ["U1"]
    assert len(lines) == 2 and "1 unlabeled case(s)" in lines[0]


def test_thousands_of_cases_are_checked_quickly(dataset: TinyDataset) -> None:
    count = 2000
    dataset.folder.mkdir()
    dataset.records.mkdir()
    fingerprint = preprocessing_fingerprint(PlansManager(dataset.plans), "3d_fullres")
    for number in range(count):
        image = dataset.images / f"U{number:05d}_0000.nii.gz"
        image.write_bytes(b"never opened")
        record = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "sources": records.describe_files([image]),
            "status": "ok",
            "warnings": [],
            "signature": {"shape": [1, 20, 24, 24], "values": [0.123] * 64},
        }
        (dataset.records / f"U{number:05d}.json").write_text(json.dumps(record))
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (dataset.folder / f"U{number:05d}{ending}").touch()
    start = time.process_time()
    report = dataset.run()
    assert len(report.up_to_date) == count and not report.done
    assert time.process_time() - start < 2


def test_table_tells_counts_and_every_problem(three: TinyDataset) -> None:
    _with(np.nan)(three)
    three.add("bright", voxels(1) + 1000)
    first, *rest = three.run().table().splitlines()
    assert first == ("nnUNetPlans_3d_fullres_unlabeled: 4 ready (4 preprocessed now), 0 removed, 1 failed, 1 warnings")
    assert [line.split()[:2] for line in rest] == [["failed", "bad"], ["warning", "bright"]]


def test_nothing_to_do_leaves_nothing_behind(dataset: TinyDataset) -> None:
    report = preprocess_unlabeled(
        raw_dataset_folder=dataset.raw,
        preprocessed_dataset_folder=dataset.preprocessed,
        plans_manager=PlansManager(dataset.plans),
        configuration="3d_fullres",
        dataset_json=dataset.dataset_json,
        num_processes=4,
    )
    assert report.done == report.up_to_date == []
    assert not dataset.folder.exists() and not dataset.records.exists() and dataset.temporary() == []
