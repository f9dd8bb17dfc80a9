from __future__ import annotations

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.cli.main import main


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """nnU-Net's folders, empty, and a download of the left atrium with seven training cases and a test case."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    for number in range(8):
        folder = tmp_path / "download" / ("Training Set" if number < 7 else "Testing Set") / f"CASE{number}"
        folder.mkdir(parents=True)
        label = np.zeros((4, 6, 8), np.uint8)
        label[1:3, 2:4, 3:5] = 255
        image = np.random.default_rng(number).integers(0, 255, label.shape).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / "lgemri.nrrd"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "laendo.nrrd"))
    return tmp_path


def convert(folders, *options: str) -> int:
    return main(["convert", "la", str(folders / "download"), "-d", "42", *options])


def test_convert_writes_a_dataset_and_its_folds(folders, capsys):
    assert convert(folders, "--labeled", "2") == 0
    output = capsys.readouterr().out
    raw = folders / "nnUNet_raw" / "Dataset042_LA2018"
    assert f"{raw}: 7 training cases, 1 test cases (8 converted now), 0 left out" in output
    assert sorted(path.name for path in raw.iterdir()) == [
        "conversion.json",
        "dataset.json",
        "imagesTr",
        "imagesTs",
        "labelsTr",
        "labelsTs",
    ]
    file = folders / "nnUNet_preprocessed" / raw.name / "splits_final.json"
    folds = json.loads(file.read_text())
    assert [len(fold["train"]) for fold in folds] == [2] * 5 and str(file) in output
    assert "CASE7" not in file.read_text()
    assert "nnUNetv2_plan_and_preprocess -d 42" in output
    assert convert(folders, "--labeled", "2") == 0
    assert "(0 converted now)" in capsys.readouterr().out


def test_split_goes_on_from_these_folds(folders, capsys):
    assert convert(folders, "--labeled", "2", "--name", "Atrium") == 0
    assert main(["split", "-d", "42", "--labeled", "3"]) == 0
    file = folders / "nnUNet_preprocessed" / "Dataset042_Atrium" / "splits_final.json"
    assert [len(fold["train"]) for fold in json.loads(file.read_text())] == [3] * 5
    assert file.with_name("splits_final.json.bak").is_file()


def test_a_bad_case_is_named_and_the_exit_code_is_1(folders, capsys):
    (folders / "download" / "Training Set" / "CASE3" / "laendo.nrrd").unlink()
    assert convert(folders, "--labeled", "2") == 1
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.startswith("CASE3")]
    assert "no label" in line and "6 training cases" in output
    assert "CASE3" not in (folders / "nnUNet_preprocessed" / "Dataset042_LA2018" / "splits_final.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labeled", "9"], "Asked for 9"),
        (["--labeled", "2", "--seed", "-1"], "--seed"),
        (["--labeled", "2", "--name", "../LA"], "--name"),
        (["--labeled", "2", "-d", "1000"], "-d is 1000"),
        (["--labeled", "2", "--test-list", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_mistakes_are_explained(folders, capsys, options, message):
    assert convert(folders, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnunet-ssl convert: error: ") and message in error
    assert not list((folders / "nnUNet_raw").iterdir())


def test_a_number_that_is_taken(folders, capsys):
    (folders / "nnUNet_preprocessed" / "Dataset042_Other").mkdir()
    assert convert(folders, "--labeled", "2") == 2
    assert "taken by Dataset042_Other" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_a_file_in_place_of_nnunets_folder(folders, monkeypatch, capsys, variable):
    (folders / "file").write_text("")
    monkeypatch.setenv(variable, str(folders / "file"))
    assert convert(folders, "--labeled", "2") == 2
    error = capsys.readouterr().err
    assert "file is not a folder" in error and variable in error
    assert not list((folders / "nnUNet_raw").iterdir()) and not list((folders / "nnUNet_preprocessed").iterdir())


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_nnunets_folder_without_permission_to_write(folders, monkeypatch, capsys, variable):
    closed, access = folders / variable, os.access
    monkeypatch.setattr(os, "access", lambda file, mode: access(file, mode) and not (mode & os.W_OK and file == closed))
    assert convert(folders, "--labeled", "2") == 2
    error = capsys.readouterr().err
    assert f"Nothing can be written to {closed}." in error and f"the environment variable {variable}" in error
    assert not list((folders / "nnUNet_raw").iterdir()) and not list((folders / "nnUNet_preprocessed").iterdir())


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_needs_nnunets_folders(folders, monkeypatch, capsys, variable):
    monkeypatch.delenv(variable)
    assert convert(folders, "--labeled", "2") == 2
    assert f"{variable} is not set" in capsys.readouterr().err
