from __future__ import annotations

import copy
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.preprocessing.normalization import default_normalization_schemes
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import TinyDataset, read_preprocessed, voxels, write_image

from nnunet_ssl.data import preprocess_case, preprocessing, records
from nnunet_ssl.data.preprocessing import preprocess_unlabeled
from nnunet_ssl.data.raw_cases import RawCase
from nnunet_ssl.data.records import FORMAT_VERSION, preprocessing_fingerprint
from nnunet_ssl.data.unlabeled_cases import ready_cases
from nnunet_ssl.errors import UserError

IDENTIFIER = "nnUNetPlans_3d_fullres"


@pytest.fixture
def dataset(tmp_path: Path) -> TinyDataset:
    return TinyDataset(tmp_path)


@pytest.fixture
def three(dataset: TinyDataset) -> TinyDataset:
    for number in range(3):
        dataset.add(f"U{number}", voxels(number))
    return dataset


def reasons(problems: list[Any]) -> dict[str, str]:
    return {problem.identifier: problem.reason for problem in problems}


def test_result_is_what_nnunet_makes_of_the_same_image_with_a_label(dataset: TinyDataset) -> None:
    image = voxels(0)
    image[:3] = 0  # a margin that nnU-Net crops
    image[10, 10:14, 10:14] = 0
    dataset.add_labeled("L0", image)
    dataset.add("U0", image)
    report = dataset.run()
    assert (report.done, report.failed, report.warnings) == (["U0"], [], [])

    assert sorted(file.name for file in dataset.folder.iterdir()) == ["U0.b2nd", "U0.pkl", "U0_seg.b2nd"]
    assert dataset.temporary() == []
    ours, ours_seg, _, ours_properties = infer_dataset_class(str(dataset.folder))(str(dataset.folder)).load_case("U0")
    theirs, _, _, properties = infer_dataset_class(str(dataset.labeled))(str(dataset.labeled)).load_case("L0")
    assert ours.shape != (1, *image.shape)  # it was resampled
    np.testing.assert_array_equal(ours[:], theirs[:])
    assert ours.dtype == np.float32 and ours_seg.dtype == np.int16
    assert (ours.chunks, ours.blocks) == (theirs.chunks, theirs.blocks)
    assert ours_seg.shape == (1, *ours.shape[1:]) and set(np.unique(ours_seg[:])) <= {-1, 0}
    assert ours_properties == {key: value for key, value in properties.items() if key != "class_locations"}


