"""Corrected segmentations become labels."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from accepting_home import SPLITS, UNLABELED, VALUES, AcceptingHome, read_json, read_labels, segmentation, write_json
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tiny_dataset import read_preprocessed, write_image

from nnunet_ssl.data import journal as journal_module
from nnunet_ssl.data.accepting import Wanted, accept
from nnunet_ssl.data.journal import FOLDER, last_accepted
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.errors import UserError


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> AcceptingHome:
    return AcceptingHome(tmp_path_factory.mktemp("accepting")).fill()


@pytest.fixture
def home(template, tmp_path) -> AcceptingHome:
    return template.copy(tmp_path / "home")


def accepting(home: AcceptingHome, *cases: str, allow_empty: bool = False) -> list[str]:
    wanted = Wanted(home.corrected, cases, allow_empty)
    return accept(home.folders, VALUES, wanted, log=lambda line: None)[0]


def undo(home: AcceptingHome) -> None:
    last = last_accepted(home.folders.roots)
    assert last is not None and last.changed_since() == []
    last.undo()


def test_accepted_cases_are_labeled_cases(home, tmp_path) -> None:
    home.correct("U0", "U2")
    assert accepting(home) == ["U0", "U2"]
    found = get_filenames_of_train_images_and_targets(str(home.raw), read_json(home.raw / "dataset.json"))
    assert sorted(found) == ["L0", "L1", "L2", "U0", "U2"]
    assert sorted(file.name for file in home.images.iterdir()) == ["U1_0000.nii.gz", "U3_0000.nii.gz"]
    for folder in (home.raw, home.preprocessed):
        assert read_json(folder / "dataset.json") == {**home.dataset_json, "numTraining": 5}
    for folder in (home.raw / "labelsTr", home.preprocessed / "gt_segmentations"):
        assert (read_labels(folder / "U2.nii.gz") == segmentation(2)).all()

    manager = PlansManager(home.plans)
    DefaultPreprocessor(verbose=False).run_case_save(
        str(tmp_path / "U0"),
        [str(home.raw / "imagesTr" / "U0_0000.nii.gz")],
        str(home.raw / "labelsTr" / "U0.nii.gz"),
        manager,
        manager.get_configuration("3d_fullres"),
        home.dataset_json,
    )
    for name in ("U0", "U0_seg"):
        assert np.array_equal(read_preprocessed(home.labeled, name), read_preprocessed(tmp_path, name))
    assert (home.labeled / "U0.pkl").read_bytes() == (tmp_path / "U0.pkl").read_bytes()

    for folder, ending in ((home.folder, ".pkl"), (home.records, ".json")):
        assert sorted(file.stem for file in folder.iterdir() if file.suffix == ending) == ["U1", "U3"]
    report = home.run()
    assert report.up_to_date == ["U1", "U3"] and not (report.done or report.removed or report.failed)


def test_folds_train_on_the_new_cases_and_none_validates_them(home) -> None:
    write_json(home.raw / "splits_final.json", SPLITS[:1])
    home.correct("U0", "U2")
    accepting(home)
    assert read_splits(home.preprocessed / "splits_final.json") == [
        {"train": ["L0", "L1", "U0", "U2"], "val": ["L2"]},
        {"train": ["L0"], "val": ["L2"], "unlabeled": ["L1", "U0", "U2"]},
        {"train": ["L1", "U0", "U2"], "val": ["L0"], "unlabeled": []},
    ]
    assert read_splits(home.raw / "splits_final.json") == [{"train": ["L0", "L1", "U0", "U2"], "val": ["L2"]}]


def test_without_a_split_file_the_old_cases_alone_are_validated(home) -> None:
    (home.preprocessed / "splits_final.json").unlink()
    before = home.everything()
    home.correct("U0")
    accepting(home)
    folds = read_splits(home.preprocessed / "splits_final.json")
    assert sorted(case for fold in folds for case in fold["val"]) == ["L0", "L1", "L2"]
    assert all("U0" in fold["train"] for fold in folds)
    undo(home)
    assert home.everything() == before


def test_undo_leaves_every_byte_and_time_as_before(home) -> None:
    before = home.everything()
    home.correct("U0", "U1", "U3")
    accepting(home, "U3", "U1")
    assert home.everything() != before and (home.images / "U0_0000.nii.gz").is_file()
    undo(home)
    assert home.everything() == before


def test_one_wrong_file_and_nothing_changes(home) -> None:
    before = home.everything()
    home.correct("U0", "U3")
    write_image(home.corrected / "U1.nii.gz", segmentation(1)[:, :-1])
    write_image(home.corrected / "U2.nii.gz", segmentation(2) * 3)
    write_image(home.corrected / "U7.nii.gz", segmentation(2))
    shutil.copy(home.raw / "labelsTr" / "L1.nii.gz", home.corrected / "L1.nii.gz")
    (home.corrected / "U3.vtk").write_text("a surface")
    with pytest.raises(UserError) as caught:
        accepting(home)
    lines = str(caught.value).splitlines()
    assert lines[0] == "Nothing was accepted, because of 5 problem(s):"
    named = {line.strip().split(": ")[0]: line for line in lines[1:]}
    assert sorted(named) == ["L1", "U1", "U2", "U3", "U7"]
    assert "size (20, 23, 24) is not (20, 24, 24)" in named["U1"] and "the value(s) 3" in named["U2"]
    assert "L1: it is in imagesTr already; move its file elsewhere, or name the cases to accept" in named["L1"]
    assert "save it as U3.nii.gz" in named["U3"] and "imagesUn has no such case" in named["U7"]
    assert home.everything() == before


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("raw/imagesTr/U0_0000.nii.gz", "exists already"),
        ("raw/labelsTr/U0.nii.gz", "exists already"),
        ("preprocessed/gt_segmentations/U0.nii.gz", "exists already"),
        ("preprocessed/nnUNetPlans_3d_fullres/U0.pkl", "exists already"),
    ],
)
def test_nothing_is_replaced(home, place, reason) -> None:
    root, name = place.split("/", 1)
    (home.raw if root == "raw" else home.preprocessed).joinpath(name).write_text("somebody's")
    before = home.everything()
    home.correct("U0")
    with pytest.raises(UserError, match=f"U0: .*{reason}"):
        accepting(home)
    assert home.everything() == before


def test_all_channels_and_all_plans(tmp_path) -> None:
    home = AcceptingHome(tmp_path, channels=2)
    for folder in (home.raw / "imagesUn", home.raw / "imagesTr"):
        folder.mkdir(exist_ok=True)
    home.channels = 2
    for number, case in enumerate(("L0", "L1")):
        for channel in (0, 1):
            write_image(home.raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz", 1.0 * segmentation(number))
        write_image(home.raw / "labelsTr" / f"{case}.nii.gz", segmentation(number))
    for channel in (0, 1):
        write_image(home.images / f"U0_{channel:04d}.nii.gz", np.random.default_rng(channel).normal(size=(20, 24, 24)))
    other = {**home.plans, "plans_name": "OtherPlans", "configurations": dict(home.plans["configurations"])}
    other["configurations"]["3d_fullres"] = {
        **home.plans["configurations"]["3d_fullres"],
        "data_identifier": "OtherPlans_3d_fullres",
        "spacing": [2.0, 2.0, 2.0],
    }
    write_json(home.preprocessed / "nnUNetPlans.json", home.plans)
    write_json(home.preprocessed / "OtherPlans.json", other)
    write_json(home.raw / "dataset.json", home.dataset_json)
    write_json(home.preprocessed / "splits_final.json", [{"train": ["L0"], "val": ["L1"]}])
    (home.preprocessed / "gt_segmentations").mkdir()
    for name in ("nnUNetPlans_3d_fullres", "OtherPlans_3d_fullres"):
        (home.preprocessed / name).mkdir()
        (home.preprocessed / name / "L0.b2nd").touch()
    home.results.mkdir(parents=True)
    home.corrected.mkdir()
    home.correct("U0")
    accepting(home)
    assert list(home.images.iterdir()) == []
    shapes = [
        read_preprocessed(home.preprocessed / name, "U0").shape
        for name in ("nnUNetPlans_3d_fullres", "OtherPlans_3d_fullres")
    ]
    assert shapes == [(2, 25, 30, 30), (2, 12, 15, 15)]


def test_an_empty_segmentation_is_accepted_only_on_request(home) -> None:
    write_image(home.corrected / "U0.nii.gz", segmentation(0) * 0)
    with pytest.raises(UserError, match=r"contains no structure.*--allow-empty"):
        accepting(home)
    assert accepting(home, allow_empty=True) == ["U0"]
    assert not read_labels(home.raw / "labelsTr" / "U0.nii.gz").any()


def test_a_case_without_all_its_images_is_named(home) -> None:
    home.correct("U0")
    (home.images / "U0_0000.nii.gz").rename(home.images / "U0_0001.nii.gz")
    with pytest.raises(UserError, match=r"U0: missing U0_0000\.nii\.gz"):
        accepting(home)


@pytest.mark.parametrize("name", ["../corrected/U0", "/U0", "", "U0_0000", "U9", "U0\n"])
def test_names_that_are_asked_for_are_looked_up_only(home, name) -> None:
    home.correct("U0")
    before = home.everything()
    with pytest.raises(UserError, match="imagesUn has no such case"):
        accepting(home, name)
    assert home.everything() == before


def test_a_damaged_image_is_named(home) -> None:
    home.correct("U0")
    file = home.images / "U0_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=r"U0: U0_0000\.nii\.gz is damaged"):
        accepting(home)


def test_a_copy_of_a_validation_case_is_refused(home) -> None:
    before = home.everything()
    shutil.copy2(home.raw / "imagesTr" / "L2_0000.nii.gz", home.images / "U9_0000.nii.gz")
    write_image(home.corrected / "U9.nii.gz", segmentation(0))
    with pytest.raises(UserError, match="imagesUn/U9 = imagesTr/L2"):
        accepting(home)
    (home.images / "U9_0000.nii.gz").unlink()
    assert home.everything() == before


# Links


def link(file: Path, target: str) -> None:
    file.unlink(missing_ok=True)
    try:
        file.symlink_to(target)
    except OSError:
        pytest.skip("links are not allowed here")


def test_a_link_moves_as_a_link(home) -> None:
    image = home.images / "U0_0000.nii.gz"
    (home.raw / "store").mkdir()
    image.rename(home.raw / "store" / "some.nii.gz")
    link(image, "../store/some.nii.gz")
    before = home.everything()
    home.correct("U0")
    accepting(home)
    moved = home.raw / "imagesTr" / "U0_0000.nii.gz"
    assert os.readlink(moved) == "../store/some.nii.gz" and moved.is_file()  # noqa: PTH115
    assert (home.raw / "store" / "some.nii.gz").is_file()
    undo(home)
    assert home.everything() == before


def test_a_link_that_would_lead_elsewhere_is_named(home) -> None:
    (home.images / "U0_0000.nii.gz").rename(home.images / ".kept.nii.gz")
    link(home.images / "U0_0000.nii.gz", ".kept.nii.gz")
    home.correct("U0")
    with pytest.raises(UserError, match="is a link that would lead to another place"):
        accepting(home)


def test_a_linked_folder_of_copies_is_refused(home, tmp_path) -> None:
    home.folder.rename(tmp_path / "copies")
    link(home.folder, str(tmp_path / "copies"))
    before = home.everything()
    home.correct("U0")
    with pytest.raises(UserError, match="is a link, and files would be removed"):
        accepting(home)
    assert home.everything() == before and (tmp_path / "copies" / "U0.b2nd").is_file()


# Previous stage


def test_of_the_previous_stage_one_segmentation_becomes_that_of_a_labeled_case(home) -> None:
    stage = home.results / "CrossMatchTrainer__nnUNetPlans__3d_lowres" / "predicted_next_stage"
    (stage / "3d_cascade").mkdir(parents=True)
    for fold in (0, 1):
        folder = stage / "3d_cascade_unlabeled" / f"fold_{fold}" / "imagesUn"
        folder.mkdir(parents=True)
        for case in UNLABELED:
            (folder / f"{case}.b2nd").write_text(f"{case} by fold {fold}")
    before = home.everything()
    home.correct("U0")
    accepting(home)
    assert (stage / "3d_cascade" / "U0.b2nd").read_text() == "U0 by fold 0"
    kept = sorted(file.relative_to(stage).as_posix() for file in stage.rglob("U0*"))
    assert kept == ["3d_cascade/U0.b2nd"] and len(list(stage.rglob("U1*"))) == 2
    undo(home)
    assert home.everything() == before


# What fails in the middle


def no_space(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(arguments[-1]))


@pytest.mark.parametrize("call", [0, 7])
def test_a_full_disk_while_preparing(home, monkeypatch, call) -> None:
    before, count, flush = home.everything(), iter(range(10**6)), journal_module.flush_to_disk
    monkeypatch.setattr(
        journal_module, "flush_to_disk", lambda file: (no_space if next(count) == call else flush)(file)
    )
    home.correct("U0", "U1", "U2", "U3")
    with pytest.raises(UserError, match=r"Nothing was accepted: .*No space left on device"):
        accepting(home)
    assert next(count) == call + 1
    assert home.everything() == before


@pytest.mark.parametrize("call", [0, 15])
def test_a_rename_that_fails(home, monkeypatch, call) -> None:
    before, count, rename = home.everything(), iter(range(10**6)), journal_module.rename
    monkeypatch.setattr(journal_module, "rename", lambda *files: (no_space if next(count) == call else rename)(*files))
    home.correct("U0", "U1")
    with pytest.raises(UserError, match=r"Nothing was accepted: .*No space left on device"):
        accepting(home)
    assert home.everything() == before and not (home.raw / FOLDER).exists()


def test_a_preprocessor_that_fails(home, monkeypatch) -> None:
    before = home.everything()
    monkeypatch.setattr(DefaultPreprocessor, "_normalize", no_space)
    home.correct("U0")
    with pytest.raises(UserError, match=r"U0: .*No space left on device"):
        accepting(home)
    assert home.everything() == before


# The dataset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda home: shutil.rmtree(home.labeled), "contains no preprocessed labeled case"),
        (lambda home: shutil.rmtree(home.preprocessed / "gt_segmentations"), "gt_segmentations"),
        (lambda home: shutil.rmtree(home.raw / "labelsTr"), "labelsTr"),
        (lambda home: (home.labeled / "L0.npz").touch(), "older nnU-Net"),
        (lambda home: (home.preprocessed / "nnUNetPlans.json").write_text("{"), "is not valid JSON"),
        (lambda home: (home.preprocessed / "splits_final.json").write_text("{}"), "must hold a list of folds"),
        (
            lambda home: write_json(home.raw / "dataset.json", {**home.dataset_json, "dataset": {}}),
            "names its files one by one",
        ),
        (
            lambda home: write_json(home.raw / "dataset.json", {**home.dataset_json, "labels": {"background": 0}}),
            "'labels' in .* has changed since planning",
        ),
        (
            lambda home: write_json(
                home.preprocessed / "nnUNetPlans.json",
                {
                    **home.plans,
                    "configurations": {
                        "3d": {**home.plans["configurations"]["3d_fullres"], "data_identifier": "../../outside"}
                    },
                },
            ),
            "is not a folder name",
        ),
    ],
)
def test_a_dataset_that_cannot_take_cases_is_explained(home, change, message) -> None:
    home.correct("U0")
    change(home)
    before = home.everything()
    with pytest.raises(UserError, match=message):
        accepting(home)
    assert home.everything() == before


def test_an_empty_folder_is_named(home) -> None:
    with pytest.raises(UserError, match="contains no segmentation"):
        accepting(home)


def test_the_geometry_is_that_of_the_image(home) -> None:
    written = sitk.GetImageFromArray(segmentation(0).astype(np.float64))
    written.SetSpacing([1.25 + 1e-6] * 3)
    written.SetOrigin([1e-4, 0, 0])
    sitk.WriteImage(written, str(home.corrected / "U0.mha"))
    accepting(home)
    stored = sitk.ReadImage(str(home.raw / "labelsTr" / "U0.nii.gz"))
    image = sitk.ReadImage(str(home.raw / "imagesTr" / "U0_0000.nii.gz"))
    assert stored.GetSpacing() == image.GetSpacing() and stored.GetOrigin() == image.GetOrigin()
    assert stored.GetPixelID() == sitk.sitkUInt8
