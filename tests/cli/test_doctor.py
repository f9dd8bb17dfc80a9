from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from doctor_dataset import CASES, SPLITS, Dataset, made, report

from nnunet_ssl.cli import doctor
from nnunet_ssl.cli.findings import Finding, ok
from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.cli.main import main


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    return made(tmp_path, monkeypatch)


def test_a_dataset_that_is_ready(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    before = dataset.listing()
    assert main(["doctor", "-d", "7", "-c", "2d_child"]) == 0
    text = capsys.readouterr().out
    assert "FAIL" not in text
    assert "ok    nnU-Net finds UniMatchTrainer (of nnunet_ssl.methods.unimatch)" in text
    assert "1 unlabeled cases in" in text and "2 in the 'unlabeled' list of fold 0" in text
    assert "fold 0: 2 labeled, 3 unlabeled (1 not preprocessed yet), 2 validation cases" in text
    assert "memory_mode = 'split'" in text
    assert "(batches of 4 + 4)" in text
    assert dataset.listing() == before, "the doctor changes nothing"


def test_without_a_dataset_only_the_installation_is_checked(dataset: Dataset) -> None:
    lines = report()
    assert not [line for line in lines if line.startswith("FAIL")]
    assert not [line for line in lines if "Dataset007" in line]


def test_without_a_configuration_the_known_ones_are_named(dataset: Dataset) -> None:
    assert [line for line in report("-d", "Dataset007_Tiny") if "2d, 2d_child" in line and line.startswith("ok")]


def _no_plans(dataset: Dataset) -> None:
    (dataset.preprocessed / "nnUNetPlans.json").unlink()


def _no_json(dataset: Dataset) -> None:
    (dataset.preprocessed / "dataset.json").write_text("{")


def _bad_setting(dataset: Dataset) -> None:
    dataset.plans["configurations"]["2d"]["semi_supervised"] = {"ramp_lenght": 0.1}
    dataset.write()


def _not_preprocessed(dataset: Dataset) -> None:
    for path in dataset.labeled.iterdir():
        path.unlink()


def _some_not_preprocessed(dataset: Dataset) -> None:
    dataset.dataset_json["numTraining"] = 9
    dataset.write()


def _fold_names_a_stranger(dataset: Dataset) -> None:
    dataset.write_splits([{"train": ["stranger"], "val": CASES[:2]}])


def _fold_out_of_range(dataset: Dataset) -> None:
    dataset.write_splits([])


def _few_cases_and_no_splits(dataset: Dataset) -> None:
    (dataset.preprocessed / "splits_final.json").unlink()
    for file in [*dataset.labeled.glob(f"{CASES[0]}*"), *dataset.labeled.glob(f"{CASES[1]}*")]:
        file.unlink()


def _no_validation_case(dataset: Dataset) -> None:
    dataset.write_splits([{**SPLITS[0], "val": []}])


def _no_training_case(dataset: Dataset) -> None:
    dataset.write_splits([{**SPLITS[0], "train": []}])


def _cases_in_no_list(dataset: Dataset) -> None:
    dataset.write_splits([{"train": CASES[:2], "val": CASES[2:4]}])


def _byte_order_mark(name: str) -> Callable[[Dataset], None]:
    def mark(dataset: Dataset) -> None:
        file = dataset.preprocessed / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())

    return mark


def _broken_fingerprint(dataset: Dataset) -> None:
    (dataset.preprocessed / "dataset_fingerprint.json").write_text('{"spacings": [')


def _labeled_and_unlabeled(dataset: Dataset) -> None:
    dataset.write_splits([{**SPLITS[0], "unlabeled": CASES[1:2]}])


def _leak_by_name(dataset: Dataset) -> None:
    dataset.write_splits([{**SPLITS[0], "unlabeled": CASES[2:3]}])


def _leak_by_image(dataset: Dataset) -> None:
    image = np.random.default_rng(1).normal(size=(1, 1, 32, 48)).astype(np.float32)
    dataset.write_case(CASES[2], image)
    dataset.write_case(CASES[4], image)


def _leak_by_file(dataset: Dataset) -> None:
    """A copy that is not preprocessed yet."""
    (dataset.raw / "imagesTr" / "case_2_0000.nii.gz").write_bytes(b"an image")
    (dataset.raw / "imagesTr" / "case_0_0000.nii.gz").write_bytes(b"an Image")
    (dataset.raw / "imagesUn" / "new_1_0000.nii.gz").write_bytes(b"an image")


def _leak_by_file_without_splits(dataset: Dataset) -> None:
    """nnU-Net's own fold 0 validates some of them."""
    (dataset.preprocessed / "splits_final.json").unlink()
    for case in CASES:
        (dataset.raw / "imagesTr" / f"{case}_0000.nii.gz").write_bytes(case.encode())
        (dataset.raw / "imagesUn" / f"new_{case}_0000.nii.gz").write_bytes(case.encode())


def _copied_training_image(dataset: Dataset) -> None:
    (dataset.raw / "imagesTr" / "case_0_0000.nii.gz").write_bytes(b"an image")
    (dataset.raw / "imagesUn" / "new_1_0000.nii.gz").write_bytes(b"an image")


