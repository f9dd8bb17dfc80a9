"""The real commands, as a user types them, on a tiny dataset; nothing in nnU-Net is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import method_steps
import numpy as np
import pytest
import SimpleITK as sitk
import torch

TRAINERS = tuple(f"{trainer.__name__}_short" for trainer in method_steps.TRAINERS)
TRAINER = TRAINERS[0]
# test_matrix.py trains another one by default, with fewer checks.
ONE_BY_DEFAULT = [TRAINER, *(pytest.param(trainer, marks=pytest.mark.slow) for trainer in TRAINERS[1:])]


def train(planned, *options: object, trainer: str = TRAINER, **kwargs):
    return planned.run(
        "nnUNetv2_train", planned.dataset_id, "tiny", 0, "-tr", trainer, "-device", "cpu", *options, **kwargs
    )


def predict(planned, output: Path, trainer: str = TRAINER, images: Path | None = None):
    return planned.run(
        "nnUNetv2_predict", "-d", planned.dataset_id, "-i", images or planned.raw / "imagesTs", "-o", output,
        "-c", "tiny", "-f", 0, "-tr", trainer, "-device", "cpu", "-npp", 1, "-nps", 1,
    )  # fmt: skip


def check_prediction(planned, output: Path) -> None:
    (case,) = planned.phantoms.test
    image = sitk.ReadImage(planned.raw / "imagesTs" / f"{case}_0000.nii.gz")
    prediction = sitk.ReadImage(output / f"{case}.nii.gz")
    assert prediction.GetSize() == image.GetSize() and prediction.GetSpacing() == pytest.approx(image.GetSpacing())
    assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_to_prediction_3d(trainer, planned_3d, tmp_path):
    folder = planned_3d.results(trainer)
    output = train(planned_3d, "--npz", trainer=trainer).stdout
    assert "4 unlabeled cases" in output and "Mean Validation Dice" in output
    unlabeled = planned_3d.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"
    assert {p.name for p in unlabeled.glob("*.pkl")} == {f"{case}.pkl" for case in planned_3d.phantoms.unlabeled}
    for name in ("checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "progress_ssl.png"):
        assert (folder / name).stat().st_size > 0
    assert not (folder / "checkpoint_latest.pth").exists() and not list(folder.glob("*.partial"))
    validation = folder / "validation"
    assert {p.stem for p in validation.glob("*.npz")} == set(planned_3d.phantoms.validation)
    assert 0 <= json.loads((validation / "summary.json").read_text())["foreground_mean"]["Dice"] <= 1

    predict(planned_3d, tmp_path / "predicted", trainer)
    check_prediction(planned_3d, tmp_path / "predicted")

    # Stock nnU-Net, without this package's trainers, predicts the same from the renamed checkpoint.
    exported = planned_3d.results("nnUNetTrainer")
    exported.mkdir(parents=True, exist_ok=True)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    torch.save({**checkpoint, "trainer_name": "nnUNetTrainer"}, exported / "checkpoint_final.pth")
    for name in ("plans.json", "dataset.json"):
        (exported.parent / name).write_bytes((folder.parent / name).read_bytes())
    predict(planned_3d, tmp_path / "stock", "nnUNetTrainer")
    (case,) = planned_3d.phantoms.test
    ours, stock = (
        sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / f / f"{case}.nii.gz")) for f in ("predicted", "stock")
    )
    assert np.array_equal(ours, stock)


@pytest.mark.parametrize("trainer", ONE_BY_DEFAULT)
def test_training_through_resume_to_prediction_2d(trainer, planned_2d, tmp_path):
    stopped = train(planned_2d, trainer=trainer, check=False, STOP_AFTER_EPOCHS="1")
    assert (
        stopped.returncode != 0 and "4 unlabeled cases" in stopped.stdout and "stopped for the test" in stopped.stdout
    )
    resumed = train(planned_2d, "--c", trainer=trainer).stdout
    assert "Epoch 1" in resumed and "Epoch 0" not in resumed
    predict(planned_2d, tmp_path, trainer)
    check_prediction(planned_2d, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_real_scans(trainer, planned_left_atrium, tmp_path):
    planned = planned_left_atrium
    stopped = train(planned, trainer=trainer, check=False, STOP_AFTER_EPOCHS="1").stdout
    assert "56 unlabeled cases, 8 labeled cases" in stopped and "stopped for the test" in stopped
    assert (planned.results(trainer) / "checkpoint_latest.pth").is_file()
    resumed = train(planned, "--c", trainer=trainer).stdout
    assert "Epoch 1" in resumed and "Epoch 0" not in resumed and "Mean Validation Dice" in resumed
    validated = planned.results(trainer) / "validation"
    assert {p.name for p in validated.glob("*.nii.gz")} == {f"{case}.nii.gz" for case in planned.phantoms.validation}
    held_back = tmp_path / "in"
    held_back.mkdir()
    (held_back / "LA_064_0000.nii.gz").symlink_to(planned.raw / "imagesTr" / "LA_064_0000.nii.gz")
    predict(planned, tmp_path / "out", trainer, images=held_back)
    image = sitk.ReadImage(held_back / "LA_064_0000.nii.gz")
    prediction = sitk.ReadImage(tmp_path / "out" / "LA_064.nii.gz")
    assert prediction.GetSize() == image.GetSize()
    # Predicted by the same network in another process: as in the validation of the training.
    assert np.array_equal(
        sitk.GetArrayFromImage(prediction), sitk.GetArrayFromImage(sitk.ReadImage(validated / "LA_064.nii.gz"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_validation_options_and_pretrained_weights(trainer, planned_3d, tmp_path):
    folder = planned_3d.results(trainer)
    train(planned_3d, trainer=trainer)
    before = (folder / "checkpoint_final.pth").read_bytes()
    for options in (["--val"], ["--val", "--val_best"]):
        assert "Mean Validation Dice" in train(planned_3d, *options, trainer=trainer).stdout
    assert (folder / "checkpoint_final.pth").read_bytes() == before
    pretrained = tmp_path / "pretrained.pth"
    pretrained.write_bytes(before)
    options = ["-pretrained_weights", pretrained, "--disable_checkpointing"]
    assert "Loading pretrained weights" in train(planned_3d, *options, trainer=trainer).stdout
    assert (folder / "checkpoint_final.pth").read_bytes() == before


@pytest.mark.slow
def test_the_validation_of_all_decoders_says_so(planned_3d):
    file = planned_3d.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["tiny_mean"] = {"inherits_from": "tiny", "semi_supervised": {"validate_with": "mean"}}
    file.write_text(json.dumps(plans))
    trainer = "MutualReliableTrainer_short"
    output = planned_3d.run(
        "nnUNetv2_train", planned_3d.dataset_id, "tiny_mean", 0, "-tr", trainer, "-device", "cpu"
    ).stdout
    assert "mean probability (validate_with): nnUNetv2_predict uses only decoder a" in output
    assert "Mean Validation Dice" in output


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_killed_training_continues(trainer, planned_2d):
    (planned_2d.root / "trainers" / "short.py").write_text(
        (planned_2d.root / "trainers" / "short.py").read_text().replace("= 2, 3, 2", "= 40, 3, 2")
    )
    folder = planned_2d.results(trainer)
    for file in folder.glob("checkpoint_*"):
        file.unlink()
    command = [Path(sysconfig.get_path("scripts")) / "nnUNetv2_train", planned_2d.dataset_id, "tiny", 0]
    command += ["-tr", trainer, "-device", "cpu"]
    process = subprocess.Popen(
        list(map(str, command)), env=planned_2d.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    latest = folder / "checkpoint_latest.pth"
    deadline = time.time() + 180
    while not latest.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    epoch = torch.load(latest, weights_only=True)["current_epoch"]
    assert 0 < epoch < 40
    assert f"Epoch {epoch}" in train(planned_2d, "--c", trainer=trainer).stdout
    final = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert final["current_epoch"] == 40
    assert {len(values) for values in final["logging"].values()} == {40}


@pytest.mark.slow
def test_a_validation_image_among_the_unlabeled_stops_training(planned_2d, tmp_path):
    (case, *_) = planned_2d.phantoms.validation
    copy = planned_2d.raw / "imagesUn" / "copied_0000.nii.gz"
    copy.write_bytes((planned_2d.raw / "imagesTr" / f"{case}_0000.nii.gz").read_bytes())
    try:
        stopped = train(planned_2d, check=False)
        assert stopped.returncode == 1 and "Traceback" not in stopped.stdout
        assert "copied" in stopped.stdout and case in stopped.stdout and "allow_transductive" in stopped.stdout
    finally:
        copy.unlink()


def test_python_module_form_of_the_command_prints_the_trainers_folder():
    done = subprocess.run([sys.executable, "-m", "nnunet_ssl.cli.main", "trainers"], capture_output=True, text=True)
    assert {path.stem for path in Path(done.stdout.strip()).glob("*.py")} == {
        trainer.removesuffix("_short") for trainer in TRAINERS
    }
