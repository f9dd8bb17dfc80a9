"""SIGKILL at random moments: what was written before is whole, and the next run goes on from it."""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import pytest
import torch
from method_steps import TRAINERS, make_short, make_trainer
from own_process import duration, exit_code, kill_after
from previous_stage import Stage
from tiny_dataset import TinyDataset, voxels

from nnunet_ssl.data.unlabeled_cases import ready_cases

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")]

KILLS = 30
KILLS_OF_A_METHOD = 10


def voxels_of(file: Path) -> bytes:
    """Not the file's bytes, which can differ where the voxels do not."""
    return blosc2.open(urlpath=str(file), mode="r")[:].tobytes()


def test_preprocessing(tmp_path):
    def dataset(name: str) -> TinyDataset:
        made = TinyDataset(tmp_path / name)
        for number in range(6):
            made.add(f"U{number}", voxels(number))
        return made

    def contents(of: TinyDataset) -> dict:
        return {file.name: voxels_of(file) for file in sorted(of.folder.iterdir()) if file.suffix == ".b2nd"}

    undisturbed = dataset("undisturbed")
    took = duration(preprocess, undisturbed, log=tmp_path / "log")
    expected = contents(undisturbed)
    moments, numbers, killed, found = random.Random(0), itertools.count(), 0, set()
    while killed < KILLS:
        disturbed = dataset(f"disturbed_{next(numbers)}")
        for _ in range(50):
            ended = kill_after(moments.uniform(0, 1.2 * took), preprocess, disturbed, log=tmp_path / "log")
            killed += not ended
            ready = ready_cases(disturbed.preprocessed, "nnUNetPlans_3d_fullres")
            found.add(len(ready))
            for case in ready:
                name = f"{case}.b2nd"
                assert voxels_of(disturbed.folder / name) == expected[name], "a case is whole, or it is not there"
            if ended:
                break
        preprocess(disturbed)
        assert contents(disturbed) == expected
    assert len(found) > 2, "kills came at different moments"


def preprocess(dataset: TinyDataset) -> None:
    dataset.run()


@pytest.mark.parametrize("method", TRAINERS, ids=lambda method: method.__name__)
def test_checkpoint_writing(method, planned_2d, environment, tmp_path):
    file = tmp_path / "checkpoint_latest.pth"
    arguments, log = (write_checkpoints, method, planned_2d, file, 10**6), tmp_path / "log"
    moments, epochs = random.Random(1), []
    for _ in range(KILLS):
        begun = moments.randrange(1, 8)
        assert not kill_after(moments.uniform(0, 0.1), *arguments, log=log, once=printed(f"writes {begun}\n", log))
        checkpoint = torch.load(file, weights_only=True)
        epoch = checkpoint["current_epoch"] - 1
        assert epoch >= begun - 1, "what was written is not lost"
        assert all((tensor == epoch).all() for tensor in checkpoint["network_weights"].values())
        epochs.append(epoch - begun)
    assert len(set(epochs)) > 1, "kills came at different moments"


def printed(text: str, log: Path) -> Callable[[], bool]:
    """Whether a process has printed it."""
    return lambda: log.is_file() and text in log.read_text()


def write_checkpoints(method, planned, file: Path, epochs: int) -> None:
    """Without pause; every weight is the epoch's number."""
    trainer = make_trainer(method, planned, pytest.MonkeyPatch(), file.parent)
    for epoch in range(epochs):
        with torch.no_grad():
            for parameter in trainer.network.parameters():
                parameter.fill_(epoch)
        trainer.current_epoch = epoch
        print(f"writes {epoch}")
        trainer.save_checkpoint(str(file))


@pytest.mark.parametrize("method", TRAINERS, ids=lambda method: method.__name__)
def test_training(method, planned_2d, environment, tmp_path):
    arguments = train, method, planned_2d, tmp_path
    moments, epochs, log = random.Random(2), [0], tmp_path / "log"
    for _ in range(KILLS_OF_A_METHOD):
        begun = epochs[-1] + moments.randrange(3)
        assert not kill_after(moments.uniform(0, 0.5), *arguments, 1000, log=log, once=printed(f"Epoch {begun}\n", log))
        for file in tmp_path.glob("*/*/fold_0/*.pth"):
            checkpoint = torch.load(file, weights_only=True)
            assert digest(checkpoint) in states(tmp_path, checkpoint["current_epoch"]), f"{file.name} is not whole"
            if file.name == "checkpoint_latest.pth":
                epochs.append(checkpoint["current_epoch"])
    assert epochs == sorted(epochs) and len(set(epochs)) > 3, "no epoch was lost, kills came at different moments"
    code, output = exit_code(*arguments, epochs[-1] + 1, log=tmp_path / "log")
    assert code == 0, output[-3000:]
    assert f"\nEpoch {epochs[-1]}" in output.replace(": ", "\n") and f"Epoch {epochs[-1] - 1}" not in output
    assert [file.name for file in tmp_path.glob("*/*/fold_0/*latest.pth")] == []
    (final,) = tmp_path.glob("*/*/fold_0/checkpoint_final.pth")
    assert torch.load(final, weights_only=True)["current_epoch"] == epochs[-1] + 1


