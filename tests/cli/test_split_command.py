from __future__ import annotations

import json

import pytest

from nnunet_ssl.cli.main import main
from nnunet_ssl.data.phantoms import write_phantom_dataset
from nnunet_ssl.trainer_lookup import RECOMMENDED


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Six labeled cases in nnUNet_raw, nothing preprocessed."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    write_phantom_dataset(
        tmp_path / "nnUNet_raw" / "Dataset042_P",
        labeled=6,
        unlabeled=0,
        validation=0,
        test=0,
        seed=0,
        shape=(8, 10, 10),
    )
    return tmp_path / "nnUNet_preprocessed" / "Dataset042_P" / "splits_final.json"


def test_split_prints_a_table_and_writes_the_folds(dataset, capsys):
    assert main(["split", "-d", "42", "--labeled", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fold", "labeled", "unlabeled", "validation"]
    splits = json.loads(dataset.read_text())
    assert [[int(cell) for cell in line.split()] for line in lines[2:7]] == [
        [number, 2, len(fold["unlabeled"]), len(fold["val"])] for number, fold in enumerate(splits)
    ]
    assert str(dataset) in "\n".join(lines)
    assert lines[-1] == f"Train with: nnUNetv2_train Dataset042_P CONFIGURATION 0 -tr {RECOMMENDED}"


def test_append_says_which_fold_to_train(dataset, capsys):
    assert main(["split", "-d", "Dataset042_P", "--labeled", "50%", "-f", "1", "--append", "--seed", "3"]) == 0
    assert "nnUNetv2_train Dataset042_P CONFIGURATION 5 " in capsys.readouterr().out
    splits = json.loads(dataset.read_text())
    assert len(splits) == 6 and "unlabeled" not in splits[1]
    assert splits[5]["val"] == splits[1]["val"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "42", "--labeled", "9"], "Asked for 9"),
        (["-d", "42", "--labeled", "few"], "'few'"),
        (["-d", "43", "--labeled", "1"], "43"),
        (["-d", "P", "--labeled", "1"], "P"),
        (["-d", "42", "--labeled", "1", "-f", "5"], "no fold 5"),
        (["-d", "42", "--labeled", "1", "--seed", "-1"], "--seed"),
    ],
)
def test_mistakes_are_explained(dataset, capsys, arguments, message):
    assert main(["split", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnunet-ssl split: error: ") and message in error
    assert not dataset.exists()


@pytest.mark.parametrize("options", [[], ["--append"], ["-f", "0"]])
def test_a_file_without_folds_is_explained(dataset, capsys, options):
    dataset.parent.mkdir()
    dataset.write_text("[]")
    assert main(["split", "-d", "42", "--labeled", "1", *options]) == 2
    assert f"{dataset} contains no fold. Move it away" in capsys.readouterr().err
    assert dataset.read_text() == "[]"


def test_needs_nnunet_preprocessed(dataset, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_preprocessed")
    assert main(["split", "-d", "42", "--labeled", "2"]) == 2
    assert "nnUNet_preprocessed is not set" in capsys.readouterr().err


def test_a_single_labeled_case_makes_a_fold_without_validation(dataset, capsys):
    for folder in ("imagesTr", "labelsTr"):
        for file in sorted((dataset.parents[2] / "nnUNet_raw" / "Dataset042_P" / folder).iterdir())[1:]:
            file.unlink()
    assert main(["split", "-d", "42", "--labeled", "100%"]) == 0
    assert "Note: fold 0 has no validation case." in capsys.readouterr().out
    (fold,) = json.loads(dataset.read_text())
    assert len(fold["train"]) == 1 and fold["val"] == fold["unlabeled"] == []
