"""Files that were written before the base trainer was taken apart (tests/data_fixtures) are read as then."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.labeled_targets import AddTargets
from nnunet_ssl.data.preprocessing import preprocess_unlabeled
from nnunet_ssl.methods.simcvd import SimCVDTrainer
from nnunet_ssl.testing import initialized, make_batches

FIXTURE = Path(__file__).resolve().parents[1] / "data_fixtures" / "before_refactoring"
NAME = "Dataset007_Tiny"
CASES = ["scan_1", "scan_2"]


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """The files, with the times that the images had when they were preprocessed."""
    root = tmp_path / "then"
    shutil.copytree(FIXTURE, root)
    for case in CASES:
        record = root / "preprocessed" / NAME / "nnUNetPlans_3d_fullres_unlabeled_records" / f"{case}.json"
        (source,) = json.loads(record.read_text())["sources"]
        os.utime(root / "raw" / NAME / "imagesUn" / source["name"], ns=(source["mtime_ns"],) * 2)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(root / name))
    return root


def read(root: Path, name: str) -> dict:
    return json.loads((root / "preprocessed" / NAME / name).read_text())


def preprocess(root: Path):
    return preprocess_unlabeled(
        raw_dataset_folder=root / "raw" / NAME,
        preprocessed_dataset_folder=root / "preprocessed" / NAME,
        plans_manager=PlansManager(read(root, "nnUNetPlans.json")),
        configuration="3d_fullres",
        dataset_json=read(root, "dataset.json"),
        num_processes=0,
        log=lambda line: None,
    )


def test_cases_are_not_preprocessed_again(copied) -> None:
    before = {path.name: path.read_bytes() for path in (copied / "preprocessed" / NAME).rglob("scan_*")}
    report = preprocess(copied)
    assert (report.up_to_date, report.done, report.failed, report.removed) == (CASES, [], [], [])
    assert {path.name: path.read_bytes() for path in (copied / "preprocessed" / NAME).rglob("scan_*")} == before
    # Another image is noticed.
    os.utime(copied / "raw" / NAME / "imagesUn" / "scan_2_0000.nii.gz")
    report = preprocess(copied)
    assert (report.up_to_date, report.done) == (CASES[:1], CASES[1:])


def test_a_training_goes_on_from_its_checkpoint_with_the_step_that_was_next(copied) -> None:
    labeled = copied / "preprocessed" / NAME / "nnUNetPlans_3d_fullres"
    labeled.mkdir(exist_ok=True)
    (labeled / "none.b2nd").touch()
    plans, dataset_json = read(copied, "nnUNetPlans.json"), read(copied, "dataset.json")
    trainer = initialized(SimCVDTrainer, plans, "3d_fullres", dataset_json)
    trainer.load_checkpoint(str(copied / "checkpoint_latest.pth"))
    assert trainer.current_epoch == 2 and trainer.training_network.teacher.updates == 6
    assert len(trainer.logger.local_logger.my_fantastic_logging["ssl/loss/contrast"]) == 2

    _, _, batch = make_batches(trainer)
    targets = [target.clamp(max=1) for target in batch["target"]]
    batch = AddTargets(trainer.extra_targets)(data=batch["data"], target=targets, keys=batch["keys"])
    assert isinstance(trainer.dataloader_unlabeled, itertools.repeat)
    torch.manual_seed(5)
    np.random.seed(5)
    values = trainer.train_step(batch)
    expected = json.loads((copied / "next_step.json").read_text())
    assert values == pytest.approx(expected["values"], rel=1e-4, abs=1e-6)
    named = {name: float(p.detach().double().abs().sum()) for name, p in trainer.training_network.named_parameters()}
    assert sum(named.values()) == pytest.approx(expected["sum_of_weights"], rel=1e-6)
    of_teacher = sum(value for name, value in named.items() if ".teacher." in name)
    assert of_teacher == pytest.approx(expected["of_the_teacher"], rel=1e-6)
