"""Checkpoints, log and loaders of the base trainer, on nnU-Net's own training loop."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import pin_memory_of_all_eligible_items_in_dict
from method_steps import make_batches, make_trainer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_ssl.data import predicted_foreground
from nnunet_ssl.data.predicted_foreground import ANYWHERE, Aim, PredictedForeground, coordinates_of, subsampled
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.trainer.epoch_log import EpochLog


@pytest.fixture
def make(planned_3d, monkeypatch, tmp_path):
    """Make trainers of few steps that train in this process, writing to a folder of this test."""
    for name, value in planned_3d.environment.items():
        if name.startswith("nnUNet"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    def factory(epochs=2, **settings) -> CrossMatchTrainer:
        plans = json.loads((planned_3d.preprocessed / "nnUNetPlans.json").read_text())
        plans["continue_training"] = False
        plans["configurations"]["tiny"]["semi_supervised"] = settings
        dataset_json = json.loads((planned_3d.preprocessed / "dataset.json").read_text())
        trainer = CrossMatchTrainer(plans, "tiny", 0, dataset_json, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, 2, 1
        return trainer

    return factory


def states(trainer) -> dict:
    return {
        "weights": trainer.training_network.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "logging": trainer.logger.local_logger.my_fantastic_logging,
        "epoch": trainer.current_epoch,
        "best": trainer._best_ema,
        "mirroring": tuple(trainer.inference_allowed_mirroring_axes),
    }


def assert_equal(first, second, path="") -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{path}/{index}")
    else:
        np.testing.assert_equal(first, second, err_msg=path)


def test_resume_restores_everything_and_goes_on(make):
    first = make(epochs=2)
    monkey = type(first).on_epoch_end

    class Stop(Exception):
        pass

    def stop_after_epoch_0(self):
        self.save_every = 1
        monkey(self)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(first), "on_epoch_end", stop_after_epoch_0)
        with pytest.raises(Stop):
            first.run_training()
    latest = Path(first.output_folder) / "checkpoint_latest.pth"
    assert first._best_ema is not None
    second = make(epochs=2)
    second.load_checkpoint(str(latest))
    assert_equal(states(first), states(second))
    assert second.current_epoch == 1 and second.progress == 0.5
    second.run_training()
    logging = second.logger.local_logger.my_fantastic_logging
    assert {len(values) for values in logging.values()} == {2}
    final = torch.load(Path(first.output_folder) / "checkpoint_final.pth", weights_only=True)
    assert final["current_epoch"] == 2


def test_checkpoint_is_plain_and_its_network_is_stock(make, monkeypatch, tmp_path):
    trainer = make(epochs=1, ramp_length=0.5)
    trainer.run_training()
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    stock = CrossMatchTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    stock.load_state_dict(checkpoint["network_weights"], strict=True)
    assert checkpoint["ssl"]["settings"]["ramp_length"] == 0.5
    assert checkpoint["trainer_name"] == "CrossMatchTrainer"
    assert checkpoint["init_args"]["device"] == "cpu"  # a torch.device is not plain for every PyTorch

    # With its trainer's name changed it predicts on a stock nnU-Net, the same as here.
    image = np.random.RandomState(0).normal(size=(1, 20, 32, 36)).astype(np.float32)
    logits = {}
    for name in ("CrossMatchTrainer", "nnUNetTrainer"):
        torch.save({**checkpoint, "trainer_name": name}, file)
        if name == "nnUNetTrainer":
            monkeypatch.delenv("nnUNet_extTrainer")
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(Path(trainer.output_folder_base)), (0,))
        logits[name] = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    assert torch.equal(*logits.values())


def test_a_kill_while_writing_keeps_the_old_checkpoint(make, monkeypatch, tmp_path):
    trainer = make()
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()

    def killed(checkpoint, stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before


def test_disabled_checkpointing_writes_nothing(make, tmp_path):
    trainer = make()
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(tmp_path / "none.pth"))
    assert not (tmp_path / "none.pth").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_with_code_in_it_is_refused(make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"ssl": {}, "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth could not be read"):
        make().load_checkpoint(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "evil").exists()


def test_a_stock_checkpoint_is_refused_with_a_way_out(make, tmp_path):
    torch.save({"network_weights": {}, "trainer_name": "nnUNetTrainer"}, tmp_path / "stock.pth")
    with pytest.raises(UserError, match=r"^To start .*-pretrained_weights.*stock\.pth was written by nnUNetTrainer\.$"):
        make().load_checkpoint(str(tmp_path / "stock.pth"))


def test_log_has_every_key_once_per_epoch_also_after_an_older_checkpoint(make):
    trainer = make()
    trainer.initialize()
    trainer.current_epoch = 2
    lists = trainer.logger.local_logger.my_fantastic_logging
    lists["ssl/loss/of_an_older_version"] = [0.5, 0.4]
    trainer.epoch_log.write(2, {"loss/supervised": 1.0, "loss/total": 1.0, "weight/supervised": 1.0})
    np.testing.assert_equal(lists["ssl/loss/supervised"], [np.nan, np.nan, 1.0])
    np.testing.assert_equal(lists["ssl/loss/of_an_older_version"], [0.5, 0.4, np.nan])


def test_log_and_picture_of_a_training(make):
    trainer = make(epochs=2, ramp_length=0.0)
    trainer.run_training()
    folder = Path(trainer.output_folder)
    lists = trainer.logger.local_logger.my_fantastic_logging
    for key in ("loss/supervised", "loss/ip", "loss/tkd", "loss/dkd", "loss/total", "weight/ip", "coverage"):
        assert len(lists[f"ssl/{key}"]) == 2 and np.isfinite(lists[f"ssl/{key}"]).all(), key
    assert [len(epoch) for epoch in lists["ssl/coverage_per_class"]] == [2, 2]
    # Weights are constant with a ramp of length 0, so the mean of the sums is the sum of the means.
    total = [
        s + i + 0.7 * t + 0.3 * d
        for s, i, t, d in zip(*(lists[f"ssl/loss/{n}"] for n in ("supervised", "ip", "tkd", "dkd")), strict=True)
    ]
    np.testing.assert_allclose(lists["ssl/loss/total"], total, rtol=1e-5)
    assert lists["train_losses"] == pytest.approx(lists["ssl/loss/supervised"])
    assert (folder / "progress_ssl.png").stat().st_size > 10_000
    log = next(folder.glob("training_log_*.txt")).read_text()
    assert "coverage" in log and "supervised" in log and "Memory mode: split" in log and "4 unlabeled cases" in log


def test_all_loaders_are_stopped_when_training_fails(make, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = make()
    monkeypatch.setattr(trainer, "train_step", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run_training()
    for loader in (trainer.dataloader_train, trainer.dataloader_val, trainer.dataloader_unlabeled):
        assert loader._processes == []


def test_on_few_cores_fewer_workers_make_unlabeled_batches(make, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    trainer = make()
    try:
        trainer.on_train_start()
        workers = {name: loader.num_processes for name, loader in trainer.loaders.with_workers.items()}
    finally:
        trainer.loaders.finish()
    assert workers == {"training": 2, "validation": 1, "unlabeled": 1}


def test_training_without_unlabeled_cases_says_how_to_add_some(make, monkeypatch, planned_3d, tmp_path):
    monkeypatch.setattr("nnunet_ssl.data.prepare.collect_unlabeled_cases", lambda *args: [])
    with pytest.raises(UserError, match="imagesUn"):
        make().run_training()


@pytest.fixture
def splits(make, planned_3d, monkeypatch, tmp_path):
    """The split file of a copy of the dataset in which imagesUn is not preprocessed; ``make`` trains on it."""
    folder = tmp_path / "preprocessed" / planned_3d.raw.name
    shutil.copytree(planned_3d.preprocessed, folder, ignore=shutil.ignore_patterns("*_unlabeled*"))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    return folder / "splits_final.json"


def log_of(trainer) -> str:
    return next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()


def test_folds_that_cannot_be_trained_are_refused_before_any_work(make, splits):
    lists = json.loads(splits.read_text())[0]
    cases = [*lists["train"], *lists["val"]]
    for content, expected in (
        (b"\xef\xbb\xbf" + splits.read_bytes(), r"splits_final\.json begins with a byte-order mark"),
        (json.dumps([{**lists, "train": []}]).encode(), "no case in the 'train' list of fold 0"),
        (json.dumps([{"train": ["stranger"], "val": cases[:1]}]).encode(), "name stranger, but"),
    ):
        splits.write_bytes(content)
        with pytest.raises(UserError, match=expected):
            make().run_training()
    splits.write_text(json.dumps([{"train": cases[:2], "val": cases[2:3], "unlabeled": cases[3:]}]))
    trainer = make()
    trainer.fold = 1
    with pytest.raises(UserError, match=r"no fold 1.* fold 0 only.*labels that fold\(s\) 0 hide"):
        trainer.run_training()
    splits.unlink()
    folder = Path(trainer.preprocessed_dataset_folder)
    for file in folder.glob(f"{cases[0]}*"):
        file.unlink()
    ready = (
        rf"contains 4 labeled case.*\(nnunet-ssl split -d {splits.parent.name} --labeled 100%\).*"
        rf"\(nnUNetv2_train {splits.parent.name} tiny all -tr CrossMatchTrainer\)"
    )
    with pytest.raises(UserError, match=ready):
        make().run_training()
    assert not splits.exists() and not list(splits.parent.glob("*_unlabeled*"))


def test_a_fold_without_validation_cases_is_trained_as_fold_all(make, splits):
    lists = json.loads(splits.read_text())[0]
    splits.write_text(json.dumps([{"train": lists["train"][:2], "val": [], "unlabeled": lists["train"][2:]}]))
    trainer = make(epochs=1)
    trainer.run_training()
    trainer.perform_actual_validation()
    predicted = {file.name for file in (Path(trainer.output_folder) / "validation").glob("*.nii.gz")}
    assert predicted == {f"{case}.nii.gz" for case in lists["train"][:2]}
    log = log_of(trainer)
    assert "WARNING: There is no case in the 'val' list of fold 0" in log
    assert "2 labeled case(s) are in no list of fold 0" in log and ", ".join(lists["val"]) in log


def test_a_cascade_names_what_it_needs_of_the_previous_stage(make, tmp_path):
    trainer = make()
    plans = {**trainer.plans_manager.plans, "continue_training": False}
    plans["configurations"]["cascade"] = {"inherits_from": "tiny", "previous_stage": "tiny"}
    trainer = CrossMatchTrainer(plans, "cascade", 0, trainer.dataset_json, torch.device("cpu"))
    with pytest.raises(UserError, match=r"tiny.fold_0.checkpoint_final\.pth.*nnUNetv2_train .* tiny FOLD"):
        trainer.run_training()
    previous = (
        tmp_path / Path(trainer.output_folder_base).parent.name / "CrossMatchTrainer__nnUNetPlans__tiny" / "fold_0"
    )
    previous.mkdir(parents=True, exist_ok=True)
    (previous / "checkpoint_final.pth").touch()
    with pytest.raises(UserError, match=r"have no segmentation of the previous stage in .*Train all folds"):
        trainer.run_training()


def test_patches_are_centered_on_rare_classes_from_the_second_epoch_on(make, monkeypatch):
    monkeypatch.setattr(predicted_foreground, "RARE", 1.1)  # every class
    trainer = make(epochs=3, foreground_crops=1.0)
    seen: list[tuple[int, list[int], torch.Tensor | None]] = []
    next_batches = trainer.next_batches

    def spied(batch):
        labeled, unlabeled = next_batches(batch)
        seen.append((trainer.current_epoch, [aim.structure for aim in unlabeled.aims], unlabeled.coordinates))
        return labeled, unlabeled

    monkeypatch.setattr(trainer, "next_batches", spied)
    trainer.run_training()
    assert all(coordinates is None and not aims for epoch, aims, coordinates in seen if epoch == 0)
    later = [aims for epoch, aims, _ in seen if epoch > 0]
    assert all(later) and any(structure >= 0 for aims in later for structure in aims), later
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert log.count("in fewer than a third of the labeled patches): 1, 2. 100% of the unlabeled patches") == 1
    patches = trainer.logger.local_logger.my_fantastic_logging["ssl/patches/labeled_per_class"]
    assert np.shape(patches) == (3, 2) and 0 < np.mean(patches) <= 1


def test_a_resumed_training_knows_the_rare_classes(make, monkeypatch):
    monkeypatch.setattr(predicted_foreground, "RARE", 1.1)
    first = make(epochs=1)
    first.run_training()
    checkpoint = str(Path(first.output_folder) / "checkpoint_final.pth")
    second = make(epochs=2)
    second.initialize()
    second.load_checkpoint(checkpoint)
    second.on_train_start()
    assert second.predictions.foreground.rare == [0, 1]


def test_common_classes_have_no_patches_of_their_own(make, monkeypatch):
    monkeypatch.setattr(predicted_foreground, "RARE", 0.0)
    trainer = make(epochs=2)
    trainer.run_training()
    assert trainer.predictions.foreground.rare == []


@pytest.mark.parametrize(("settings", "workers"), [({"foreground_crops": 0.0}, "0"), ({"seed": 1}, "1")])
def test_when_all_patches_are_cut_anywhere(make, monkeypatch, settings, workers):
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    trainer = make(**settings)
    try:
        trainer.on_train_start()
    finally:
        trainer.loaders.finish()
    assert trainer.predictions.foreground is None
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert ("foreground_crops has no effect" in log) == ("seed" in settings)


def test_aims_survive_pinned_memory(planned_2d, monkeypatch, tmp_path):
    """On a GPU, batchgenerators pins each batch, and rebuilds what is in it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    trainer = make_trainer(CrossMatchTrainer, planned_2d, monkeypatch, tmp_path)
    _, _, labeled = make_batches(trainer)
    batch = next(trainer.dataloader_unlabeled)
    aims = [Aim(0, np.asarray([1, 2, 3], np.int32)), ANYWHERE, ANYWHERE]
    pinned = pin_memory_of_all_eligible_items_in_dict({**batch, "aims": aims, "coordinates": torch.zeros(3, 3, 4, 4)})
    trainer.dataloader_unlabeled = iter([pinned])
    _, unlabeled = trainer.next_batches(labeled)
    assert [aim.structure for aim in unlabeled.aims] == [0, -1, -1] and unlabeled.aims[0].voxel.tolist() == [1, 2, 3]


