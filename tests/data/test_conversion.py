"""Benchmark datasets: small files laid out as each official download, converted, and read as nnU-Net reads them."""

from __future__ import annotations

import dataclasses
import errno
import json
import locale
import multiprocessing
import multiprocessing.pool
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.utilities import utils
from skimage import io

from nnunet_ssl.cli.convert import DATASETS
from nnunet_ssl.data.conversion import BENCHMARKS, convert_dataset, write_folds
from nnunet_ssl.data.conversion.pancreas import match_label
from nnunet_ssl.data.splits import write_splits
from nnunet_ssl.errors import UserError

SHAPE = (5, 7, 9)  # (Z, Y, X), no two axes alike


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.int16)


def blob(seed: int = 0, value: int = 1, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A box at one corner, so that no flip leaves it as it is."""
    label = np.zeros(shape, np.uint8)
    label[0:2, 1:3, 2 + seed % 2 : 5] = value
    return label


def as_image(array: np.ndarray, spacing=(0.7, 0.8, 2.0), origin=(-30.0, -40.0, 100.0), direction=None) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    return image


def save(image: sitk.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def load(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def center(image: sitk.Image) -> np.ndarray:
    """Where the middle of a mask's foreground is, in the patient (mm)."""
    index = np.argwhere(sitk.GetArrayFromImage(image) > 0).mean(axis=0)[::-1]
    return np.array(image.TransformContinuousIndexToPhysicalPoint([float(value) for value in index]))


# --- The downloads ----------------------------------------------------------------------------------------------------


def la_download(folder: Path, train: int = 6, test: int = 2) -> Path:
    for number in range(train + test):
        case = folder / ("Training Set" if number < train else "Testing Set") / f"CASE{number:02d}"
        save(as_image(volume(number).astype(np.uint8), (0.625, 0.625, 1.25)), case / "lgemri.nrrd")
        save(as_image(blob(number, 255), (0.625, 0.625, 1.25)), case / "laendo.nrrd")
    return folder


def la_h5_download(folder: Path, cases: int = 7, tested: tuple[int, ...] = (1, 4)) -> Path:
    names = [f"CASE{number:02d}" for number in range(cases)]
    for number, name in enumerate(names):
        file = folder / "2018LA_Seg_Training Set" / name / "mri_norm2.h5"
        file.parent.mkdir(parents=True)
        with h5py.File(file, "w") as opened:
            # (X, Y, Z)
            opened["image"] = volume(number).transpose(2, 1, 0).astype(np.float32)
            opened["label"] = blob(number).transpose(2, 1, 0)
    lists = {"test": [names[number] for number in tested], "train": [n for i, n in enumerate(names) if i not in tested]}
    for name, listed in lists.items():
        (folder / f"{name}.list").write_text("\n".join(listed) + "\n")
    return folder


def write_series(image: sitk.Image, folder: Path) -> None:
    """A CT series as a scanner stores it, its files not in the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    direction = image.GetDirection()
    orientation = "\\".join(f"{direction[index]:g}" for index in (0, 3, 6, 1, 4, 7))
    count = image.GetDepth()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index in range(count):
        one = image[:, :, index]
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.2.{index + 1}",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.2",
            "0020|0013": str(count - index),
            "0020|0032": "\\".join(f"{value:g}" for value in image.TransformIndexToPhysicalPoint((0, 0, index))),
            "0020|0037": orientation,
            "0018|0050": f"{image.GetSpacing()[2]:g}",
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            one.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"1-{count - index:03d}.dcm"))
        writer.Execute(one)


def pancreas_download(folder: Path, cases: int = 5) -> Path:
    for number in range(1, cases + 1):
        inner = folder / "Pancreas-CT" / f"PANCREAS_{number:04d}" / "11-24-2015-Pancreas" / "Pancreas-1"
        write_series(as_image(volume(number)), inner)
        # As the labels are: stored as the slices are, with a header that places them elsewhere.
        label = as_image(blob(number), origin=(0.0, 0.0, 0.0))
        save(label, folder / "TCIA_pancreas_labels-02-05-2017" / f"label{number:04d}.nii.gz")
    return folder


def acdc_download(folder: Path, train: int = 6, test: int = 2) -> Path:
    for number in range(1, train + test + 1):
        patient = f"patient{number:03d}"
        inner = folder / "database" / ("training" if number <= train else "testing") / patient
        inner.mkdir(parents=True)
        (inner / "Info.cfg").write_text("ED: 1\nES: 12\n")
        save(as_image(volume(number)), inner / f"{patient}_4d.nii.gz")
        for frame in ("01", "12"):
            save(as_image(volume(number)), inner / f"{patient}_frame{frame}.nii.gz")
            save(as_image(blob(number, 3)), inner / f"{patient}_frame{frame}_gt.nii.gz")
    return folder


def brats_download(folder: Path, cases: int = 6, ending: str = ".nii") -> Path:
    for number in range(cases):
        name = f"BraTS19_CBICA_A{number:02d}_1"
        inner = folder / "MICCAI_BraTS_2019_Data_Training" / ("HGG" if number % 2 else "LGG") / name
        for channel, sequence in enumerate(("t1", "t1ce", "t2", "flair")):
            save(as_image(volume(10 * number + channel)), inner / f"{name}_{sequence}{ending}")
        label = blob()
        label[3, 0, :4] = (0, 1, 2, 4)
        save(as_image(label.astype(np.int16)), inner / f"{name}_seg{ending}")
    name = "BraTS19_WashU_S037_1"
    for sequence in ("t1", "t1ce", "t2", "flair"):
        save(as_image(volume(1)), folder / "MICCAI_BraTS_2019_Data_Validation" / name / f"{name}_{sequence}{ending}")
    return folder


def isic_download(folder: Path, train: int = 6, test: int = 2) -> Path:
    for number in range(train + test + 1):
        part = "Training" if number < train else "Test" if number < train + test else "Validation"
        inputs, masks = folder / f"ISIC2018_Task1-2_{part}_Input", folder / f"ISIC2018_Task1_{part}_GroundTruth"
        inputs.mkdir(parents=True, exist_ok=True)
        masks.mkdir(exist_ok=True)
        (inputs / "LICENSE.txt").write_text("CC-0")
        pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3)).astype(np.uint8)
        io.imsave(inputs / f"ISIC_{number:07d}.jpg", pixels, check_contrast=False)
        mask = np.zeros((20, 30), np.uint8)
        mask[2:9, 3:11] = 255
        io.imsave(masks / f"ISIC_{number:07d}_segmentation.png", mask, check_contrast=False)
    return folder


DOWNLOADS = {
    "la": la_download,
    "pancreas": pancreas_download,
    "acdc": acdc_download,
    "brats19": brats_download,
    "isic2018": isic_download,
}


@pytest.fixture(autouse=True)
def same_locale():
    """Writing DICOM files sets the process's locale to C, and later tests read what is not ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "nnUNet_raw" / "Dataset042_Benchmark"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def stamps(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


# --- All of them ------------------------------------------------------------------------------------------------------


def test_the_command_offers_these_datasets() -> None:
    assert DATASETS == tuple(BENCHMARKS) == tuple(DOWNLOADS)


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_nnunet_accepts_the_dataset(kind, tmp_path, raw, monkeypatch) -> None:
    report = convert_dataset(kind, DOWNLOADS[kind](tmp_path / "download"), raw, labeled="1")
    assert report.failed == [] and report.written == len(report.train) + len(report.test)
    # In threads: new processes would each import torch first.
    threads = multiprocessing.pool.ThreadPool
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=threads))
    monkeypatch.setattr(utils, "Pool", threads)
    verify_dataset_integrity(str(raw), num_processes=1)
    assert not list(raw.glob(".unfinished"))


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_test_cases_are_in_no_fold(kind, tmp_path, raw) -> None:
    report = convert_dataset(kind, DOWNLOADS[kind](tmp_path / "download"), raw, labeled="2")
    file, folds = write_folds(kind, raw, tmp_path / "preprocessed", report.train, labeled="2", seed=0)
    assert json.loads(file.read_text()) == folds and len(folds) == 5
    for fold in folds:
        assert sorted(case for cases in fold.values() for case in cases) == sorted(report.train)
        assert len({BENCHMARKS[kind].group(case) for case in fold["train"]}) == 2
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(report.train)
    assert not set(report.train) & set(report.test)
    labels = {file.name.split(".")[0] for file in (raw / "labelsTr").iterdir()}
    assert labels == set(report.train), "labels stay; the fold's list hides them"


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_a_second_run_writes_nothing(kind, tmp_path, raw) -> None:
    source = DOWNLOADS[kind](tmp_path / "download")
    first = convert_dataset(kind, source, raw, labeled="1")
    before = {name: stamp for name, stamp in stamps(raw).items() if name != "dataset.json"}
    second = convert_dataset(kind, source, raw, labeled="1")
    assert (second.train, second.test, second.written) == (first.train, first.test, 0)
    assert {name: stamp for name, stamp in stamps(raw).items() if name != "dataset.json"} == before