def _other_folder(dataset: Dataset) -> None:
    (dataset.raw / "imagesUn").rename(dataset.raw / "images_unlabeled")


def _other_ending(dataset: Dataset) -> None:
    (dataset.raw / "imagesUn" / "more_0000.nii").touch()


def _settings_elsewhere(dataset: Dataset) -> None:
    dataset.plans["semi_supervised"] = {"ramp_length": 0}
    dataset.write()


def _settings_under_another_name(dataset: Dataset) -> None:
    dataset.plans["configurations"]["2d"]["semisupervised"] = {"ramp_length": 0}
    dataset.write()


def _plans_of_a_pretraining(dataset: Dataset) -> None:
    """As nnU-Net's nnUNetv2_plan_like_dynamic leaves them, after 2.8.1."""
    dataset.plans["pretrain_info"] = {"checkpoint_path": "x.pth"}
    dataset.write()


def _no_unlabeled(dataset: Dataset) -> None:
    (dataset.raw / "imagesUn" / "new_0_0000.nii.gz").unlink()
    dataset.write_splits([{"train": CASES[:2], "val": CASES[2:4]}])


def _wrong_name(dataset: Dataset) -> None:
    (dataset.raw / "imagesUn" / "odd.nii.gz").touch()


def _failed_before(dataset: Dataset) -> None:
    from nnunet_ssl.data.records import records_folder

    folder = records_folder(dataset.preprocessed, "nnUNetPlans_2d")
    folder.mkdir()
    (folder / "new_0.json").write_text(json.dumps({"status": "failed", "reason": "all voxels have one value"}))


