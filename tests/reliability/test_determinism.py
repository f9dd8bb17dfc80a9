"""The setting ``seed``: on a CPU with one worker, the same seed makes the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_steps import TRAINERS, make_trainer

from nnunet_ssl.data import predicted_foreground

pytestmark = pytest.mark.slow


@pytest.fixture(params=TRAINERS, ids=lambda method: method.__name__)
def train(request, planned_2d, monkeypatch, tmp_path):
    """Train with nnU-Net's loop and loaders; returns what each step saw and made, and the weights."""

    def run(seed, *, workers=1, checkpoint=None):
        monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
        monkeypatch.setattr(predicted_foreground, "RARE", 1.1)  # every class, where there is no worker
        trainer = make_trainer(request.param, planned_2d, monkeypatch, tmp_path, seed=seed)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 3, 1
        trainer.save_every = 1
        seen, step, validation_step, epoch_end = [], trainer.train_step, trainer.validation_step, trainer.on_epoch_end

        def record(batch):
            seen.append((trainer.current_epoch, batch["keys"], batch["data"].sum(), step(batch)))
            return seen[-1][-1]

        def record_validation(batch):
            seen.append((batch["keys"], batch["data"].sum()))
            return validation_step(batch)

        def stop():
            epoch_end()
            if trainer.current_epoch == 1 and checkpoint is None:
                Path(trainer.output_folder, "checkpoint_latest.pth").rename(tmp_path / f"epoch_1_{seed}.pth")

        trainer.train_step, trainer.validation_step, trainer.on_epoch_end = record, record_validation, stop
        if checkpoint:
            trainer.load_checkpoint(str(tmp_path / checkpoint))
        trainer.run_training()
        return seen, {name: tensor.clone() for name, tensor in trainer.network.named_parameters()}

    return run


def same(first, second) -> bool:
    return str(first[0]) == str(second[0]) and all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_same_seed_same_training(train):
    once = train(7)
    assert same(once, train(7))
    assert not same(once, train(8))
    # Without workers other numbers are drawn, but the same each time.
    alone = train(7, workers=0)
    assert not same(once, alone) and same(alone, train(7, workers=0))

    # What goes on from a checkpoint sees other batches than the first epoch's, and the same ones each time.
    resumed = train(7, checkpoint="epoch_1_7.pth")
    assert same(resumed, train(7, checkpoint="epoch_1_7.pth"))
    assert [step[0] for step in resumed[0] if len(step) == 4] == [1, 1, 1]
    assert str(resumed[0][0][2]) != str(once[0][0][2])


def test_without_a_seed_each_training_is_another(train):
    assert not same(train(None), train(None))
