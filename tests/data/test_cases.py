from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_ssl.data.raw_cases import RawCase, files_per_case, find_raw_cases, misnamed_folders
from nnunet_ssl.data.records import records_folder, unlabeled_folder
from nnunet_ssl.data.unlabeled_cases import (
    UnlabeledCase,
    collect_unlabeled_cases,
    no_unlabeled_cases_message,
    ready_cases,
)
from nnunet_ssl.errors import UserError

IDENTIFIER = "nnUNetPlans_3d_fullres"


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def write_splits(folder: Path, splits: Any) -> Path:
    file = folder / "splits_final.json"
    file.write_text(splits if isinstance(splits, str) else json.dumps(splits))
    return file


def test_cases_are_sorted_and_their_channels_in_order(tmp_path: Path) -> None:
    folder = touch(tmp_path, "b_0001.nii.gz", "a_2_0000.nii.gz", "b_0000.nii.gz", "a_2_0001.nii.gz")
    cases, problems = find_raw_cases(folder, ".nii.gz", 2)
    assert problems == []
    assert cases == [
        RawCase("a_2", (folder / "a_2_0000.nii.gz", folder / "a_2_0001.nii.gz")),
        RawCase("b", (folder / "b_0000.nii.gz", folder / "b_0001.nii.gz")),
    ]


def test_every_incomplete_case_is_named_with_its_files(tmp_path: Path) -> None:
    folder = touch(
        tmp_path,
        *("missing_0001.nii.gz", "extra_0000.nii.gz", "extra_0001.nii.gz", "extra_0002.nii.gz", "plain.nii.gz"),
        *("short_000.nii.gz", "x_seg_0000.nii.gz", "x_seg_0001.nii.gz", "good_0000.nii.gz", "good_0001.nii.gz"),
    )
    cases, problems = find_raw_cases(folder, ".nii.gz", 2)
    assert [case.identifier for case in cases] == ["good"]
    found = {problem.identifier: problem.reason for problem in problems}
    assert list(found) == ["extra", "missing", "plain", "short_000", "x_seg"]
    assert found["missing"] == "missing missing_0000.nii.gz"
    assert "extra_0002.nii.gz" in found["extra"] and "extra_0001" not in found["extra"]
    assert found["plain"] == "plain.nii.gz has no channel number; name it plain_0000.nii.gz"
    assert "rename" in found["x_seg"]


def test_only_visible_files_of_the_ending_count(tmp_path: Path) -> None:
    folder = touch(tmp_path, "._a_0000.nii.gz", ".DS_Store", "a_0000xnii.gz", "a_0000.nii.gz.part", "a_0000.json")
    (folder / "b_0000.nii.gz").mkdir()
    assert find_raw_cases(folder, ".nii.gz", 1) == ([], [])


