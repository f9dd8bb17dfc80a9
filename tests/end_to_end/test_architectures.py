"""nnU-Net's ResEnc presets, a pretrained encoder, and networks that cannot be trained; by the real commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnssl_checkpoint import nnssl_checkpoint
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

TINY = {
    "n_stages": 3,
    "features_per_stage": [4, 6, 8],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 2, 1],
    "n_conv_per_stage_decoder": [1, 1],
}


def nnunet_ssl(planned, *arguments: object) -> str:
    command = [sys.executable, "-m", "nnunet_ssl.cli.main", *map(str, arguments)]
    done = subprocess.run(
        command, env=planned.environment, cwd=planned.root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def plan_preset(planned, preset: str) -> str:
    """Plan and preprocess as nnU-Net documents it, and add a configuration ``tiny``; returns the plans' name."""
    name = f"nnUNetResEncUNet{preset}Plans"
    planned.run("nnUNetv2_plan_experiment", "-d", planned.dataset_id, "-pl", f"nnUNetPlannerResEnc{preset}")
    planned.run(
        "nnUNetv2_preprocess", "-d", planned.dataset_id, "-plans_name", name, "-c", "3d_fullres", "-np", 1
    )  # fmt: skip
    file = planned.preprocessed / f"{name}.json"
    plans = json.loads(file.read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    assert architecture["network_class_name"].endswith(".ResidualEncoderUNet")
    architecture["arch_kwargs"] |= TINY
    plans["configurations"]["tiny"] = {
        "inherits_from": "3d_fullres",
        "patch_size": [12, 16, 20],
        "batch_size": 2,
        "architecture": architecture,
    }
    file.write_text(json.dumps(plans))
    return name


def train(planned, plans: str, trainer: str, *options: object, configuration: str = "tiny", **kwargs) -> str:
    return planned.run(
        "nnUNetv2_train", planned.dataset_id, configuration, 0, "-p", plans, "-tr", trainer, "-device", "cpu", *options,
        **kwargs,
    ).stdout  # fmt: skip


def check_prediction(planned, plans: str, trainer: str, output: Path) -> None:
    planned.run(
        "nnUNetv2_predict", "-d", planned.dataset_id, "-i", planned.raw / "imagesTs", "-o", output, "-c", "tiny",
        "-p", plans, "-f", 0, "-tr", trainer, "-device", "cpu", "-npp", 1, "-nps", 1,
    )  # fmt: skip
    (case,) = planned.phantoms.test
    image = sitk.ReadImage(planned.raw / "imagesTs" / f"{case}_0000.nii.gz")
    prediction = sitk.ReadImage(output / f"{case}.nii.gz")
    assert prediction.GetSize() == image.GetSize() and prediction.GetSpacing() == pytest.approx(image.GetSpacing())
    assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2}


def checkpoint_of(planned, plans: str, trainer: str) -> dict:
    folder = planned.root / "results" / planned.raw.name / f"{trainer}__{plans}__tiny" / "fold_0"
    return torch.load(folder / "checkpoint_final.pth", weights_only=True)


def pretrained_checkpoint(planned, plans: str) -> dict:
    """Of nnssl, with the architecture of the plans."""
    file = planned.preprocessed / f"{plans}.json"
    architecture = json.loads(file.read_text())["configurations"]["tiny"]["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"], 1, 1,
        deep_supervision=False,
    )  # fmt: skip
    return nnssl_checkpoint(network)


