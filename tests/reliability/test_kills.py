"""SIGKILL at random moments: what was written before is whole, and the next run goes on from it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import blosc2
import pytest
import torch
from method_steps import TRAINERS, make_trainer
from tiny_dataset import TinyDataset, voxels

from nnunet_ssl.data.cases import ready_cases

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="forks")]

KILLS = 30


def kill_after(seconds: float, function, log: Path) -> bool:
    """Run in a forked process and kill it and its children after a time; returns whether it had ended by then."""

    def run():
        os.setpgrp()
        # A fork has no OpenMP threads, and would wait for them where this process has had some.
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(seconds)
    ended = process.exitcode is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
    return ended


def duration(function, log: Path) -> float:
    """How long it takes undisturbed."""
    began = time.monotonic()
    assert kill_after(300, function, log)
    return time.monotonic() - began


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
    took = duration(undisturbed.run, tmp_path / "log")
    expected = contents(undisturbed)
    moments, numbers, killed, found = random.Random(0), itertools.count(), 0, set()
    while killed < KILLS:
        disturbed = dataset(f"disturbed_{next(numbers)}")
        for _ in range(50):
            ended = kill_after(moments.uniform(0, 1.2 * took), disturbed.run, tmp_path / "log")
            killed += not ended
            ready = ready_cases(disturbed.preprocessed, "nnUNetPlans_3d_fullres")
            found.add(len(ready))
            for case in ready:
                name = f"{case}.b2nd"
                assert voxels_of(disturbed.folder / name) == expected[name], "a case is whole, or it is not there"
            if ended:
                break
        disturbed.run()
        assert contents(disturbed) == expected
    assert len(found) > 2, "kills came at different moments"


@pytest.mark.parametrize("method", TRAINERS, ids=lambda method: method.__name__)
def test_checkpoint_writing(method, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(method, planned_2d, monkeypatch, tmp_path)
    file = tmp_path / "checkpoint_latest.pth"

    def write_for_ever():
        while True:
            with torch.no_grad():
                for parameter in trainer.network.parameters():
                    parameter.fill_(trainer.current_epoch)
            trainer.save_checkpoint(str(file))
            trainer.current_epoch += 1

    moments, epochs = random.Random(1), []
    for _ in range(KILLS):
        assert not kill_after(moments.uniform(0.05, 0.4), write_for_ever, tmp_path / "log")
        if file.is_file():
            checkpoint = torch.load(file, weights_only=True)
            epoch = checkpoint["current_epoch"] - 1
            assert all((tensor == epoch).all() for name, tensor in checkpoint["network_weights"].items())
            epochs.append(epoch)
    assert len(set(epochs)) > 5, "kills came at different moments"