# --- Left atrium ------------------------------------------------------------------------------------------------------


def test_left_atrium_from_the_original_files(tmp_path, raw) -> None:
    report = convert_dataset("la", la_download(tmp_path / "download"), raw, labeled="1")
    assert report.train == [f"CASE{number:02d}" for number in range(6)] and report.test == ["CASE06", "CASE07"]
    assert names(raw / "labelsTs") == ["CASE06.nii.gz", "CASE07.nii.gz"]
    image = sitk.ReadImage(str(raw / "imagesTr" / "CASE03_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume(3))
    np.testing.assert_allclose(image.GetSpacing(), (0.625, 0.625, 1.25))
    np.testing.assert_allclose(image.GetOrigin(), (-30, -40, 100))
    np.testing.assert_array_equal(load(raw / "labelsTr" / "CASE03.nii.gz"), blob(3))
    description = json.loads((raw / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "left atrium": 1} and description["numTraining"] == 6


@pytest.mark.parametrize("inner", ["", "2018LA_Seg_Training Set"])
def test_left_atrium_from_h5_files(inner, tmp_path, raw) -> None:
    report = convert_dataset("la", la_h5_download(tmp_path / "download") / inner, raw, labeled="1")
    assert report.test == ["CASE01", "CASE04"], "those of test.list"
    assert str(tmp_path / "download" / "test.list") in report.remarks[0]
    image = sitk.ReadImage(str(raw / "imagesTs" / "CASE04_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume(4))
    np.testing.assert_allclose(image.GetSpacing(), [0.625] * 3)
    np.testing.assert_array_equal(load(raw / "labelsTr" / "CASE02.nii.gz"), blob(2))


def test_h5_files_without_a_list_are_all_training_cases(tmp_path, raw) -> None:
    source = la_h5_download(tmp_path / "download")
    (source / "test.list").unlink()
    report = convert_dataset("la", source, raw, labeled="1")
    assert len(report.train) == 7 and "No test.list" in report.remarks[0]


def test_original_files_come_before_h5_files(tmp_path, raw) -> None:
    source = la_download(tmp_path / "download")
    (source / "Training Set" / "CASE00" / "mri_norm2.h5").write_bytes(b"made from the files beside it")
    report = convert_dataset("la", source, raw, labeled="1")
    assert report.failed == [] and "CASE00" in report.train


def test_h5_files_need_h5py(tmp_path, raw, monkeypatch) -> None:
    source = la_h5_download(tmp_path / "download")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r'pip install "nnunet-ssl\[h5\]"'):
        convert_dataset("la", source, raw, labeled="1")
    assert not raw.exists()


def test_an_h5_file_without_arrays_is_left_out(tmp_path, raw) -> None:
    source = la_h5_download(tmp_path / "download")
    folder = source / "2018LA_Seg_Training Set"
    with h5py.File(folder / "CASE00" / "mri_norm2.h5", "w") as opened:
        opened["image"] = np.zeros((3, 3))
    (folder / "CASE02" / "mri_norm2.h5").write_bytes(b"no h5 file")
    report = convert_dataset("la", source, raw, labeled="1")
    assert [problem.identifier for problem in report.failed] == ["CASE00", "CASE02"]
    assert report.failed[0].reason == "mri_norm2.h5 has no three-dimensional array 'image'"


# --- Lists of test cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["../CASE01", "/etc/passwd", "..", "CASE01/../../x", "CASE99", "CASE 01"])
def test_a_list_cannot_name_anything_but_cases(line, tmp_path, raw) -> None:
    source = la_h5_download(tmp_path / "download")
    (source / "test.list").write_text(f"CASE04\n{line}\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"test\.list names"):
        convert_dataset("la", source, raw, labeled="1")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "lines", "held_out"),
    [
        ("la", "CASE01\n\nCASE02/mri_norm2.h5\n", {"CASE01", "CASE02"}),
        ("pancreas", "image0002\n", {"PANCREAS_0002"}),
        ("pancreas", "0003.h5\n", {"PANCREAS_0003"}),
        ("acdc", "patient002_frame01\npatient002_frame02\n", {"patient002_frame01", "patient002_frame12"}),
        ("brats19", "BraTS19_CBICA_A03_1\n", {"BraTS19_CBICA_A03_1"}),
        ("isic2018", "ISIC_0000001\n", {"ISIC_0000001"}),
    ],
)
def test_listed_cases_are_held_out(kind, lines, held_out, tmp_path, raw) -> None:
    source = pancreas_download(tmp_path / "d", 6) if kind == "pancreas" else DOWNLOADS[kind](tmp_path / "d", 7)
    listed = tmp_path / "papers.txt"
    listed.write_text(lines)
    report = convert_dataset(kind, source, raw, labeled="1", test_list=listed)
    assert held_out <= set(report.test) and not held_out & set(report.train)
    ending = BENCHMARKS[kind].file_ending
    for case in held_out:
        assert (raw / "labelsTs" / f"{case}{ending}").is_file()
        assert not list((raw / "imagesTr").glob(f"{case}*")) and not (raw / "labelsTr" / f"{case}{ending}").exists()


# --- Pancreas ---------------------------------------------------------------------------------------------------------


def test_pancreas_from_dicom(tmp_path, raw) -> None:
    report = convert_dataset("pancreas", pancreas_download(tmp_path / "download"), raw, labeled="1")
    assert report.train == [f"PANCREAS_{number:04d}" for number in range(1, 6)] and report.test == []
    image = sitk.ReadImage(str(raw / "imagesTr" / "PANCREAS_0002_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume(2))
    np.testing.assert_allclose(image.GetSpacing(), (0.7, 0.8, 2.0), rtol=1e-5)
    np.testing.assert_allclose(image.GetOrigin(), (-30, -40, 100), rtol=1e-5)
    label = sitk.ReadImage(str(raw / "labelsTr" / "PANCREAS_0002.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), blob(2))
    np.testing.assert_allclose(center(label), center(as_image(blob(2))), atol=1e-4)
    assert len(report.notes) == 5 and "header does not fit" in report.notes[0].reason
    again = convert_dataset("pancreas", tmp_path / "download", raw, labeled="1")
    assert again.written == 0 and again.notes == report.notes, "said again by a run that converts nothing"


FLIPS = [(x, y, z) for x in (1, -1) for y in (1, -1) for z in (1, -1)]


@pytest.mark.parametrize("flips", FLIPS)
def test_a_label_whose_header_fits_is_placed_by_it(flips) -> None:
    """Whatever the order in which its voxels are stored."""
    scan, label = as_image(volume(1)), as_image(blob())
    stored = sitk.Flip(label, [flip < 0 for flip in flips])
    matched, note = match_label(scan, stored)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(matched), blob())
    assert note == "" and matched.GetOrigin() == scan.GetOrigin()


@pytest.mark.parametrize("flips", FLIPS)
def test_a_label_whose_header_does_not_fit_is_taken_as_stored(flips) -> None:
    """Whatever its header says: no origin, or rows turned round."""
    direction = np.diag(flips).astype(float).ravel().tolist()
    stored = as_image(blob(), origin=(0.0, 0.0, 0.0), direction=direction)
    matched, note = match_label(as_image(volume(1)), stored)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(matched), blob())
    assert "order of the DICOM slices" in note
    np.testing.assert_allclose(center(matched), center(as_image(blob())), atol=1e-4)


@pytest.mark.parametrize("flips", FLIPS)
def test_scans_that_are_nifti_already_may_be_stored_in_any_order(flips, tmp_path, raw) -> None:
    """dcm2niix, for one, turns the rows round."""
    source = tmp_path / "download"
    for number in range(1, 6):
        scan = sitk.Flip(as_image(volume(number)), [flip < 0 for flip in flips])
        save(scan, source / "data" / (f"PANCREAS_{number:04d}.nii.gz" if number % 2 else f"image{number:04d}.nii.gz"))
        save(as_image(blob(number), origin=(0.0, 0.0, 0.0)), source / "labels" / f"label{number:04d}.nii.gz")
    report = convert_dataset("pancreas", source, raw, labeled="1")
    assert report.failed == []
    for number in range(1, 6):
        np.testing.assert_array_equal(load(raw / "imagesTr" / f"PANCREAS_{number:04d}_0000.nii.gz"), volume(number))
        label = sitk.ReadImage(str(raw / "labelsTr" / f"PANCREAS_{number:04d}.nii.gz"))
        np.testing.assert_allclose(center(label), center(as_image(blob(number))), atol=1e-4)


def test_pancreas_cases_that_cannot_be_reconciled_are_named(tmp_path, raw) -> None:
    source = pancreas_download(tmp_path / "download", cases=10)
    labels, scans = source / "TCIA_pancreas_labels-02-05-2017", source / "Pancreas-CT"
    save(as_image(blob(shape=(5, 7, 8))), labels / "label0001.nii.gz")
    save(as_image(blob(), spacing=(0.7, 0.8, 1.0)), labels / "label0002.nii.gz")
    air = volume(3)
    air[blob(3) > 0] = -1000
    write_series(as_image(air), scans / "PANCREAS_0003" / "11-24-2015-Pancreas" / "Pancreas-1")
    (labels / "label0004.nii.gz").unlink()
    missing = scans / "PANCREAS_0005" / "11-24-2015-Pancreas" / "Pancreas-1"
    next(missing.glob("*-003.dcm")).unlink()
    report = convert_dataset("pancreas", source, raw, labeled="1")
    reasons = {problem.identifier: problem.reason for problem in report.failed}
    assert list(reasons) == [f"PANCREAS_{number:04d}" for number in range(1, 6)]
    for number, words in enumerate(["voxels", "spacing", "lies in air", "no label", "missing"], start=1):
        assert words in reasons[f"PANCREAS_{number:04d}"]
    assert report.train == [f"PANCREAS_{number:04d}" for number in range(6, 11)]
    assert names(raw / "labelsTr") == [f"PANCREAS_{number:04d}.nii.gz" for number in range(6, 11)]


# --- ACDC, BraTS, ISIC ------------------------------------------------------------------------------------------------


def test_acdc_keeps_patients_together_and_brings_test_labels(tmp_path, raw) -> None:
    source = acdc_download(tmp_path / "download")
    report = convert_dataset("acdc", source, raw, labeled="2")
    assert len(report.train) == 12 and names(raw / "labelsTs")[0] == "patient007_frame01.nii.gz"
    original = source / "database" / "training" / "patient003" / "patient003_frame12_gt.nii.gz"
    assert (raw / "labelsTr" / "patient003_frame12.nii.gz").read_bytes() == original.read_bytes()
    assert not list(raw.rglob("*4d*"))
    _, folds = write_folds("acdc", raw, tmp_path / "preprocessed", report.train, labeled="2", seed=1)
    for fold in folds:
        patients = {name: {case[:10] for case in cases} for name, cases in fold.items()}
        assert len(patients["train"]) == 2 and len(fold["train"]) == 4
        assert not patients["train"] & patients["unlabeled"] and not patients["train"] & patients["val"]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_brats_channels_and_labels(ending, tmp_path, raw) -> None:
    report = convert_dataset("brats19", brats_download(tmp_path / "download", ending=ending), raw, labeled="1")
    assert len(report.train) == 6 and report.test == ["BraTS19_WashU_S037_1"]
    assert len(names(raw / "imagesTs")) == 4 and not (raw / "labelsTs").exists()
    for channel in range(4):
        image = load(raw / "imagesTr" / f"BraTS19_CBICA_A02_1_{channel:04d}.nii.gz")
        np.testing.assert_array_equal(image, volume(20 + channel))
    label = load(raw / "labelsTr" / "BraTS19_CBICA_A02_1.nii.gz")
    # Edema 2 becomes 1, necrosis 1 becomes 2, enhancing tumor 4 becomes 3, as nnU-Net's regions expect.
    np.testing.assert_array_equal(label[3, 0, :4], (0, 2, 1, 3))


def test_brats_cases_with_missing_files_or_unknown_labels(tmp_path, raw) -> None:
    source = brats_download(tmp_path / "download", cases=8)
    training = source / "MICCAI_BraTS_2019_Data_Training"
    next(training.rglob("BraTS19_CBICA_A00_1_t2.nii")).unlink()
    next(training.rglob("BraTS19_CBICA_A01_1_seg.nii")).unlink()
    save(as_image(blob(value=7)), training / "LGG" / "BraTS19_CBICA_A02_1" / "BraTS19_CBICA_A02_1_seg.nii")
    report = convert_dataset("brats19", source, raw, labeled="1")
    reasons = {problem.identifier[-5:-2]: problem.reason for problem in report.failed}
    assert list(reasons) == ["A00", "A01", "A02"]
    assert "t2" in reasons["A00"] and "no label" in reasons["A01"]
    assert reasons["A02"] == "BraTS19_CBICA_A02_1_seg.nii has the value 7; expected 0, 1, 2, 4"


def test_brats_channels_must_have_one_spacing(tmp_path, raw) -> None:
    """nnU-Net reads no case whose channels differ, be it by rounding."""
    source = brats_download(tmp_path / "download", cases=7)
    for number, spacing in ((0, (1.0, 1.0, 1.0)), (1, (0.7 + 1e-5, 0.8, 2.0))):
        file = next(source.rglob(f"BraTS19_CBICA_A{number:02d}_1_t2.nii"))
        image = sitk.ReadImage(str(file))
        image.SetSpacing(spacing)
        save(image, file)
    report = convert_dataset("brats19", source, raw, labeled="1")
    (failed,) = report.failed
    assert failed.identifier == "BraTS19_CBICA_A00_1" and "BraTS19_CBICA_A00_1_t2.nii's 1 x 1 x 1 mm" in failed.reason
    files = sorted((raw / "imagesTr").glob("BraTS19_CBICA_A01_1_*"))
    assert len({sitk.ReadImage(str(file)).GetSpacing() for file in files}) == 1


def test_isic_pixels_are_those_of_the_jpeg(tmp_path, raw) -> None:
    source = isic_download(tmp_path / "download")
    report = convert_dataset("isic2018", source, raw, labeled="1")
    assert report.train == [f"ISIC_{number:07d}" for number in range(6)] and report.test[0] == "ISIC_0000006"
    assert "validation" in report.remarks[0] and not list(raw.rglob("ISIC_0000008*"))
    read, _ = NaturalImage2DIO().read_images([str(raw / "imagesTr" / "ISIC_0000002_0000.png")])
    decoded = io.imread(source / "ISIC2018_Task1-2_Training_Input" / "ISIC_0000002.jpg")
    assert read.shape == (3, 1, 20, 30)
    np.testing.assert_array_equal(read[:, 0].transpose(1, 2, 0), decoded)
    mask = io.imread(raw / "labelsTr" / "ISIC_0000002.png")
    assert mask.sum() == 7 * 8 and mask[2:9, 3:11].all()


def test_isic_images_cut_short_are_left_out(tmp_path, raw) -> None:
    source = isic_download(tmp_path / "download", train=8)
    inputs, masks = source / "ISIC2018_Task1-2_Training_Input", source / "ISIC2018_Task1_Training_GroundTruth"
    jpeg = inputs / "ISIC_0000000.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    io.imsave(masks / "ISIC_0000001_segmentation.png", np.full((5, 5), 255, np.uint8), check_contrast=False)
    report = convert_dataset("isic2018", source, raw, labeled="1")
    assert [problem.identifier for problem in report.failed] == ["ISIC_0000000", "ISIC_0000001"]


# --- Interrupted, repeated, mixed up ----------------------------------------------------------------------------------


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
        with pytest.raises(UserError, match=r"No case found.*should hold"):
            convert_dataset(kind, tmp_path / "empty", raw, labeled="1")
    with pytest.raises(UserError, match="is no folder"):
        convert_dataset("la", tmp_path / "nowhere", raw, labeled="1")
    assert not raw.exists()


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("pancreas", "TCIA_pancreas_labels-02-05-2017"), ("isic2018", "ISIC2018_Task1_Training_GroundTruth")],
)
def test_labels_that_were_not_downloaded(kind, labels, tmp_path, raw) -> None:
    source = DOWNLOADS[kind](tmp_path / "download")
    shutil.rmtree(source / labels)
    with pytest.raises(UserError, match=r"found 0\. Cases left out: ., the first .* no label .* should hold"):
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
    with pytest.raises(UserError, match=r"CASE00/mri_norm2\.h5 cannot be read.*it goes on with CASE00"):
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
