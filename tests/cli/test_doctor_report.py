"""The report for an issue: what it shows, and what it does not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from test_doctor import CASES, Dataset

from nnunet_ssl import __version__
from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.cli.main import main
from nnunet_ssl.cli.report import Hidden, Training

PATIENT = "Jane Doe-1970.01"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, with nnU-Net's folders in it; a name with a space is what some have."""
    home = tmp_path / "jane doe"
    home.mkdir()
    monkeypatch.setenv("HOME" if os.name == "posix" else "USERPROFILE", str(home))
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(home / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    return home


@pytest.fixture
def dataset(home: Path) -> Dataset:
    """Ready to be trained, with a log that names a case and folders."""
    dataset = Dataset(home)
    (dataset.raw / "imagesUn" / f"{PATIENT}_0000.nii.gz").touch()
    fold = home / "results" / dataset.raw.name / "UniMatchTrainer__nnUNetPlans__2d" / "fold_0"
    fold.mkdir(parents=True)
    lines = [f"line {number}" for number in range(40)]
    lines += [
        f"{PATIENT}: loss is nan",
        f"File {home}/projects/secret study/train.py, line 3",
        f"{fold}/checkpoint.pth",
    ]
    (fold / "training_log_2026_1_1_00_00_00.txt").write_text("\n".join(lines), encoding="utf-8")
    return dataset


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["doctor", "--report", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out


def test_a_report_has_what_an_answer_needs(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = report(capsys, "-d", "7", "-c", "2d")
    assert code == 0
    first, *lines = text.splitlines()
    assert first == f"nnunet-ssl {__version__}: doctor --report -d 7 -c 2d -p nnUNetPlans -f 0 -tr UniMatchTrainer"
    assert [line for line in lines if line.startswith("[")] == ["[system]", "[checks]", "[plans]", "[log]"]
    assert [line for line in lines if line.startswith("ok    Python 3.") and ", nnunetv2 2." in line]
    assert "ok    nnUNet_raw=$nnUNet_raw" in lines
    assert "2d: patch 32 x 48, batch 4, spacing 1 x 1" in lines
    assert any("PlainConvUNet" in line and "[4, 8, 16]" in line for line in lines)
    assert any("2 unlabeled cases in $nnUNet_raw/Dataset007_Tiny/imagesUn" in line for line in lines)
    assert "line 39" in lines and "line 1" not in lines
    assert [line for line in lines if line.endswith(": loss is nan") and line.startswith("<case ")]
    folder = "$nnUNet_results/Dataset007_Tiny/UniMatchTrainer__nnUNetPlans__2d/fold_0"
    assert lines[-1].replace("\\", "/") == f"{folder}/checkpoint.pth"


def test_a_report_names_no_case_and_no_other_folder(
    dataset: Dataset, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.write_splits([{"train": ["stranger"], "val": CASES[:1], "unlabeled": CASES[2:3]}])
    (dataset.raw / "imagesUn" / "odd.nii.gz").touch()
    code, text = report(capsys, "-d", "7", "-c", "2d")
    assert code == 1 and "FAIL" in text and "<case" in text
    private = [*CASES, "new_0", PATIENT, "Jane", "stranger", "odd", "jane", "doe", "secret", str(home), sys.prefix]
    assert [name for name in private if name in text] == []


def test_what_an_acceptance_keeps_is_no_case(dataset: Dataset) -> None:
    """Otherwise a report after nnunet-ssl accept would hide the names of nnU-Net's own files."""
    kept = dataset.preprocessed / ".nnunet_ssl_accept" / "1" / "old"
    kept.mkdir(parents=True)
    (kept / "splits_final.json").touch()
    cases = Hidden.of(Training(dataset.raw.name, "2d", "nnUNetPlans", "0", "UniMatchTrainer")).cases
    assert "splits_final" not in cases and CASES[0] in cases


def test_a_report_on_what_is_broken(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "[plans]" not in report(capsys)[1]
    code, text = report(capsys, "-d", "7", "-c", "2d")
    assert code == 1 and "Could not find a dataset with the ID 7" in text
    dataset = Dataset(home)
    (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps({"configurations": {}}))
    (dataset.preprocessed / "splits_final.json").unlink()
    code, text = report(capsys, "-d", "7", "-c", "2d")
    assert code == 1 and "not available: " in text and "none: no such training has begun" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("split / stacked: 1.5 / 2.0", "split / stacked: 1.5 / 2.0"),
        ("https://github.com/MIC-DKFZ/nnUNet", "https://github.com/MIC-DKFZ/nnUNet"),
        ("in /data/study of jane/x", "in <path> of jane/x"),
        ('File "/opt/lib/module.py", line 3', 'File "<path>/module.py", line 3'),
        (r"C:\Users\jane\file.json is no JSON", "<path> is no JSON"),
        ("/elsewhere/Jane_Doe.nii.gz", "<path>"),
        ("/a/b:/c", "<path>:<path>"),
        ("12 cases, patient_1, patient_10 and xpatient_1", "12 cases, <case 1>, patient_10 and xpatient_1"),
        ("patient_1_0000.nii.gz", "<case 1>_0000.nii.gz"),
    ],
)
def test_what_is_left_of_a_line(line: str, expected: str) -> None:
    assert Hidden({}, {"patient_1": "<case 1>"}).replaced(line) == expected
