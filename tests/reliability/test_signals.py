"""SIGTERM, workers that die, a full disk: training ends in an orderly way, and what was saved stays."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from method_steps import TRAINERS, make_trainer

from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.processes import handled_sigterm, killed_workers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def make_short(method, planned, folder, epochs=50):
    """A trainer of short epochs that writes to a folder."""
    trainer = make_trainer(method, planned, pytest.MonkeyPatch(), folder)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, 4, 1
    trainer.save_every = 1
    return trainer


def train(*arguments):
    make_short(*arguments).run_training()


def prepare_for_ever(*arguments):
    trainer = make_short(*arguments)
    trainer._prepare_unlabeled_cases = lambda: (print("preparing", flush=True), time.sleep(1000))
    trainer.run_training()


def write_with_little_room(method, planned, folder, size):
    trainer = make_short(method, planned, folder)
    # A file that may grow no further, as on a full disk. Python ignores the signal, and writing fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))


def _start(log, function, arguments):
    os.setpgrp()
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    function(*arguments)


def in_a_process(function, *arguments, log, act=None) -> tuple[int, str]:
    """Run in a new process and do ``act(its process)`` meanwhile; returns exit code and output.

    Not in a fork: PyTorch's backward passes do not work in the fork of a process that has had some.
    """
    process = multiprocessing.get_context("spawn").Process(target=_start, args=(log, function, arguments))
    process.start()
    try:
        if act:
            act(process)
        process.join(120)
        assert process.exitcode is not None, f"it hangs: {log.read_text()[-3000:]}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return process.exitcode, log.read_text()


def until(condition, seconds=100.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found.append(int(status.parent.name))
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("torch_", "psm_", "sem."))}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, "set by make_trainer, and restored here")
    return tmp_path


def checkpoint_of(folder) -> Path | None:
    return next(folder.glob("*/*/fold_0/checkpoint_latest.pth"), None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("method", TRAINERS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("to_workers_too", [False, True], ids=["to the training", "to all its processes"])
def test_sigterm_leaves_a_checkpoint_and_no_process(method, to_workers_too, planned_2d, folder):
    before = shared_memory()
    workers: list[int] = []

    def act(process):
        until(lambda: checkpoint_of(folder))
        workers.extend(children(process.pid))
        assert len(workers) >= 3, "loaders of training, validation and unlabeled batches"
        for pid in [*(workers if to_workers_too else []), process.pid]:
            os.kill(pid, signal.SIGTERM)

    code, output = in_a_process(train, method, planned_2d, folder, log=folder / "log", act=act)
    assert code == 143, output[-3000:]
    assert "SIGTERM in epoch" in output
    # Where workers end first, the thread that waits for them says so with a traceback.
    assert to_workers_too or "Traceback" not in output
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), seconds=10)
    assert shared_memory() <= before

    latest = checkpoint_of(folder)
    checkpoint = torch.load(latest, weights_only=True)
    epoch = checkpoint["current_epoch"]
    assert epoch >= 1 and f"SIGTERM in epoch {epoch}," in output
    assert {len(values) for values in checkpoint["logging"].values()} == {epoch}
    resumed = make_short(method, planned_2d, folder, epoch + 1)
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == epoch
    resumed.run_training()
    assert {len(values) for values in resumed.logger.local_logger.my_fantastic_logging.values()} == {epoch + 1}


def test_sigterm_before_the_first_step_ends_at_once(planned_2d, folder):
    log = folder / "log"

    def act(process):
        until(lambda: log.is_file() and "preparing" in log.read_text())
        os.kill(process.pid, signal.SIGTERM)

    code, output = in_a_process(prepare_for_ever, CrossMatchTrainer, planned_2d, folder, log=log, act=act)
    assert code == 143 and "Traceback" not in output, output[-3000:]
    assert checkpoint_of(folder) is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_worker_is_named_and_training_does_not_hang(planned_2d, folder):
    def act(process):
        until(lambda: checkpoint_of(folder))
        # In the order in which they are started, the unlabeled loader's last.
        os.kill(sorted(children(process.pid))[-1], signal.SIGKILL)

    code, output = in_a_process(train, CrossMatchTrainer, planned_2d, folder, log=folder / "log", act=act)
    assert code == 1
    assert "worker 1 of 1 that make unlabeled batches was ended by SIGKILL" in output
    assert "nnUNet_n_proc_DA, 1 now" in output and "--c" in output
    torch.load(checkpoint_of(folder), weights_only=True)


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(planned_2d, folder):
    file = folder / "checkpoint_latest.pth"
    make_short(CrossMatchTrainer, planned_2d, folder).save_checkpoint(str(file))
    before = file.read_bytes()
    arguments = CrossMatchTrainer, planned_2d, folder, len(before) // 2
    code, output = in_a_process(write_with_little_room, *arguments, log=folder / "log")
    assert code == 1
    assert f"The checkpoint {file} could not be written" in output and "MiB are free there" in output
    assert file.read_bytes() == before and [path.name for path in folder.glob("*.p*")] == [file.name]


def test_sigterm_in_forked_processes_and_other_threads_is_as_ever():
    before = signal.getsignal(signal.SIGTERM)
    with handled_sigterm() as state:
        state.held = True
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.3)
        child.terminate()
        child.join(20)
        assert child.exitcode == -signal.SIGTERM and not state.came
        os.kill(os.getpid(), signal.SIGTERM)
        assert state.came
        assert killed_workers({"batches": [child]}) == []
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere():
        with handled_sigterm() as state:
            states.append(state)

    states: list = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(states) == 1 and signal.getsignal(signal.SIGTERM) is before


def test_a_checkpoint_of_an_epoch_that_was_cut_off_logs_whole_epochs_alone(planned_2d, folder):
    trainer = make_short(CrossMatchTrainer, planned_2d, folder)
    trainer.logger.log("lrs", 0.01, 0)
    trainer._write_checkpoint(str(folder / "checkpoint.pth"), next_epoch=0)
    assert not any(torch.load(folder / "checkpoint.pth", weights_only=True)["logging"].values())