def test_images_of_another_ending_are_named(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a_0000.nii", "a_0000.nii.gz", "b_0000.NII.GZ", "c.mha")
    cases, problems = find_raw_cases(folder, ".nii.gz", 1)
    assert [case.identifier for case in cases] == ["a"]
    assert [problem.identifier for problem in problems] == ["a_0000.nii", "b_0000.NII.GZ", "c.mha"]
    assert all("does not end in .nii.gz" in problem.reason for problem in problems)
    assert [case.identifier for case in find_raw_cases(folder, ".nii", 1)[0]] == ["a"]


@pytest.mark.parametrize("name", ["imagesUN", "images_un", "imagesUnlabeled", "imageUn", "unlabelled", "imgsUn"])
def test_a_folder_whose_name_is_almost_right_is_named(tmp_path: Path, name: str) -> None:
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs", "imagesTs_pred", name):
        (tmp_path / folder).mkdir()
    if (tmp_path / "imagesUn").is_dir():
        pytest.skip("the file system takes the two names for one")
    assert misnamed_folders(tmp_path) == [name]
    message = no_unlabeled_cases_message(tmp_path, tmp_path)
    assert f"has {name}, which nothing reads: unlabeled images belong in imagesUn. Put" in message
    (tmp_path / "imagesUn").mkdir()
    assert misnamed_folders(tmp_path) == []


def test_missing_folder_has_no_cases(tmp_path: Path) -> None:
    assert find_raw_cases(tmp_path / "imagesUn", ".nii.gz", 1) == ([], [])


def test_ending_is_no_pattern_and_digits_are_ascii(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a_0000.n+i", "b_٠٠٠٠.n+i")
    cases, problems = find_raw_cases(folder, ".n+i", 1)
    assert [case.identifier for case in cases] == ["a"]
    assert [problem.identifier for problem in problems] == ["b_٠٠٠٠"]


def test_labeled_cases_tell_how_many_files_a_case_has(tmp_path: Path) -> None:
    color = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    assert files_per_case(tmp_path, color) == 3
    touch(tmp_path / "imagesTr", "a_0000.png", "b_0000.png", "c_0000.png", "c_0001.png")
    assert files_per_case(tmp_path, color) == 1
    assert files_per_case(tmp_path, {**color, "dataset": {"a": {"images": ["x", "y"]}}}) == 2
    assert files_per_case(tmp_path, {"modality": {"0": "MR"}, "file_ending": ".nii"}) == 1


@pytest.fixture
def preprocessed(tmp_path: Path) -> Path:
    """UN1 is complete; UN2 lacks a file, UN3 failed, UN4 has no record. L1 to L3 are labeled."""
    folder = unlabeled_folder(tmp_path, IDENTIFIER)
    for name in ("UN1", "UN2", "UN3", "UN4"):
        touch(folder, f"{name}.b2nd", f"{name}_seg.b2nd", f"{name}.pkl")
    (folder / "UN2_seg.b2nd").unlink()
    records = touch(records_folder(tmp_path, IDENTIFIER))
    for name, status in (("UN1", "ok"), ("UN2", "ok"), ("UN3", "failed")):
        (records / f"{name}.json").write_text(json.dumps({"status": status}))
    touch(tmp_path / IDENTIFIER, "L1.b2nd", "L2.b2nd", "L3.npz")
    return tmp_path


def test_union_of_imagesun_and_the_folds_list(preprocessed: Path) -> None:
    write_splits(preprocessed, [{"train": ["L1"], "val": [], "unlabeled": ["L3", "L2"]}])
    folder, labeled = unlabeled_folder(preprocessed, IDENTIFIER), preprocessed / IDENTIFIER
    assert list(ready_cases(preprocessed, IDENTIFIER)) == ["UN1"]
    assert collect_unlabeled_cases(preprocessed, IDENTIFIER, 0) == [
        UnlabeledCase("UN1", folder, "imagesUn"),
        UnlabeledCase("L2", labeled, "imagesTr"),
        UnlabeledCase("L3", labeled, "imagesTr"),
    ]
    assert collect_unlabeled_cases(preprocessed, IDENTIFIER, "all") == [UnlabeledCase("UN1", folder, "imagesUn")]


def test_nothing_there_is_an_empty_list(tmp_path: Path) -> None:
    assert collect_unlabeled_cases(tmp_path, IDENTIFIER, 0) == []


@pytest.mark.parametrize("name", ["L9", "../nnUNetPlans_3d_fullres/L2"])
def test_listed_case_that_is_not_preprocessed(preprocessed: Path, name: str) -> None:
    write_splits(preprocessed, [{"train": ["L1"], "val": [], "unlabeled": ["L2", name]}])
    with pytest.raises(UserError, match=f"names {name}, but .*nnUNetPlans_3d_fullres contains no such case"):
        collect_unlabeled_cases(preprocessed, IDENTIFIER, 0)


def test_case_in_train_and_unlabeled(preprocessed: Path) -> None:
    write_splits(preprocessed, [{"train": ["L1", "L2"], "val": [], "unlabeled": ["L2"]}])
    with pytest.raises(UserError, match="lists L2 as 'train' and as 'unlabeled'"):
        collect_unlabeled_cases(preprocessed, IDENTIFIER, 0)


@pytest.mark.parametrize(
    ("names", "state"),
    [
        (None, "does not exist"),
        ([], "is empty"),
        (["a_0000.mha", "b_0000.mha"], "contains 2 files, but none ends in .nii.gz"),
        (["a.nii.gz"], "contains no case that can be preprocessed"),
    ],
)
def test_message_says_where_it_looked_and_what_to_do(tmp_path: Path, names: list[str] | None, state: str) -> None:
    if names is not None:
        touch(tmp_path / "imagesUn", *names)
    message = no_unlabeled_cases_message(tmp_path, tmp_path, 3)
    assert f"{tmp_path / 'imagesUn'} {state}" in message
    assert "fold 3" in message and "nnunet-ssl split" in message and "CASE_0000.nii.gz" in message