def train(method, planned, folder: Path, epochs: int) -> None:
    """As ``nnUNetv2_train --c`` does; what each checkpoint has to hold is noted before it is written."""
    trainer = make_short(method, planned, folder, epochs)
    write = trainer.write_checkpoint_of_epoch

    def note_and_write(filename: str, *, next_epoch: int) -> None:
        with (folder / "states").open("a") as file:
            file.write(f"{next_epoch} {digest(state(trainer, next_epoch))}\n")
        write(filename, next_epoch=next_epoch)

    trainer.write_checkpoint_of_epoch = note_and_write
    latest = Path(trainer.output_folder, "checkpoint_latest.pth")
    if latest.is_file():
        trainer.load_checkpoint(str(latest))
        epoch = trainer.current_epoch
        assert digest(state(trainer, epoch)) in states(folder, epoch), "the training is not what was saved"
    trainer.run_training()


def state(trainer, next_epoch: int) -> dict[str, Any]:
    """Of a training: what decides how it goes on."""
    return {
        "network_weights": trainer.training_network.state_dict(),
        "ssl": {"network": trainer.training_network.training_state()},
        "optimizer_state": trainer.optimizer.state_dict(),
        "logging": {name: list(values)[:next_epoch] for name, values in trainer.logger.get_checkpoint().items()},
        "current_epoch": next_epoch,
    }


def digest(state: dict[str, Any]) -> str:
    """Of :func:`state`, or of a checkpoint."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                hashed.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for entry in value:
                add(entry)
        else:
            hashed.update((repr(value.item()) if hasattr(value, "item") else repr(value)).encode())

    add([state["network_weights"], state["ssl"]["network"], state["optimizer_state"], state["logging"]])
    return hashed.hexdigest()


def states(folder: Path, epoch: int) -> set[str]:
    """What was noted for an epoch: more than one state where a kill came before it was saved."""
    lines = (line.split() for line in (folder / "states").read_text().splitlines())
    return {digest for noted, digest in lines if int(noted) == epoch}


def test_hand_over_to_the_next_stage(planned_3d, environment, tmp_path):
    """Of what a cascade's first stage predicts for the second."""
    took = duration(segment, planned_3d, tmp_path / "undisturbed", log=tmp_path / "log")
    expected = segmentations(tmp_path / "undisturbed")
    assert len(expected) == 4
    moments, killed, found, number, there = random.Random(3), 0, set(), 0, {}
    while killed < KILLS:
        disturbed = tmp_path / f"disturbed_{number}"
        # At any moment, or shortly after some more are there, in the middle of the next one.
        wait_for = moments.randrange(len(there), len(expected))
        ended = kill_after(
            moments.uniform(0, 0.2 if wait_for > len(there) else took),
            segment,
            planned_3d,
            disturbed,
            log=tmp_path / "log",
            once=lambda: len(segmentations(disturbed)) >= wait_for,  # noqa: B023 - called before it changes
        )
        killed += not ended
        there = segmentations(disturbed)
        found.add(len(there))
        assert there.items() <= expected.items(), "a segmentation is whole, or it is not there"
        assert not ended or there == expected
        # Where nearly all are there, later kills would find nothing else.
        if len(there) >= len(expected) - 1:
            number, there = number + 1, {}
    duration(segment, planned_3d, disturbed, log=tmp_path / "log")
    assert segmentations(disturbed) == expected, "what a kill has left is completed"
    assert len(found) > 2, "kills came at different moments"


def segment(planned, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    Stage(planned, folder).segment()


def segmentations(folder: Path) -> dict[str, bytes]:
    return {file.name: voxels_of(file) for file in folder.glob("predicted_next_stage/*/fold_0/imagesUn/*.b2nd")}
