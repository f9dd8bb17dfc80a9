"""Trainings that go on from what another one left, with the real commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

LENGTHS = """
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer


class Few:
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 3, 2


class CrossMatchTrainer_2epochs(Few, CrossMatchTrainer):
    training_epochs = 2


class CrossMatchTrainer_4epochs(Few, CrossMatchTrainer):
    training_epochs = 4
"""


def checkpoints(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.pth")}


def test_a_longer_training_goes_on_from_a_finished_one(planned_2d):
    (planned_2d.root / "trainers" / "lengths.py").write_text(LENGTHS)
    short, long = (planned_2d.results(f"CrossMatchTrainer_{count}epochs") for count in (2, 4))
    given = [planned_2d.dataset_id, "tiny", 0]
    planned_2d.run("nnUNetv2_train", *given, "-tr", "CrossMatchTrainer_2epochs", "-device", "cpu")
    before = checkpoints(short)

    given = ["extend", "-d", planned_2d.dataset_id, "-c", "tiny", "-f", 0, "-tr", "CrossMatchTrainer_4epochs"]
    output = planned_2d.run("nnunet-ssl", *given, "-device", "cpu").stdout
    assert f"continues from {short / 'checkpoint_final.pth'}, after 2 of 4 epochs" in output
    assert "is from CrossMatchTrainer_2epochs, after 2 epochs; CrossMatchTrainer_4epochs has 4" in output
    epochs = [line.split()[-1] for line in output.splitlines() if line.split()[-2:-1] == ["Epoch"]]
    assert epochs == ["2", "3"] and "Current learning rate: 0.00536" in output
    assert "Mean Validation Dice" in output
    final = torch.load(long / "checkpoint_final.pth", weights_only=True)
    assert final["current_epoch"] == 4 and {len(values) for values in final["logging"].values()} == {4}
    assert not (long / "checkpoint_latest.pth").exists() and (long / "checkpoint_best.pth").is_file()
    assert checkpoints(short) == before

    after = checkpoints(long)
    again = planned_2d.run("nnunet-ssl", *given, "-device", "cpu").stdout
    assert "has finished: validating" in again and "Mean Validation Dice" in again
    assert checkpoints(long).keys() == after.keys() and checkpoints(short) == before


def test_a_checkpoint_of_nnunet_is_refused_in_one_message(planned_2d):
    given = [planned_2d.dataset_id, "tiny", 0, "-device", "cpu"]
    planned_2d.run("nnUNetv2_train", *given, "-tr", "nnUNetTrainer_short")
    folder = planned_2d.results("MutualReliableTrainer_1epoch")
    folder.mkdir(parents=True)
    file = folder / "checkpoint_final.pth"
    file.write_bytes((planned_2d.results("nnUNetTrainer_short") / file.name).read_bytes())
    run = planned_2d.run("nnUNetv2_train", *given, "-tr", "MutualReliableTrainer_1epoch", "--c", check=False)
    assert run.returncode != 0 and "weights_only" not in run.stdout and "Traceback" not in run.stdout
    last = run.stdout.strip().splitlines()[-1]
    assert last.startswith("nnunet-ssl: error: To start from the weights of this checkpoint, use -pretrained")
    assert last.endswith("nnUNetTrainer_short wrote it.")