def test_second_run_touches_nothing_and_opens_no_image(three: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert three.run().done == ["U0", "U1", "U2"]
    before = three.stamps()
    monkeypatch.setattr(preprocessing, "preprocess_case", None)
    lines: list[str] = []
    report = three.run(log=lines.append)
    assert (report.done, report.up_to_date, lines) == ([], ["U0", "U1", "U2"], [])
    assert three.stamps() == before


def test_changed_image_is_done_again_and_only_that(three: TinyDataset) -> None:
    three.run()
    before = three.stamps()
    three.add("U1", voxels(99))
    assert three.run().done == ["U1"]
    changed = {name for name, stamp in three.stamps().items() if stamp != before[name]}
    assert changed == {"U1.b2nd", "U1_seg.b2nd", "U1.pkl", "U1.json"}

    fresh = TinyDataset(three.root / "fresh")
    fresh.add("U1", voxels(99))
    fresh.run()
    np.testing.assert_array_equal(read_preprocessed(three.folder, "U1"), read_preprocessed(fresh.folder, "U1"))


def test_image_of_the_same_size_but_newer_is_done_again(three: TinyDataset) -> None:
    three.run()
    os.utime(three.images / "U2_0000.nii.gz", ns=(1, 1))
    assert three.run().done == ["U2"]


@pytest.mark.parametrize("lost", ["U1.b2nd", "U1_seg.b2nd", "U1.pkl", "record"])
def test_case_with_a_lost_file_is_done_again(three: TinyDataset, lost: str) -> None:
    three.run()
    (three.records / "U1.json" if lost == "record" else three.folder / lost).unlink()
    assert sorted(ready_cases(three.preprocessed, IDENTIFIER)) == ["U0", "U2"]
    assert three.run().done == ["U1"]


def test_damaged_record_is_no_record(three: TinyDataset) -> None:
    three.run()
    (three.records / "U0.json").write_text('{"status": "ok", "sou')
    (three.records / "U1.json").write_text("[]")
    assert sorted(ready_cases(three.preprocessed, IDENTIFIER)) == ["U2"]
    assert three.run().done == ["U0", "U1"]


def test_images_that_are_gone_take_their_files_along(three: TinyDataset) -> None:
    three.run()
    (three.images / "U1_0000.nii.gz").unlink()
    report = three.run(num_parts=2, part_id=1)
    assert report.removed == [] and (three.folder / "U1.b2nd").exists()
    assert three.run().removed == ["U1"]
    assert not [name for name in three.stamps() if name.startswith("U1")]
    assert three.run().removed == []


def test_without_imagesun_what_was_preprocessed_elsewhere_is_kept(three: TinyDataset) -> None:
    three.run()
    before = three.stamps()
    shutil.rmtree(three.raw)
    assert three.run().up_to_date == ["U0", "U1", "U2"]
    assert three.run(raw_dataset_folder=None).up_to_date == ["U0", "U1", "U2"]
    three.plans["configurations"]["3d_fullres"]["spacing"] = [1.5, 1.5, 1.5]
    with pytest.raises(UserError, match=r"U0, U1, U2.*imagesUn does not exist"):
        three.run()
    assert three.stamps() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spacing", [1.5, 1.5, 1.5]),
        ("normalization_schemes", ["RescaleTo01Normalization"]),
        ("resampling_fn_data_kwargs", {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}),
    ],
)
def test_change_of_plans_that_changes_voxels_redoes_all(three: TinyDataset, key: str, value: Any) -> None:
    three.run()
    before = read_preprocessed(three.folder, "U0")
    three.plans["configurations"]["3d_fullres"][key] = value
    assert three.run().done == ["U0", "U1", "U2"]
    after = read_preprocessed(three.folder, "U0")
    assert after.shape != before.shape or not np.allclose(after, before)


def replan(dataset: TinyDataset, *names: str) -> None:
    """With other labeled cases, so other statistics of their intensities; of these only some, if named."""
    for properties in dataset.plans["foreground_intensity_properties_per_channel"].values():
        for name in names or properties:
            properties[name] += 10 if properties[name] < 100 else -10


@pytest.mark.parametrize("scheme", ["ZScore", "No", "RescaleTo01", "RGBTo01"])
def test_other_intensities_of_labeled_cases_redo_nothing_that_does_not_read_them(
    three: TinyDataset, scheme: str
) -> None:
    three.plans["configurations"]["3d_fullres"]["normalization_schemes"] = [f"{scheme}Normalization"]
    three.run()
    before = three.stamps()
    replan(three)
    assert three.run().up_to_date == ["U0", "U1", "U2"] and three.stamps() == before


@pytest.mark.parametrize("name", ["mean", "std", "percentile_00_5", "percentile_99_5", "min", "max"])
def test_ct_normalization_reads_some_of_them(three: TinyDataset, name: str) -> None:
    three.plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    three.run()
    before = read_preprocessed(three.folder, "U0")
    replan(three, name)
    report = three.run()
    fresh = TinyDataset(three.root / "fresh")
    fresh.plans = three.plans
    fresh.add("U0", voxels(0))
    fresh.run()
    changed = not np.array_equal(read_preprocessed(fresh.folder, "U0"), before)
    assert changed == (name not in ("min", "max"))
    assert (report.done if changed else report.up_to_date) == ["U0", "U1", "U2"]


