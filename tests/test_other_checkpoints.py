"""``--c`` with a checkpoint of another trainer, of other classes or of other plans: what is said, and what to do."""

from __future__ import annotations

import json
import traceback
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_steps import make_trainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.data.previous_stage import PreviousStage
from nnunet_ssl.distributed import Ranks
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.methods.mutual_reliable import MutualReliableTrainer
from nnunet_ssl.methods.simcvd import SimCVDTrainer
from nnunet_ssl.networks.checkpoints import NotPlainError, read_checkpoint
from nnunet_ssl.trainer.cascade import segmented_by_previous_stage


@pytest.fixture
def make(planned_2d, monkeypatch, tmp_path):
    def factory(method: type = CrossMatchTrainer, **settings: Any) -> Any:
        return make_trainer(method, planned_2d, monkeypatch, tmp_path, **settings)

    return factory


def refusal(trainer: Any, file: Path | str) -> str:
    """The message; nothing of what PyTorch says is to be shown with it."""
    with pytest.raises(UserError) as refused:
        trainer.load_checkpoint(str(file))
    shown = "".join(traceback.format_exception(refused.value))
    assert "weights_only" not in shown and "size mismatch" not in shown and "During handling" not in shown
    return str(refused.value)


@pytest.fixture
def of_nnunet(planned_2d, make, tmp_path) -> Path:
    """What nnUNetTrainer writes, with NumPy's scalars in it."""
    make()  # sets nnU-Net's folders
    plans = json.loads((planned_2d.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((planned_2d.preprocessed / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "tiny", 0, dataset_json, torch.device("cpu"))
    trainer.initialize()
    trainer._best_ema = np.float64(0.5)
    trainer.save_checkpoint(str(tmp_path / "nnunet.pth"))
    return tmp_path / "nnunet.pth"


def test_a_checkpoint_of_nnunet(make, of_nnunet):
    said = refusal(make(), of_nnunet)
    assert said.startswith("To start from the weights of this checkpoint, use -pretrained_weights. --c continues only")
    assert f"{of_nnunet} could not be read as tensors and plain values" in said
    assert "numpy.core.multiarray.scalar" in said.replace("_core", "core")
    assert said.endswith("nnUNetTrainer wrote it.") and len(said) < 500


def test_the_writer_is_known_without_running_anything(tmp_path, of_nnunet):
    with pytest.raises(NotPlainError, match="nnUNetTrainer wrote it"):
        read_checkpoint(of_nnunet)
    # One string, kept once in the file and named twice.
    torch.save({"a": "SomeTrainer", "trainer_name": "SomeTrainer", "b": np.float64(1)}, tmp_path / "twice.pth")
    with pytest.raises(NotPlainError) as refused:
        read_checkpoint(tmp_path / "twice.pth")
    assert "wrote it" not in str(refused.value)


def test_a_damaged_checkpoint(make, tmp_path):
    trainer = make()
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    content = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(content[: len(content) // 2])
    said = refusal(trainer, tmp_path / "c.pth")
    assert "it is damaged, or not a checkpoint" in said and said.endswith(
        "checkpoint_latest.pth and checkpoint_best.pth."
    )


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_a_changed_byte(make, tmp_path, part):
    """The archive can still be opened, and PyTorch compares no checksums."""
    trainer, file = make(), tmp_path / "c.pth"
    trainer.save_checkpoint(str(file))
    with zipfile.ZipFile(file) as archive:
        (entry,) = (one for one in archive.infolist() if one.filename.endswith(f"/{part}"))
    content = bytearray(file.read_bytes())
    middle = content.index(b"/" + part.encode(), entry.header_offset) + entry.file_size // 2
    content[middle] ^= 1
    file.write_bytes(content)
    said = refusal(trainer, file)
    assert f"its part {entry.filename} has changed since it was written" in said and "it is damaged" in said


def test_other_plans_of_the_same_network_are_told(make, tmp_path, monkeypatch):
    make().save_checkpoint(str(tmp_path / "c.pth"))
    trainer = make()
    lines: list[str] = []
    monkeypatch.setattr(trainer, "print_to_log_file", lines.append)
    trainer.load_checkpoint(str(tmp_path / "c.pth"))
    assert not [line for line in lines if line.startswith("WARNING")]
    trainer.plans_manager.plans["plans_name"] = "otherPlans"
    trainer.plans_manager.plans["configurations"]["tiny"]["spacing"] = [3.0, 3.0]
    trainer.load_checkpoint(str(tmp_path / "c.pth"))
    (line,) = [line for line in lines if line.startswith("WARNING")]
    assert "plans_name nnUNetPlans there, otherPlans here; spacing [" in line
    assert line.endswith("] there, [3.0, 3.0] here")


def test_classes_that_have_changed_places_are_told(make, tmp_path, monkeypatch):
    make().save_checkpoint(str(tmp_path / "c.pth"))
    trainer = make()
    lines: list[str] = []
    monkeypatch.setattr(trainer, "print_to_log_file", lines.append)
    labels = trainer.dataset_json["labels"]
    swapped = {**labels, "chamber": labels["neighbor"], "neighbor": labels["chamber"]}
    monkeypatch.setitem(trainer.dataset_json, "labels", swapped)
    trainer.load_checkpoint(str(tmp_path / "c.pth"))
    (line,) = [line for line in lines if line.startswith("WARNING")]
    assert line.endswith("other classes: chamber 1 there, 2 here; neighbor 2 there, 1 here")


def test_another_method(make, tmp_path):
    make(SimCVDTrainer).save_checkpoint(str(tmp_path / "c.pth"))
    said = refusal(make(), tmp_path / "c.pth")
    assert said.startswith("Continue with -tr SimCVDTrainer, or start from its weights with -pretrained_weights")
    assert "does not contain what CrossMatchTrainer trains" in said and len(said) < 500


def test_a_setting_that_makes_another_network(make, tmp_path):
    make(MutualReliableTrainer, decoders=3).save_checkpoint(str(tmp_path / "c.pth"))
    said = refusal(make(MutualReliableTrainer), tmp_path / "c.pth")
    assert said.startswith('Continue with the settings of the checkpoint: "semi_supervised": {"decoders": 3} in the')


def test_other_classes(make, tmp_path):
    make().save_checkpoint(str(tmp_path / "c.pth"))
    trainer = make(regions=True)
    said = refusal(trainer, tmp_path / "c.pth")
    assert said.startswith("Continue with the plans and the dataset.json of the checkpoint; or train without --c")
    assert said.endswith("is of another network: outputs (background and classes, or regions) 3 there, 2 here.")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"features_per_stage": [4, 6, 10]}, "features of the stages [4, 6, 10] there, [4, 6, 8] here"),
        (
            {"kernel_sizes": [[1, 3], [3, 3], [3, 3]]},
            "kernel sizes [(1, 3), (3, 3), (3, 3)] there, [(3, 3), (3, 3), (3, 3)] here",
        ),
        ({"n_conv_per_stage": [2, 1, 1]}, "tensors, such as encoder.stages.0.0.convs.1.conv.weight"),
    ],
)
def test_another_architecture(make, planned_2d, tmp_path, monkeypatch, change, expected):
    plans = json.loads((planned_2d.preprocessed / "nnUNetPlans.json").read_text())
    plans["configurations"]["tiny"]["architecture"]["arch_kwargs"] |= change
    plans |= {"continue_training": False, "plans_name": "otherPlans"}
    dataset_json = json.loads((planned_2d.preprocessed / "dataset.json").read_text())
    make()
    other = CrossMatchTrainer(plans, "tiny", 0, dataset_json, torch.device("cpu"))
    other.initialize()
    other.save_checkpoint(str(tmp_path / "c.pth"))
    said = refusal(make(), tmp_path / "c.pth")
    assert expected in said and said.endswith("; plans_name otherPlans there, nnUNetPlans here.")


def test_other_channels(make, planned_2d, tmp_path):
    plans = json.loads((planned_2d.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((planned_2d.preprocessed / "dataset.json").read_text())
    dataset_json["channel_names"] = {"0": "T1", "1": "T2"}
    make()
    other = CrossMatchTrainer(plans, "tiny", 0, dataset_json, torch.device("cpu"))
    other.initialize()
    other.save_checkpoint(str(tmp_path / "c.pth"))
    assert refusal(make(), tmp_path / "c.pth").endswith("is of another network: input channels 2 there, 1 here.")


def test_the_log_names_another_trainer_of_the_same_network(make, tmp_path):
    first = make()
    first.save_checkpoint(str(tmp_path / "c.pth"))
    second = make(type("CrossMatchTrainer_5epochs", (CrossMatchTrainer,), {"training_epochs": 5}))
    second.load_checkpoint(str(tmp_path / "c.pth"))
    log = Path(second.log_file).read_text()
    assert "The checkpoint is from CrossMatchTrainer, after 1 epochs; CrossMatchTrainer_5epochs has 5" in log


@pytest.mark.parametrize("damaged", [False, True])
def test_a_previous_stage_of_another_network(make, planned_2d, tmp_path, damaged):
    first = make(regions=True)
    file = Path(first.output_folder) / "checkpoint_final.pth"
    first.save_checkpoint(str(file))
    if damaged:
        file.write_bytes(file.read_bytes()[:2000])
    plans = {**make().plans_manager.plans, "continue_training": False}
    plans["configurations"]["cascade"] = {"inherits_from": "tiny", "previous_stage": "tiny"}
    dataset_json = json.loads((planned_2d.preprocessed / "dataset.json").read_text())
    second = CrossMatchTrainer(plans, "cascade", 0, dataset_json, torch.device("cpu"))
    segmented = Path(second.folder_with_segs_from_previous_stage)
    segmented.mkdir(parents=True)
    cases = [*planned_2d.phantoms.labeled, *planned_2d.phantoms.validation]
    for case in cases:
        (segmented / f"{case}.b2nd").touch()
    stage = PreviousStage(segmented, "tiny")
    with pytest.raises(UserError, match=r"^Train all folds of the previous stage: ") as refused:
        segmented_by_previous_stage(
            [],
            second.unlabeled_source,
            stage,
            labeled_cases=cases,
            build=CrossMatchTrainer.build_network_architecture,
            device=torch.device("cpu"),
            ranks=Ranks(),
            log=print,
        )
    expected = "it is damaged, or not a checkpoint" if damaged else "is of another network: outputs (background and"
    assert expected in str(refused.value) and "size mismatch" not in "".join(traceback.format_exception(refused.value))