@pytest.mark.slow
def test_a_residual_preset_from_a_pretrained_encoder(planned_3d, tmp_path):
    trainer = "CrossMatchTrainer_short"
    assert "4 ready" in nnunet_ssl(planned_3d, "preprocess", "-d", planned_3d.dataset_id, "-c", "tiny")
    unlabeled = planned_3d.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"
    before = {file.name: file.stat().st_mtime_ns for file in unlabeled.iterdir()}
    plans = plan_preset(planned_3d, "M")

    checkpoint = pretrained_checkpoint(planned_3d, plans)
    torch.save(checkpoint, tmp_path / "nnssl.pth")
    options = ["-i", tmp_path / "nnssl.pth", "-d", planned_3d.dataset_id, "-c", "tiny", "-p", plans]
    printed = nnunet_ssl(planned_3d, "adapt", *options, "-o", tmp_path / "start.pth")
    assert f"-p {plans} -tr UniMatchTrainer -pretrained_weights {tmp_path / 'start.pth'}" in printed

    output = train(planned_3d, plans, trainer, "-pretrained_weights", tmp_path / "start.pth")
    assert "Loading pretrained weights from file" in output and "encoder.stem.convs.0.conv.weight shape" in output
    assert "4 unlabeled cases" in output and "Mean Validation Dice" in output
    # Both plans name the same preprocessed data, labeled and unlabeled, and neither does the other's work again.
    assert {file.name: file.stat().st_mtime_ns for file in unlabeled.iterdir()} == before
    check_prediction(planned_3d, plans, trainer, tmp_path / "predicted")
    trained = checkpoint_of(planned_3d, plans, trainer)["network_weights"]
    # Six steps do not lead far from where the training started.
    for name in ("encoder.stem.convs.0.conv.weight", "encoder.stages.2.blocks.0.conv1.conv.weight"):
        moved = (trained[name] - checkpoint["network_weights"][name]).norm()
        assert 0 < moved < 0.3 * checkpoint["network_weights"][name].norm()

    printed = nnunet_ssl(planned_3d, "plan-small", "-d", planned_3d.dataset_id, "-p", plans)
    assert f"nnUNetv2_train {planned_3d.dataset_id} 3d_small 0 -p {plans} -tr UniMatchTrainer_10epochs" in printed
    assert "Mean Validation Dice" in train(planned_3d, plans, "UniMatchTrainer_short", configuration="3d_small")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "trainer"),
    [
        ("M", "SimCVDTrainer_short"),
        ("L", "MutualReliableTrainer_short"),
        ("L", "CrossMatchTrainer_short"),
        ("XL", "SimCVDTrainer_short"),
    ],
)
def test_residual_presets(preset, trainer, planned_3d, tmp_path):
    plans = plan_preset(planned_3d, preset)
    output = train(planned_3d, plans, trainer)
    assert "4 unlabeled cases" in output and "Mean Validation Dice" in output
    check_prediction(planned_3d, plans, trainer, tmp_path)
    assert any(".blocks." in name for name in checkpoint_of(planned_3d, plans, trainer)["network_weights"])


PRIMUS = """
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer


class PrimusCrossMatchTrainer(CrossMatchTrainer):
    build_network_architecture = staticmethod(nnUNet_Primus_S_Trainer.build_network_architecture)
"""


def test_a_transformer_is_refused_before_anything_is_done(planned_3d):
    (planned_3d.root / "trainers" / "primus.py").write_text(PRIMUS)
    plans = json.loads((planned_3d.preprocessed / "nnUNetPlans.json").read_text()) | {"plans_name": "primusPlans"}
    plans["configurations"]["tiny_primus"] = {
        "inherits_from": "tiny",
        "patch_size": [16, 16, 24],
        "data_identifier": "primus",
    }
    (planned_3d.preprocessed / "primusPlans.json").write_text(json.dumps(plans))
    done = planned_3d.run(
        "nnUNetv2_train", planned_3d.dataset_id, "tiny_primus", 0, "-p", "primusPlans",
        "-tr", "PrimusCrossMatchTrainer", "-device", "cpu", check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "nnunet-ssl: error: " in done.stdout
    assert "make a Primus. Supported are PlainConvUNet and ResidualEncoderUNet" in done.stdout
    assert not list(planned_3d.preprocessed.glob("primus_*")), "no case was preprocessed"