def test_nnunets_normalizations_read_what_the_fingerprint_has() -> None:
    """All that nnU-Net has: a new one is of unknown needs until it is listed."""

    class Read(dict):
        def __getitem__(self, name: str) -> float:
            names.add(name)
            return super().__getitem__(name)

    known = records.INTENSITIES_READ
    schemes = {name: scheme for name, scheme in vars(default_normalization_schemes).items() if name.endswith("zation")}
    del schemes["ImageNormalization"]
    assert set(known) == set(schemes)
    for name, scheme in schemes.items():
        names: set[str] = set()
        properties = Read({"mean": 1.0, "std": 2.0, "percentile_00_5": 0.0, "percentile_99_5": 5.0, "median": 1.0})
        scheme(use_mask_for_norm=True, intensityproperties=properties).run(voxels(0), np.zeros((20, 24, 24)))
        assert names == set(known[name]), name


def test_the_channels_normalization_decides(tmp_path: Path) -> None:
    dataset = TinyDataset(tmp_path, channels=2)
    properties = dataset.plans["foreground_intensity_properties_per_channel"]
    properties["1"] = dict(properties["0"])
    dataset.plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["ZScoreNormalization", "CTNormalization"]

    def fingerprint() -> str:
        return preprocessing_fingerprint(PlansManager(copy.deepcopy(dataset.plans)), "3d_fullres")

    first = fingerprint()
    properties["0"]["mean"] += 1
    assert fingerprint() == first
    properties["1"]["mean"] += 1
    assert fingerprint() != first


@pytest.mark.parametrize(
    "change", [{"normalization_schemes": ["OurNormalization"]}, {"preprocessor_name": "OurPreprocessor"}]
)
def test_others_may_read_all_of_them(dataset: TinyDataset, change: dict[str, Any]) -> None:
    dataset.plans["configurations"]["3d_fullres"].update(change)
    first = preprocessing_fingerprint(PlansManager(copy.deepcopy(dataset.plans)), "3d_fullres")
    replan(dataset, "max")
    assert preprocessing_fingerprint(PlansManager(copy.deepcopy(dataset.plans)), "3d_fullres") != first


# What PLANS had in a record until November 2026, printed by that code.
EARLIER = "c52014c20b0b918c63f9d83a2409a9e27d5451d88049075ad242aba861b25873"


def test_a_record_of_earlier_is_valid_as_long_as_nothing_changed(three: TinyDataset) -> None:
    three.run()
    for file in three.records.iterdir():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": EARLIER}))
    before = three.stamps()
    assert three.run().up_to_date == ["U0", "U1", "U2"] and three.stamps() == before
    assert three.run(raw_dataset_folder=None).up_to_date == ["U0", "U1", "U2"]
    three.plans["configurations"]["3d_fullres"]["spacing"] = [1.5, 1.5, 1.5]
    assert three.run().done == ["U0", "U1", "U2"]


def test_configurations_that_share_a_folder_do_not_fight(three: TinyDataset) -> None:
    three.run()
    three.plans["configurations"]["3d_fullres"]["batch_size"] = 7
    assert three.run("3d_small").up_to_date == ["U0", "U1", "U2"]
    assert three.run().up_to_date == ["U0", "U1", "U2"]


def test_newer_format_redoes_all(three: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    three.run()
    monkeypatch.setattr(records, "FORMAT_VERSION", FORMAT_VERSION + 1)
    assert three.run().done == ["U0", "U1", "U2"]


# Bad input


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


def _with(value: float) -> Callable[[TinyDataset], None]:
    def add(dataset: TinyDataset) -> None:
        image = voxels(1)
        image[3, 4, 5:8] = value
        dataset.add("bad", image)

    return add


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
    "color": (_color, r"bad_0000\.nii\.gz has RGB voxels, 3 values each"),
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
    assert "outside the labeled foreground's (50 to 150)" in reasons(report.warnings)["bright"]
    assert dataset.run().warnings == report.warnings


def test_color_in_other_formats_and_readers(dataset: TinyDataset) -> None:
    color = np.random.default_rng(0).integers(0, 255, (20, 24, 24, 3), np.uint8)
    dataset.dataset_json["file_ending"] = ".nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(color, isVector=True), str(dataset.images / "nrrd_0000.nrrd"))
    assert "RGB voxels" in reasons(dataset.run().failed)["nrrd"]

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


# Sharing the work


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


# Worker processes


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