@pytest.mark.parametrize(
    ("spoil", "level", "expected"),
    [
        (_no_plans, "FAIL", "nnUNetPlans.json. Run nnUNetv2_plan_and_preprocess -d 7 -c 2d"),
        (_no_json, "FAIL", "dataset.json is not valid JSON"),
        (_bad_setting, "FAIL", "'ramp_lenght'"),
        (_not_preprocessed, "FAIL", "no preprocessed case: nnUNetv2_plan_and_preprocess -d 7 -c 2d"),
        (_some_not_preprocessed, "warn", "6 of 9 preprocessed cases"),
        (_fold_names_a_stranger, "FAIL", "name stranger, but"),
        (_fold_out_of_range, "warn", "draws a random 80 %"),
        (_few_cases_and_no_splits, "FAIL", "nnunet-ssl split -d Dataset007_Tiny --labeled 100%"),
        (_few_cases_and_no_splits, "FAIL", "nnUNetv2_train Dataset007_Tiny 2d all -tr UniMatchTrainer"),
        (_no_validation_case, "warn", "no case in the 'val' list of fold 0"),
        (_no_training_case, "FAIL", "no case in the 'train' list of fold 0"),
        (_cases_in_no_list, "warn", "2 labeled case(s) are in no list of fold 0"),
        (_byte_order_mark("splits_final.json"), "FAIL", "splits_final.json begins with a byte-order mark"),
        (_byte_order_mark("dataset.json"), "FAIL", "dataset.json begins with a byte-order mark"),
        (_byte_order_mark("nnUNetPlans.json"), "FAIL", "nnUNetPlans.json begins with a byte-order mark"),
        (_broken_fingerprint, "FAIL", "dataset_fingerprint.json is not valid JSON"),
        (_labeled_and_unlabeled, "FAIL", "case_1"),
        (_leak_by_file, "FAIL", "imagesUn/new_1 = imagesTr/case_2"),
        (_leak_by_file_without_splits, "FAIL", "unlabeled case(s) are validation cases of this fold"),
        (_copied_training_image, "warn", "same image as a labeled training case: imagesUn/new_1 = imagesTr/case_0"),
        (_other_folder, "warn", "has images_unlabeled, which nothing reads"),
        (_other_ending, "warn", "more_0000.nii is left out: it does not end in .nii.gz"),
        (_settings_elsewhere, "FAIL", "outside of the configurations"),
        (_settings_under_another_name, "FAIL", "'semisupervised', which nothing reads"),
        (_plans_of_a_pretraining, "warn", "nnunet-ssl adapt -p nnUNetPlans, and start with -pretrained_weights"),
        (_leak_by_name, "FAIL", "imagesTr/case_2"),
        (_leak_by_image, "FAIL", "imagesTr/case_4 = imagesTr/case_2"),
        (_no_unlabeled, "FAIL", "nnunet-ssl split"),
        (_wrong_name, "warn", "name it odd_0000.nii.gz"),
        (_failed_before, "warn", "new_0 could not be preprocessed: all voxels have one value"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_what_is_wrong_with_a_dataset_is_found(
    dataset: Dataset, spoil: Callable[[Dataset], None], level: str, expected: str
) -> None:
    sound = report("-d", "7", "-c", "2d")
    assert not [line for line in sound if line.startswith(level) and expected in line]
    spoil(dataset)
    lines = report("-d", "7", "-c", "2d")
    assert [line for line in lines if line.startswith(level) and expected in line], "\n".join(lines)
    assert not [line for line in lines if "this check failed" in line]


def test_a_broken_file_that_several_checks_read_is_told_once(dataset: Dataset) -> None:
    (dataset.preprocessed / "splits_final.json").write_text("[{")
    failed = [line for line in report("-d", "7", "-c", "2d") if line.startswith("FAIL")]
    assert len(failed) == 1 and "splits_final.json" in failed[0]


@pytest.mark.parametrize("transductive", [{}, {"allow_transductive": True}])
def test_bad_settings_are_told_once_and_all_of_them(dataset: Dataset, transductive: dict[str, bool]) -> None:
    _leak_by_name(dataset)
    settings = {"ramp_length": 7, "memory_mode": "fast", "stupid": 1, **transductive}
    dataset.plans["configurations"]["2d"]["semi_supervised"] = settings
    dataset.write()
    lines = report("-d", "7", "-c", "2d")
    (line,) = [line for line in lines if "ramp_length" in line]
    assert line.startswith("FAIL") and "'ramp_length'" in line and "'memory_mode'" in line and "'stupid'" in line
    leaks = [line for line in lines if line.startswith("FAIL") and "imagesTr/case_2" in line]
    assert len(leaks) == (0 if transductive else 1), "the other checks still run, with the settings that are right"


def test_a_fold_that_is_not_there_is_refused_where_others_hide_labels(dataset: Dataset) -> None:
    (line,) = [line for line in report("-d", "7", "-c", "2d", "-f", "1") if line.startswith("FAIL")]
    assert "There is no fold 1" in line and "labels that fold(s) 0 hide" in line
    dataset.write_splits([{**SPLITS[0], "unlabeled": []}])
    lines = report("-d", "7", "-c", "2d", "-f", "1")
    assert [line for line in lines if line.startswith("warn") and "draws a random 80 %" in line]
    assert not [line for line in lines if line.startswith("FAIL")]


def test_nnunets_trainer_needs_validation_cases(dataset: Dataset) -> None:
    _no_validation_case(dataset)
    lines = report("-d", "7", "-c", "2d", "-tr", "nnUNetTrainer")
    about_it = [line for line in lines if "'val' list" in line]
    assert len(about_it) == 1 and about_it[0].startswith("FAIL")
    assert "nnU-Net's own trainers cannot train a fold without validation cases" in about_it[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-d", "8"], "Could not find a dataset with the ID 8"),
        (["-d", "x"], "dataset x"),
        (["-d", "7", "-c", "3d_fullres"], "no configuration 3d_fullres; it has 2d, 2d_child"),
        (["-d", "7", "-c", "2d", "-p", "Other"], "Other.json. Run nnUNetv2_plan_and_preprocess -d 7"),
        (["-d", "7", "-c", "2d", "-tr", "NoSuchTrainer"], "does not find the trainer NoSuchTrainer"),
    ],
)
def test_wrong_arguments(
    dataset: Dataset, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert expected in failed[0]


@pytest.mark.parametrize(
    "arguments", [["-c", "2d"], ["-d", "7", "-f", "first"], ["-d", "7", "--time"], ["-device", "cpu"]]
)
def test_arguments_without_sense_are_refused(arguments: list[str]) -> None:
    assert main(["doctor", *arguments]) == 2


def test_a_supervised_trainer_is_no_failure(dataset: Dataset) -> None:
    lines = report("-d", "7", "-c", "2d", "-tr", "nnUNetTrainer")
    assert [line for line in lines if line.startswith("warn") and "nnUNetTrainer is no semi-supervised" in line]
    assert not [line for line in lines if line.startswith("FAIL")]


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"])
def test_every_variable_is_missed(dataset: Dataset, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable)
    lines = report("-d", "7")
    assert [line for line in lines if line.startswith(f"FAIL  {variable} is not set: export {variable}=")]
    assert not [line for line in lines if "this check failed" in line]


def test_other_folders_of_trainers(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    (other / "package").mkdir(parents=True)
    (other / "package" / "__init__.py").touch()
    (other / "package" / "ATrainer.py").write_text("import no_such_module\n")
    (other / "sound.py").write_text("x = 1\n")
    folders = [str(trainers_folder()), str(other), str(tmp_path / "absent")]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(folders))
    warnings = [line for line in report() if line.startswith("warn")]
    assert [line for line in warnings if "package.ATrainer cannot be imported" in line and "no_such_module" in line]
    assert [line for line in warnings if "absent, which does not exist" in line]
    assert not [line for line in warnings if "sound" in line or "UniMatchTrainer" in line]

    monkeypatch.setenv("nnUNet_extTrainer", str(other))
    assert [line for line in report() if line.startswith("FAIL") and "does not hold" in line]


def test_a_check_that_breaks_does_not_stop_the_others(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Finding]:
        yield ok("first")
        raise ValueError("unforeseen")

    monkeypatch.setattr(doctor, "check_paths", broken)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "ok    first" in lines
    assert [line for line in lines if line.startswith("FAIL") and "ValueError: unforeseen" in line]
    assert [line for line in lines if "nnU-Net finds UniMatchTrainer" in line]
