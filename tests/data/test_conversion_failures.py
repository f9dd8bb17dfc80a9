"""Conversions that are interrupted, and downloads that are incomplete, linked or damaged."""

from __future__ import annotations

import dataclasses
import errno
import json
import locale
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from downloads import (
    DOWNLOADS,
    SHAPE,
    acdc_download,
    as_image,
    blob,
    la_download,
    la_h5_download,
    load,
    names,
    pancreas_download,
    save,
    stamps,
    volume,
)

from nnunet_ssl.data.conversion import BENCHMARKS, convert_dataset, write_folds
from nnunet_ssl.data.splits import write_splits
from nnunet_ssl.errors import UserError


@pytest.fixture(autouse=True)
def same_locale():
    """Writing DICOM files sets the process's locale to C, and later tests read what is not ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "nnUNet_raw" / "Dataset042_Benchmark"


def test_an_interrupted_conversion_goes_on(tmp_path, raw, monkeypatch) -> None:
    source = la_download(tmp_path / "download")
    whole = BENCHMARKS["la"]

    def interrupted(case, images, label):
        if case.name == "CASE03":
            images[0].write_bytes(b"half a file")
            raise KeyboardInterrupt
        return whole.write(case, images, label)

    monkeypatch.setitem(BENCHMARKS, "la", dataclasses.replace(whole, write=interrupted))
    with pytest.raises(KeyboardInterrupt):
        convert_dataset("la", source, raw, labeled="1")
    assert names(raw / "imagesTr") == [f"CASE{number:02d}_0000.nii.gz" for number in range(3)]
    assert not (raw / "dataset.json").exists()
    before = stamps(raw)
    monkeypatch.setitem(BENCHMARKS, "la", whole)
    # As a kill between the two files of a case leaves it, and one within a case.
    (raw / "labelsTr" / "CASE02.nii.gz").unlink()
    (raw / ".unfinished").mkdir()
    (raw / ".unfinished" / "CASE03_0000.nii.gz").write_bytes(b"half a file")
    report = convert_dataset("la", source, raw, labeled="1")
    assert report.written == 6 and len(report.train) == 6 and report.failed == []
    after = stamps(raw)
    kept = [name for name in before if "CASE02" not in name]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    np.testing.assert_array_equal(load(raw / "imagesTr" / "CASE03_0000.nii.gz"), volume(3))
    assert not (raw / ".unfinished").exists()


def test_a_full_disk_is_not_a_bad_case(tmp_path, raw, monkeypatch) -> None:
    source = la_download(tmp_path / "download")
    whole, written = BENCHMARKS["la"], []

    def full(case, images, label):
        written.append(case.name)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole.write(case, images, label)

    monkeypatch.setitem(BENCHMARKS, "la", dataclasses.replace(whole, write=full))
    with pytest.raises(UserError, match=r"could not be written.*No space left"):
        convert_dataset("la", source, raw, labeled="1")
    assert not (raw / "dataset.json").exists()
    report = convert_dataset("la", source, raw, labeled="1")
    assert not report.failed and report.written == len(report.train) + len(report.test) - 2


@pytest.mark.parametrize("name", ["dataset.json", "conversion_notes.json"])
def test_a_disk_that_is_full_at_the_end(name, tmp_path, raw, monkeypatch) -> None:
    source = la_download(tmp_path / "download")
    whole, replace = BENCHMARKS["la"], Path.replace
    noted = dataclasses.replace(whole, write=lambda *case: whole.write(*case) or "a note")
    monkeypatch.setitem(BENCHMARKS, "la", noted)

    def full(file, target):
        if target.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(file, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(UserError, match=r"written to.*No space left.*run the command again"):
            convert_dataset("la", source, raw, labeled="1")
    assert not (raw / "dataset.json").exists() and not (raw / ".unfinished").exists()
    report = convert_dataset("la", source, raw, labeled="1")
    assert not report.failed
    assert sorted(one.identifier for one in report.notes) == sorted(report.train + report.test)


def test_a_broken_disk_under_the_download_is_named(tmp_path, raw, monkeypatch) -> None:
    source = la_download(tmp_path / "download")

    def broken(case, images, label):
        raise OSError(errno.EIO, "Input/output error", str(case.images[0]))

    monkeypatch.setitem(BENCHMARKS, "la", dataclasses.replace(BENCHMARKS["la"], write=broken))
    with pytest.raises(UserError, match=r"lgemri\.nrrd cannot be read.*Input/output error.*its disk"):
        convert_dataset("la", source, raw, labeled="1")


def test_bad_cases_are_named_and_the_good_ones_go_on(tmp_path, raw) -> None:
    source = la_download(tmp_path / "download", train=12)
    folder = source / "Training Set"
    (folder / "CASE00" / "lgemri.nrrd").write_bytes(b"NRRD0004\nno image")
    (folder / "CASE01" / "laendo.nrrd").unlink()
    save(as_image(blob(value=7)), folder / "CASE02" / "laendo.nrrd")
    save(as_image(np.zeros(SHAPE, np.uint8)), folder / "CASE03" / "laendo.nrrd")
    save(as_image(blob(shape=(6, 7, 9), value=255)), folder / "CASE04" / "laendo.nrrd")
    (folder / "CASE05").rename(folder / "CASE 5")
    save(as_image(volume(6)), source / "copies" / "CASE06" / "lgemri.nrrd")
    report = convert_dataset("la", source, raw, labeled="1")
    reasons = {problem.identifier: problem.reason for problem in report.failed}
    assert list(reasons) == ["CASE 5", *(f"CASE{number:02d}" for number in (0, 1, 2, 3, 4, 6))]
    expected = {"CASE 5": "characters", "CASE01": "no label", "CASE02": "value", "CASE03": "empty", "CASE04": "voxels"}
    for case, words in {**expected, "CASE06": "found 2 times"}.items():
        assert words in reasons[case]
    assert report.train == ["CASE07", "CASE08", "CASE09", "CASE10", "CASE11"] and len(report.test) == 2
    assert json.loads((raw / "dataset.json").read_text())["numTraining"] == 5
    # Mended, a case is added; the others are left alone.
    save(as_image(blob(1, 255), (0.625, 0.625, 1.25)), folder / "CASE01" / "laendo.nrrd")
    again = convert_dataset("la", source, raw, labeled="1")
    assert again.written == 1 and again.train == ["CASE01", *report.train]
    assert json.loads((raw / "dataset.json").read_text())["numTraining"] == 6


def test_what_is_left_of_a_bad_case_is_removed(tmp_path, raw) -> None:
    source = la_download(tmp_path / "download", train=7)
    convert_dataset("la", source, raw, labeled="1")
    (raw / "labelsTr" / "CASE00.nii.gz").unlink()
    (source / "Training Set" / "CASE00" / "laendo.nrrd").write_bytes(b"damaged")
    report = convert_dataset("la", source, raw, labeled="1")
    assert [problem.identifier for problem in report.failed] == ["CASE00"]
    assert not list(raw.rglob("CASE00*"))


def test_a_folder_with_other_content_is_not_touched(tmp_path, raw) -> None:
    source = la_download(tmp_path / "download")
    (raw / "imagesTr").mkdir(parents=True)
    (raw / "imagesTr" / "mine_0000.nii.gz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"not made by nnunet-ssl convert.*Choose another"):
        convert_dataset("la", source, raw, labeled="1")
    assert names(raw) == ["imagesTr"] and names(raw / "imagesTr") == ["mine_0000.nii.gz"]


def test_two_downloads_are_not_mixed(tmp_path, raw) -> None:
    convert_dataset("la", la_download(tmp_path / "download"), raw, labeled="1")
    before = stamps(raw)
    with pytest.raises(UserError, match="converted from something else"):
        convert_dataset("la", la_h5_download(tmp_path / "h5"), raw, labeled="1")
    listed = tmp_path / "test.txt"
    listed.write_text("CASE00\n")
    with pytest.raises(UserError, match="another list"):
        convert_dataset("la", tmp_path / "download", raw, labeled="1", test_list=listed)
    assert stamps(raw) == before


@pytest.mark.parametrize(
    ("labeled", "message"), [("9", "Asked for 9"), ("few", "'few'"), ("0", "'0'"), ("200%", "Asked for 200%")]
)
def test_impossible_numbers_are_found_before_converting(labeled, message, tmp_path, raw) -> None:
    with pytest.raises(UserError, match=message):
        convert_dataset("la", la_download(tmp_path / "download"), raw, labeled=labeled)
    assert not raw.exists()


def test_too_few_cases_and_empty_folders(tmp_path, raw) -> None:
    with pytest.raises(UserError, match="at least 5"):
        convert_dataset("la", la_download(tmp_path / "download", train=4), raw, labeled="1")
    (tmp_path / "empty").mkdir()
    for kind in BENCHMARKS:
        with pytest.raises(UserError, match=r"No case found.*should contain"):
            convert_dataset(kind, tmp_path / "empty", raw, labeled="1")
    with pytest.raises(UserError, match="is not a folder"):
        convert_dataset("la", tmp_path / "nowhere", raw, labeled="1")
    assert not raw.exists()


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("pancreas", "TCIA_pancreas_labels-02-05-2017"), ("isic2018", "ISIC2018_Task1_Training_GroundTruth")],
)
def test_labels_that_were_not_downloaded(kind, labels, tmp_path, raw) -> None:
    source = DOWNLOADS[kind](tmp_path / "download")
    shutil.rmtree(source / labels)
    with pytest.raises(UserError, match=r"found 0\. Cases left out: ., the first .* no label .* should contain"):
        convert_dataset(kind, source, raw, labeled="1")


@pytest.mark.parametrize(("kind", "part"), [("acdc", "database/testing"), ("la", "Testing Set")])
def test_test_cases_alone_do_not_become_training_cases(kind, part, tmp_path, raw) -> None:
    download = {"acdc": acdc_download, "la": la_download}[kind](tmp_path / "download", train=1, test=6)
    with pytest.raises(UserError, match=r"All cases in .* are test cases.* Give the folder above"):
        convert_dataset(kind, download / part, raw, labeled="1")
    assert not raw.exists()


@pytest.mark.parametrize("name", ["test", "Testing Set", "test_downloads"])
@pytest.mark.parametrize(("kind", "train", "test"), [("la", 6, 2), ("acdc", 12, 4)])
def test_a_download_may_be_called_test(kind, train, test, name, tmp_path, raw) -> None:
    report = convert_dataset(kind, DOWNLOADS[kind](tmp_path / name), raw, labeled="1")
    assert (len(report.train), len(report.test)) == (train, test)


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_linked_parts_of_a_download_are_like_others(kind, tmp_path, raw) -> None:
    real = DOWNLOADS[kind](tmp_path / "real")
    expected = convert_dataset(kind, real, raw, labeled="1")
    linked = tmp_path / "linked"
    linked.mkdir()
    for part in real.iterdir():
        (linked / part.name).symlink_to(part)
    (linked / "round").symlink_to(linked)
    found = convert_dataset(kind, linked, tmp_path / "again", labeled="1")
    assert (found.train, found.test, found.failed) == (expected.train, expected.test, [])


def test_a_linked_test_folder_stays_one(tmp_path, raw) -> None:
    la_download(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a").symlink_to(tmp_path / "real" / "Training Set")
    (linked / "b").symlink_to(tmp_path / "real" / "Testing Set")
    report = convert_dataset("la", linked, raw, labeled="1")
    assert (len(report.train), len(report.test)) == (6, 2)


def test_linked_dicom_folders_are_read(tmp_path, raw) -> None:
    source = pancreas_download(tmp_path / "download")
    (tmp_path / "real").mkdir()
    for name in ("PANCREAS_0001", "PANCREAS_0002/11-24-2015-Pancreas"):
        part = source / "Pancreas-CT" / name
        part.rename(tmp_path / "real" / part.name)
        part.symlink_to(tmp_path / "real" / part.name)
    assert len(convert_dataset("pancreas", source, raw, labeled="1").train) == 5


def test_a_list_that_cannot_be_read_and_a_folder_that_cannot_be_made(tmp_path, raw) -> None:
    source, listed = la_download(tmp_path / "download"), tmp_path / "papers.txt"
    listed.write_bytes(b"CASE01\xff")
    with pytest.raises(UserError, match=r"cannot be read.*Give a text file \(UTF-8\)"):
        convert_dataset("la", source, raw, labeled="1", test_list=listed)
    with pytest.raises(UserError, match=r"cannot be made or written to.*Check free space and permissions"):
        convert_dataset("la", source, listed / raw.name, labeled="1")
    with pytest.raises(UserError, match=r"splits_final\.json cannot be written.*Check free space and permissions"):
        write_splits(listed / raw.name / "splits_final.json", [])


def refused(*arguments: object, **options: object) -> None:
    raise PermissionError(13, "Permission denied", "CASE00")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, raw, monkeypatch) -> None:
    source = la_download(tmp_path / "download")
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"CASE00 cannot be read: Permission denied\. Check its permissions"):
        convert_dataset("la", source, raw, labeled="1")


def test_a_file_that_may_not_be_read_is_not_one_that_cannot_be_written(tmp_path, raw, monkeypatch) -> None:
    source = la_h5_download(tmp_path / "download")
    closed = next(source.rglob("CASE00")) / "mri_norm2.h5"
    monkeypatch.setattr(h5py, "File", refused)
    access = os.access
    monkeypatch.setattr(os, "access", lambda file, mode: access(file, mode) and not (mode and file == closed.resolve()))
    with pytest.raises(UserError, match=r"CASE00/mri_norm2\.h5 cannot be read.*it continues with CASE00"):
        convert_dataset("la", source, raw, labeled="1")


def test_folds_are_repeated_and_never_replaced(tmp_path) -> None:
    cases = [f"CASE{number:02d}" for number in range(10)]
    options = {"kind": "la", "dataset_folder": tmp_path, "preprocessed_folder": tmp_path / "p", "cases": cases}
    file, few = write_folds(**options, labeled="2", seed=0)
    stamp = file.stat().st_mtime_ns
    assert write_folds(**options, labeled="2", seed=0) == (file, few) and file.stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="other folds"):
        write_folds(**options, labeled="3", seed=0)
    assert json.loads(file.read_text()) == few
    file.unlink()
    _, more = write_folds(**options, labeled="50%", seed=0)
    for small, large in zip(few, more, strict=True):
        assert set(small["train"]) < set(large["train"]) and small["val"] == large["val"] and len(large["train"]) == 4