@pytest.mark.parametrize("regions", [False, True])
def test_the_share_counts_patches_cut_anywhere_and_all_are_searched(planned_2d, monkeypatch, tmp_path, regions):
    trainer = make_trainer(CrossMatchTrainer, planned_2d, monkeypatch, tmp_path, regions=regions)
    patch = tuple(trainer.configuration_manager.patch_size)
    foreground = PredictedForeground(["a", "b"], 2)
    foreground.rare = [1]
    aim = Aim(1, np.asarray([0, 1, 1], np.int32))
    foreground.put("b", aim)
    foreground.put("a", aim)
    trainer.predictions.foreground = foreground
    coordinates = torch.stack([subsampled(coordinates_of([[5, 6], [0, patch[0]], [0, patch[1]]])[:, 0])] * 2)
    _, unlabeled, _ = make_batches(trainer, u=2)
    aims = [Aim(-1, aim.voxel), aim]
    trainer.predictions.begin(unlabeled._replace(keys=["a", "b"], aims=aims, coordinates=coordinates))
    # The second structure is predicted in two voxels of a, and the first alone everywhere in b.
    logits = torch.full((2, 2 if regions else 3, *patch), -1.0)
    first, second = (0, 1) if regions else (1, 2)
    logits[0, second, 8:10, 8] = 1.0
    logits[1, first] = 1.0
    if not regions:
        logits[:, 0] = 0.0
    trainer.record_prediction(logits)
    trainer.predictions.remember(trainer.predictions.draw().numpy(), patch)
    voxels = np.prod(patch)
    expected = {"share/unlabeled": [[2, 0, 2], [voxels] * 3], "patches/unlabeled": [[1, 0, 1], [1, 1, 1]]}
    assert {name: counts.tolist() for name, counts in trainer.epoch_log.counts.items()} == expected
    assert foreground.draw("b").structure == -1, "no longer predicted where the patch was centered on it"
    assert {tuple(foreground.draw("a").voxel.tolist()) for _ in range(50)} == {(0, 1, 1), (5, 10, 10)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_message_says_what_to_do(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(CrossMatchTrainer, planned_2d, monkeypatch, tmp_path)
    trainer.device = torch.device("cuda")
    with pytest.raises(UserError, match=r"PyTorch finds no GPU \(.*Add -device cpu"):
        trainer.initialize()


def test_the_first_steps_tell_how_long_an_epoch_takes():
    lines: list[str] = []
    log = EpochLog(None, lines.append, counts_skipped_steps=False)
    for step in range(1, 31):
        log.time_step(250)
        assert len(lines) == (step > 10), "told once, after ten steps that follow a first one"
        log.start()
    assert re.fullmatch(r"0\.00 s per step, so about 0\.0 min per epoch of 250 steps, without validation", lines[0])


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_shows_the_steps_of_an_epoch(monkeypatch, terminal):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stdout", stream)
    log = EpochLog(None, print, counts_skipped_steps=False)
    for _ in range(2):
        log.start()
        for _ in range(2):
            log.time_step(250)
    assert stream.getvalue() == ("1 of 250 steps\r2 of 250 steps\r" * 2 if terminal else "")
