"""With other labeled cases, so other statistics of their intensities; of these only some, if named."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.preprocessing.normalization import default_normalization_schemes
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from preprocessing_cases import IDENTIFIER
from tiny_dataset import TinyDataset, read_preprocessed, voxels

from nnunet_ssl.data import preprocessing, records
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
