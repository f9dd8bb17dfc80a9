"""Images that cannot be used, and images that are used with a warning."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from preprocessing_cases import IDENTIFIER, _with, reasons
from tiny_dataset import TinyDataset, read_preprocessed, voxels, write_image

from nnunet_ssl.data import preprocess_case, preprocessing
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


def _cut_off(dataset: TinyDataset) -> None:
    dataset.add("bad", voxels(1))
    file = dataset.images / "bad_0000.nii.gz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _no_image(dataset: TinyDataset) -> None:
    (dataset.images / "bad_0000.nii.gz").write_bytes(b"this is no image")


def _one_bit_changed(dataset: TinyDataset) -> None:
    """Only the checksum tells: the voxels decompress to other ones."""
    dataset.add("bad", voxels(1))
    file = dataset.images / "bad_0000.nii.gz"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _empty_axis(dataset: TinyDataset) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((24, 24, 0), np.float32), np.eye(4)), dataset.images / "bad_0000.nii.gz")


def _four_dimensions(dataset: TinyDataset) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((12, 12, 12, 2), np.float32), np.eye(4))
    nibabel.save(image, dataset.images / "bad_0000.nii.gz")


def _color(dataset: TinyDataset) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 255, (20, 24, 24, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, str(dataset.images / "bad_0000.nii.gz"))


BAD_INPUTS: dict[str, tuple[Callable[[TinyDataset], None], str]] = {
    "cut off": (_cut_off, r"bad_0000\.nii\.gz is damaged or incomplete"),
    "one bit": (_one_bit_changed, r"bad_0000\.nii\.gz is damaged or incomplete: CRC check failed"),
    "no image": (_no_image, r"bad_0000\.nii\.gz is damaged or incomplete"),
    "nan": (_with(np.nan), r"bad_0000\.nii\.gz has 3 voxels that are NaN or infinite"),
    "infinite": (_with(-np.inf), r"bad_0000\.nii\.gz has 3 voxels that are NaN or infinite"),
    "constant": (lambda dataset: dataset.add("bad", np.full((20, 24, 24), 7, np.float32)), r"same value \(7\)"),
    "zeros": (lambda dataset: dataset.add("bad", np.zeros((20, 24, 24), np.float32)), r"same value \(0\)"),
    "empty axis": (_empty_axis, "an axis has size 0"),
    "2D": (lambda dataset: dataset.add("bad", voxels(1, (24, 24))), "2D image .* labeled images are 3D"),
    "one slice": (lambda dataset: dataset.add("bad", voxels(1, (1, 24, 24))), "2D image .* labeled images are 3D"),
    "channels": (_four_dimensions, "2 channels, but this dataset has 1"),
    "color": (_color, r"bad_0000\.nii\.gz has RGB voxels with 3 values each"),
    "spacing": (lambda dataset: dataset.add("bad", voxels(1), spacing=500.0), "correct the spacing in its header"),
}


# These formats keep what the NIfTI reader hides, or are cut off where no checksum tells.
@pytest.mark.parametrize(
    ("ending", "not_finite", "short"),
    [
        (".nrrd", "3 of 11520 voxels are NaN", "short_0000.nrrd cannot be read"),
        (".nii", "has 3 voxels that are NaN", "short_0000.nii is damaged or incomplete: Expected 23040 bytes"),
    ],
)
def test_nan_in_other_formats(dataset: TinyDataset, ending: str, not_finite: str, short: str) -> None:
    dataset.dataset_json["file_ending"] = ending
    image = voxels(1)
    image[3, 4, 5:8] = np.nan
    write_image(dataset.images / f"bad_0000{ending}", image)
    write_image(dataset.images / f"good_0000{ending}", voxels(2))
    write_image(dataset.images / f"short_0000{ending}", voxels(3).astype(np.int16))
    file = dataset.images / f"short_0000{ending}"
    file.write_bytes(file.read_bytes()[:-1000])
    report = dataset.run()
    assert report.done == ["good"]
    found = reasons(report.failed)
    assert found.keys() == {"bad", "short"}
    assert not_finite in found["bad"] and short in found["short"]


def test_header_that_only_nibabel_refuses_is_the_readers_business(dataset: TinyDataset) -> None:
    dataset.dataset_json["file_ending"] = ".nii"
    file = dataset.images / "U0_0000.nii"
    write_image(file, voxels(0))
    content = bytearray(file.read_bytes())
    content[344:348] = bytes(4)  # the older format's, Analyze
    file.write_bytes(content)
    report = dataset.run()
    assert (report.done, report.failed) == (["U0"], [])


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_image_is_reported_and_the_others_are_done(three: TinyDataset, kind: str) -> None:
    add, expected = BAD_INPUTS[kind]
    add(three)
    report = three.run()
    assert report.done == ["U0", "U1", "U2"]
    assert [problem.identifier for problem in report.failed] == ["bad"]
    assert re.search(expected, report.failed[0].reason), report.failed[0].reason
    assert "\n" not in report.failed[0].reason
    assert sorted(ready_cases(three.preprocessed, IDENTIFIER)) == ["U0", "U1", "U2"]
    assert not [file for file in three.folder.iterdir() if file.name.startswith("bad")]


def test_failed_case_is_reported_again_without_a_second_try_until_it_is_mended(
    three: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with(np.nan)(three)
    first = three.run()
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "preprocess_case", None)
        second = three.run()
    assert second.failed == first.failed != []
    assert "bad" in second.table() and "NaN" in second.table()
    three.add("bad", voxels(5))
    assert three.run().done == ["bad"]


def test_good_case_that_turns_bad_is_not_used_any_more(three: TinyDataset) -> None:
    three.run()
    three.add("U1", np.zeros((20, 24, 24), np.float32))
    assert reasons(three.run().failed).keys() == {"U1"}
    assert sorted(ready_cases(three.preprocessed, IDENTIFIER)) == ["U0", "U2"]
    assert not (three.folder / "U1.b2nd").exists()


def test_failure_to_store_is_tried_again(three: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preprocess_case, "_save", full)
        report = three.run()
    assert len(report.failed) == 3 and "No space left" in report.failed[0].reason
    assert not ready_cases(three.preprocessed, IDENTIFIER)
    assert three.run().done == ["U0", "U1", "U2"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_dangling_link_is_reported(three: TinyDataset) -> None:
    (three.images / "U3_0000.nii.gz").symlink_to(three.root / "nowhere.nii.gz")
    report = three.run()
    assert report.done == ["U0", "U1", "U2"] and "No such file" in reasons(report.failed)["U3"]


def test_odd_images_are_used_with_a_warning(dataset: TinyDataset) -> None:
    dataset.add("coarse", voxels(0), spacing=(1.25, 1.25, 5.0))
    dataset.add("bright", voxels(1) + 1000)
    dataset.add("usual", voxels(2))
    report = dataset.run()
    assert report.done == ["bright", "coarse", "usual"] and report.failed == []
    assert reasons(report.warnings).keys() == {"bright", "coarse"}
    assert "spacing 5 x 1.25 x 1.25" in reasons(report.warnings)["coarse"]
    assert "outside the range of the labeled foreground (50 to 150)" in reasons(report.warnings)["bright"]
    assert dataset.run().warnings == report.warnings


def test_warnings_are_about_the_labeled_images_of_today(dataset: TinyDataset) -> None:
    """Z-score reads no intensities of the labeled images, so the cases are not done again when these change."""
    dataset.add("bright", voxels(1) + 1000)
    dataset.add("usual", voxels(2))
    assert reasons(dataset.run().warnings).keys() == {"bright"}
    for properties in dataset.plans["foreground_intensity_properties_per_channel"].values():
        properties["percentile_00_5"], properties["percentile_99_5"] = 1000.0, 1200.0
    report = dataset.run()
    assert report.up_to_date == ["bright", "usual"]
    assert "outside the range of the labeled foreground (1000 to 1200)" in reasons(report.warnings)["usual"]
    assert reasons(report.warnings).keys() == {"usual"}


def test_color_in_other_formats_and_readers(dataset: TinyDataset) -> None:
    color = np.random.default_rng(0).integers(0, 255, (20, 24, 24, 3), np.uint8)
    dataset.dataset_json["file_ending"] = ".nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(color, isVector=True), str(dataset.images / "nrrd_0000.nrrd"))
    assert "RGB voxels" in reasons(dataset.run().failed)["nrrd"]

    (dataset.images / "nrrd_0000.nrrd").unlink()
    dataset.dataset_json["file_ending"] = ".nii"
    dataset.plans["image_reader_writer"] = "NibabelIO"
    sitk.WriteImage(sitk.GetImageFromArray(color, isVector=True), str(dataset.images / "vector_0000.nii"))
    rgb = color.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), dataset.images / "rgb_0000.nii")
    failed = reasons(dataset.run().failed)
    assert failed.keys() == {"rgb", "vector"} and all("RGB voxels" in reason for reason in failed.values())


def write_turned(file: Path, direction: tuple[float, ...]) -> None:
    write_image(file, voxels(0))
    image = sitk.ReadImage(str(file))
    image.SetDirection(direction)
    sitk.WriteImage(image, str(file))


UPRIGHT = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
FLIPPED = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)
PERMUTED = (0, 1.0, 0, 0, 0, 1.0, 1.0, 0, 0)
OBLIQUE = (0.8, 0, 0.6, 0, 1.0, 0, -0.6, 0, 0.8)


@pytest.mark.parametrize(
    ("reader", "found"),
    [
        ("SimpleITKIO", {"flipped": "to RAS, those of the labeled images to LPS", "permuted": "to SLP, those"}),
        ("NibabelIO", {"flipped": "to RAS, those of the labeled images to LPS", "permuted": "to SLP, those"}),
        ("SimpleITKIOWithReorient", {}),
        ("NibabelIOWithReorient", {}),
    ],
)
def test_images_that_lie_otherwise_are_used_with_a_warning(
    dataset: TinyDataset, reader: str, found: dict[str, str]
) -> None:
    dataset.plans["image_reader_writer"] = reader
    for number in range(3):
        write_turned(dataset.raw / "imagesTr" / f"L{number}_0000.nii.gz", UPRIGHT)
    for name, direction in (("flipped", FLIPPED), ("permuted", PERMUTED), ("oblique", OBLIQUE), ("upright", UPRIGHT)):
        write_turned(dataset.images / f"{name}_0000.nii.gz", direction)
    report = dataset.run()
    assert report.done == ["flipped", "oblique", "permuted", "upright"]
    warned = reasons(report.warnings)
    assert warned.keys() == found.keys(), warned
    assert all(text in warned[name] for name, text in found.items()), warned


def test_any_direction_of_a_labeled_image_will_do(dataset: TinyDataset) -> None:
    for number, direction in enumerate((UPRIGHT, FLIPPED)):
        write_turned(dataset.raw / "imagesTr" / f"L{number}_0000.nii.gz", direction)
    write_turned(dataset.images / "U0_0000.nii.gz", FLIPPED)
    write_turned(dataset.images / "U1_0000.nii.gz", PERMUTED)
    assert reasons(dataset.run().warnings).keys() == {"U1"}


def test_without_fingerprint_spacing_is_not_compared(dataset: TinyDataset) -> None:
    (dataset.preprocessed / "dataset_fingerprint.json").unlink()
    dataset.add("coarse", voxels(0), spacing=(1.25, 1.25, 5.0))
    report = dataset.run()
    assert (report.done, report.warnings) == (["coarse"], [])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", r"fingerprint\.json is not valid JSON"),
        ("[]", r"fingerprint\.json contains no table"),
        ('{"shapes_after_crop": [], "spacings": null}', r"'spacings' in .*fingerprint\.json must be a list"),
    ],
)
def test_a_broken_fingerprint_is_named(dataset: TinyDataset, content: str, expected: str) -> None:
    (dataset.preprocessed / "dataset_fingerprint.json").write_text(content)
    dataset.add("scan", voxels(0))
    with pytest.raises(UserError, match=rf"{expected}.*nnUNetv2_extract_fingerprint -d 7 --clean\."):
        dataset.run()


def test_channels_must_be_there_and_fit_each_other(tmp_path: Path) -> None:
    dataset = TinyDataset(tmp_path, channels=2)
    for name in ("fine", "shape", "spacing", "constant", "shifted"):
        write_image(dataset.images / f"{name}_0000.nii.gz", voxels(0))
    shifted = sitk.ReadImage(str(dataset.images / "fine_0000.nii.gz"))
    shifted.SetOrigin((5.0, 0.0, 0.0))
    sitk.WriteImage(shifted, str(dataset.images / "shifted_0001.nii.gz"))
    write_image(dataset.images / "fine_0001.nii.gz", voxels(1))
    write_image(dataset.images / "shape_0001.nii.gz", voxels(1, (20, 24, 20)))
    write_image(dataset.images / "spacing_0001.nii.gz", voxels(1), spacing=2.0)
    write_image(dataset.images / "constant_0001.nii.gz", np.zeros((20, 24, 24), np.float32))
    write_image(dataset.images / "single_0000.nii.gz", voxels(1))
    report = dataset.run()
    assert report.done == ["constant", "fine", "shifted"]
    failed = reasons(report.failed)
    assert failed.keys() == {"shape", "spacing", "single"}
    assert "shape_0001.nii.gz 20 x 24 x 20" in failed["shape"]
    assert "spacing_0001.nii.gz 2 x 2 x 2" in failed["spacing"]
    assert failed["single"] == "missing single_0001.nii.gz"
    warned = reasons(report.warnings)
    assert warned.keys() == {"constant", "shifted"}
    assert "channel 1 have the same value" in warned["constant"] and "same origin" in warned["shifted"]
    assert read_preprocessed(dataset.folder, "fine").shape[0] == 2

    (dataset.images / "fine_0001.nii.gz").unlink()
    assert "fine" in reasons(dataset.run().failed)
    assert not (dataset.folder / "fine.b2nd").exists()


def test_color_images_hold_all_channels_in_one_file(tmp_path: Path) -> None:
    dataset = TinyDataset(tmp_path, channels=3)
    dataset.plans["image_reader_writer"] = "NaturalImage2DIO"
    dataset.plans["configurations"]["3d_fullres"].update(spacing=[1.0, 1.0], patch_size=[16, 16])
    dataset.dataset_json["file_ending"] = ".png"
    fingerprint = {"shapes_after_crop": [[1, 24, 24]], "spacings": [[999, 1, 1]]}
    (dataset.preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    from skimage import io

    for folder, name in (("imagesTr", "L0"), ("imagesUn", "U0")):
        (dataset.raw / folder).mkdir(exist_ok=True)
        image = np.random.default_rng(0).integers(60, 140, (24, 30, 3), np.uint8)
        io.imsave(dataset.raw / folder / f"{name}_0000.png", image, check_contrast=False)
    report = dataset.run()
    assert (report.done, report.failed, report.warnings) == (["U0"], [], [])
    assert read_preprocessed(dataset.folder, "U0").shape == (3, 1, 24, 30)
