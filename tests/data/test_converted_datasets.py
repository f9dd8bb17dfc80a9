"""What each public dataset becomes: its files, labels and folds."""

from __future__ import annotations

import json
import locale
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from downloads import (
    DOWNLOADS,
    acdc_download,
    as_image,
    blob,
    brats_download,
    isic_download,
    la_download,
    la_h5_download,
    load,
    names,
    pancreas_download,
    save,
    volume,
    write_series,
)
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from skimage import io

from nnunet_ssl.data.conversion import BENCHMARKS, convert_dataset, write_folds
from nnunet_ssl.data.conversion.pancreas import match_label
from nnunet_ssl.errors import UserError


def center(image: sitk.Image) -> np.ndarray:
    """Where the middle of a mask's foreground is, in the patient (mm)."""
    index = np.argwhere(sitk.GetArrayFromImage(image) > 0).mean(axis=0)[::-1]
    return np.array(image.TransformContinuousIndexToPhysicalPoint([float(value) for value in index]))


@pytest.fixture(autouse=True)
def same_locale():
    """Writing DICOM files sets the process's locale to C, and later tests read what is not ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "nnUNet_raw" / "Dataset042_Benchmark"


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
    (source / "Training Set" / "CASE00" / "mri_norm2.h5").write_bytes(b"made from the files next to it")
    report = convert_dataset("la", source, raw, labeled="1")
    assert report.failed == [] and "CASE00" in report.train


def test_h5_files_need_h5py(tmp_path, raw, monkeypatch) -> None:
    source = la_h5_download(tmp_path / "download")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"Install it: pip install h5py"):
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
    for number, words in enumerate(["voxels", "spacing", "is in air", "no label", "missing"], start=1):
        assert words in reasons[f"PANCREAS_{number:04d}"]
    assert report.train == [f"PANCREAS_{number:04d}" for number in range(6, 11)]
    assert names(raw / "labelsTr") == [f"PANCREAS_{number:04d}.nii.gz" for number in range(6, 11)]


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
