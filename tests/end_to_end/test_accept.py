"""Corrected segmentations become labels, and nnU-Net's own commands train with them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Planned, nnunet_environment
from trees import contents

pytestmark = pytest.mark.slow


def test_train_after_accepting(planned_2d, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(planned_2d.root, root)
    raw = root / "raw" / planned_2d.raw.name
    planned = Planned(root, planned_2d.dataset_id, raw, nnunet_environment(root), planned_2d.phantoms)
    planned.run("nnunet-ssl", "preprocess", "-d", planned.dataset_id)
    corrected = root / "corrected"
    corrected.mkdir()
    for case, ending in (("unlabeled_000", ".nii.gz"), ("unlabeled_002", ".nrrd")):
        image = sitk.ReadImage(str(raw / "imagesUn" / f"{case}_0000.nii.gz"))
        voxels = sitk.GetArrayFromImage(image)
        labels = sitk.GetImageFromArray(np.digitize(voxels, np.quantile(voxels, [0.8, 0.95])).astype(np.float32))
        labels.CopyInformation(image)
        sitk.WriteImage(labels, str(corrected / f"{case}{ending}"))

    before = contents(raw)
    accept = ("accept", "-d", planned.dataset_id)
    output = planned.run("nnunet-ssl", *accept, "--labels", corrected).stdout
    assert "Accepted 2 case(s)" in output and "5 -> 7" in output
    planned.run(
        "nnUNetv2_extract_fingerprint", "-d", planned.dataset_id, "--verify_dataset_integrity", "--clean", "-np", 1
    )
    (fold,) = json.loads((planned.preprocessed / "splits_final.json").read_text())
    assert fold["train"][-2:] == ["unlabeled_000", "unlabeled_002"] and len(fold["val"]) == 2
    for trainer in ("nnUNetTrainer_short", "CrossMatchTrainer_short"):
        log = planned.run("nnUNetv2_train", planned.dataset_id, "tiny", 0, "-tr", trainer, "-device", "cpu").stdout
        assert "This split has 5 training and 2 validation cases." in log and "Mean Validation Dice" in log
    assert "2 unlabeled cases, 5 labeled cases" in log
    assert sorted(file.stem for file in (planned.results(trainer) / "validation").glob("*.nii.gz")) == [
        f"{case}.nii" for case in fold["val"]
    ]

    output = planned.run("nnunet-ssl", *accept, "--undo").stdout
    assert "Reversed: unlabeled_000, unlabeled_002." in output
    assert contents(raw) == before
    log = planned.run(
        "nnUNetv2_train", planned.dataset_id, "tiny", 0, "-tr", "CrossMatchTrainer_short", "-device", "cpu"
    ).stdout
    assert "4 unlabeled cases, 3 labeled cases" in log
