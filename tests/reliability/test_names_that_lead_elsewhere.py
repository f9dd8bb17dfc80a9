"""Names from others that would lead out of their folder: none is followed."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from untrusted import CASES, PLANS, Call, Home, home_of_the_user

from nnunet_ssl.data.conversion import convert_dataset
from nnunet_ssl.data.few_labels import split_dataset
from nnunet_ssl.data.splits import write_splits
from nnunet_ssl.data.unlabeled_cases import collect_unlabeled_cases, ready_cases
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_text


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    return home_of_the_user(tmp_path, monkeypatch)


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("links are not allowed here")


ELSEWHERE = (
    "../../../outside/file",
    "../nnUNetPlans_3d/case_3",
    "..\\..\\..\\outside\\file",
    "{outside}/file",
    "C:\\outside\\file",
    "folder/case_3",
    "./case_3",
    "..",
    ".",
    "",
    "case_3\0",
)


@pytest.fixture(params=ELSEWHERE, ids=repr)
def elsewhere(request, home) -> str:
    """A name; what it would find outside is complete, and has code in its properties."""
    for ending in (".b2nd", "_seg.b2nd"):
        (home.outside / f"file{ending}").write_bytes(b"")
    (home.outside / "file.pkl").write_bytes(pickle.dumps(Call(os.mkdir, str(home.outside / "harm"))))
    home.expect()
    return request.param.replace("{outside}", str(home.outside))


def test_an_unlabeled_list_names_cases_of_its_dataset_only(elsewhere, home) -> None:
    splits = [{"train": CASES[:2], "val": CASES[2:3], "unlabeled": [elsewhere]}]
    home.write(home.preprocessed / "splits_final.json", splits)
    with pytest.raises(UserError, match="contains no such case"):
        collect_unlabeled_cases(home.preprocessed, "nnUNetPlans_3d", 0)
    home.assert_nothing_happened_outside()


def test_splitting_takes_names_for_names(elsewhere, home) -> None:
    splits = [{"train": [elsewhere, *CASES[:2]], "val": [elsewhere], "unlabeled": [elsewhere]}]
    home.write(home.preprocessed / "splits_final.json", splits)
    (home.preprocessed / "gt_segmentations").mkdir()
    for case in CASES:
        (home.preprocessed / "gt_segmentations" / f"{case}.nii.gz").touch()
    names = sorted(path.name for path in home.preprocessed.iterdir())
    split_dataset(home.preprocessed, home.raw, labeled="1", seed=1)
    assert sorted(path.name for path in home.preprocessed.iterdir()) == sorted([*names, "splits_final.json.bak"])
    home.assert_nothing_happened_outside()


def test_the_plans_folder_of_images_is_in_the_dataset(elsewhere, home) -> None:
    plans = copy.deepcopy(PLANS)
    plans["configurations"]["3d"]["data_identifier"] = elsewhere
    (home.raw / "imagesUn").mkdir()
    for use in (
        lambda: home.preprocess(plans),
        lambda: ready_cases(home.preprocessed, elsewhere),
        lambda: collect_unlabeled_cases(home.preprocessed, elsewhere, 0),
    ):
        with pytest.raises(UserError, match=r"data_identifier is .*, which is not a folder name"):
            use()
    home.assert_nothing_happened_outside()


def test_records_of_cases_that_are_gone_take_nothing_else_along(elsewhere, home) -> None:
    record = {
        "status": "ok",
        "identifier": elsewhere,
        "sources": [{"name": elsewhere, "size": 0, "mtime_ns": 0}],
        "warnings": [],
        "signature": {"shape": [1, 1, 1, 1], "values": []},
        "format_version": 1,
        "fingerprint": elsewhere,
    }
    for folder in (home.raw / "imagesUn", home.unlabeled, home.records):
        folder.mkdir()
    flat = elsewhere.translate(dict.fromkeys(map(ord, "/:\0" if os.name != "nt" else '/\\:\0"'), "_"))
    for ending in (".b2nd", "_seg.b2nd"):
        (home.unlabeled / f"{flat}{ending}").touch()
    (home.unlabeled / f"{flat}.pkl").write_bytes(pickle.dumps(Call(os.mkdir, str(home.outside / "harm"))))
    home.write(home.records / f"{flat}.json", record)
    home.preprocess()
    assert ready_cases(home.preprocessed, "nnUNetPlans_3d") == {}
    assert sorted(path.name for path in home.labeled.iterdir()) == sorted(
        f"{case}{ending}" for case in CASES for ending in (".b2nd", "_seg.b2nd", ".pkl")
    )
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("linked", ["unlabeled", "records"])
def test_nothing_is_removed_through_a_linked_folder(linked, home) -> None:
    (home.raw / "imagesUn").mkdir()
    link(getattr(home, linked), home.outside)
    with pytest.raises(UserError, match="is a link"):
        home.preprocess()
    home.assert_nothing_happened_outside()


def test_a_preprocessed_case_replaces_links_and_not_where_they_lead(home) -> None:
    (home.raw / "imagesUn").mkdir()
    image = sitk.GetImageFromArray(np.random.default_rng(0).uniform(50, 150, (8, 9, 10)).astype(np.float32))
    sitk.WriteImage(image, str(home.raw / "imagesUn" / "new_0000.nii.gz"))
    for folder, ending in ((home.unlabeled, ".pkl"), (home.unlabeled, ".b2nd"), (home.records, ".json")):
        link(folder / f"new{ending}", home.outside / "file.txt")
    assert home.preprocess().done == ["new"]
    assert not any(path.is_symlink() for folder in (home.unlabeled, home.records) for path in folder.iterdir())
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("target", ["file.txt", "new.txt"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        (".evaluation.json.PID", lambda folder: write_text(folder / "evaluation.json", "{}")),
        (".splits_final.json.PID", lambda folder: write_splits(folder / "splits_final.json", [])),
        ("splits_final.json.bak", lambda folder: split_dataset(folder, None, labeled="1")),
        ("splits_final.json", lambda folder: split_dataset(folder, None, labeled="1")),
        ("evaluation.json", lambda folder: write_text(folder / "evaluation.json", "{}")),
    ],
)
def test_nothing_is_written_through_a_link(name, write, target, home) -> None:
    name = name.replace("PID", str(os.getpid()))
    (home.preprocessed / "gt_segmentations").mkdir()
    for number in range(6):
        (home.preprocessed / "gt_segmentations" / f"case_{number}.nii.gz").touch()
    if name == "splits_final.json":
        (home.preprocessed / name).unlink()
        if target == "file.txt":
            home.write(home.outside / target, [{"train": CASES[:2], "val": CASES[2:]}])
            home.expect()
    link(home.preprocessed / name, home.outside / target)
    write(home.preprocessed)
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("name", ["..hidden", "-o", "a b", "a\nb", "..\\..\\outside", "$(mkdir harm)", "a;mkdir harm"])
def test_a_download_names_files_of_its_dataset_only(name, home) -> None:
    source = home.root / "given" / "download"
    for case in [*(f"CASE{number}" for number in range(5)), name]:
        try:
            (source / "Training Set" / case).mkdir(parents=True)
        except OSError:
            pytest.skip("no name of a folder here")
        for file, array in (("lgemri.nrrd", np.zeros((4, 4, 4))), ("laendo.nrrd", np.full((4, 4, 4), 255))):
            sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.uint8)), source / "Training Set" / case / file)
    report = convert_dataset("la", source, home.root / "raw" / "Dataset008_LA", labeled="1")
    assert report.train == [f"CASE{number}" for number in range(5)]
    assert [problem.identifier for problem in report.failed] == [name]
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("line", ["../../outside/file", "/outside/file", "CASE0/../../file", "CASE0\\..\\file"])
def test_a_list_of_test_cases_names_cases_only(line, home) -> None:
    source = home.root / "given" / "download"
    for number in range(5):
        (source / f"CASE{number}").mkdir(parents=True)
        for file in ("lgemri.nrrd", "laendo.nrrd"):
            (source / f"CASE{number}" / file).touch()
    (source / "test.list").write_text(f"{line}\n")
    with pytest.raises(UserError, match="is not a case of this dataset"):
        convert_dataset("la", source, home.root / "raw" / "Dataset008_LA", labeled="1")
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("record", [{"dataset": "la", "source": "../../outside"}, ["../../outside"], "../outside", 1])
def test_a_record_of_a_conversion_is_compared_and_not_followed(record, home) -> None:
    source, dataset = home.root / "given" / "download", home.root / "raw" / "Dataset008_LA"
    for number in range(6):
        (source / f"CASE{number}").mkdir(parents=True)
        for file in ("lgemri.nrrd", "laendo.nrrd"):
            (source / f"CASE{number}" / file).touch()
    dataset.mkdir()
    home.write(dataset / "conversion.json", record)
    with pytest.raises(UserError, match="was converted from something else"):
        convert_dataset("la", source, dataset, labeled="1")
    assert [path.name for path in dataset.iterdir()] == ["conversion.json"]
    home.assert_nothing_happened_outside()
