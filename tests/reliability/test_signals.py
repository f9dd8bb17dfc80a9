"""SIGTERM, workers that die, a full disk: training ends in an orderly way, and what was saved stays."""

from __future__ import annotations

import json
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


def in_a_process(function, *arguments, act=None) -> tuple[int, str]:
    """Run in a forked process and do ``act(its process)`` meanwhile; returns exit code and output."""
    log = Path(os.environ["nnUNet_results"]) / "output.txt"

    def run():
        os.setpgrp()
        # A fork has no OpenMP threads, and would wait for them where this process has had some.
        torch.set_num_threads(1)
        # pytest has put its own streams there.
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        if act:
            act(process)
        process.join(120)
        assert process.exitcode is not None, f"it hangs: {log.read_text()[-3000:]}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
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
def make(planned_2d, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")

    def factory(method=CrossMatchTrainer, epochs=50):
        trainer = make_trainer(method, planned_2d, monkeypatch, tmp_path)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, 4, 1
        trainer.save_every = 1
        return trainer

    return factory


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "method", [TRAINERS[0], *(pytest.param(method, marks=pytest.mark.slow) for method in TRAINERS[1:])]
)
@pytest.mark.parametrize("to_workers_too", [False, True], ids=["to the training", "to all its processes"])
def test_sigterm_leaves_a_checkpoint_and_no_process(method, to_workers_too, make, tmp_path):
    trainer = make(method)
    before = shared_memory()
    workers: list[int] = []

    def act(process):
        until(lambda: (Path(trainer.output_folder) / "checkpoint_latest.pth").is_file())
        workers.extend(children(process.pid))
        assert len(workers) >= 3, "loaders of training, validation and unlabeled batches"
        for pid in [*(workers if to_workers_too else []), process.pid]:
            os.kill(pid, signal.SIGTERM)

    code, output = in_a_process(trainer.run_training, act=act)
    assert code == 143, output[-3000:]
    assert "SIGTERM in epoch" in output and "Traceback" not in output
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), seconds=10)
    assert shared_memory() <= before

    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_latest.pth", weights_only=True)
    epoch = checkpoint["current_epoch"]
    assert epoch >= 1 and f"SIGTERM in epoch {epoch}," in output
    assert {len(values) for values in checkpoint["logging"].values()} == {epoch}
    resumed = make(method, epochs=epoch + 1)
    resumed.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == epoch
    resumed.run_training()
    assert {len(values) for values in resumed.logger.local_logger.my_fantastic_logging.values()} == {epoch + 1}


def test_sigterm_before_the_first_step_ends_at_once(make):
    trainer = make()
    trainer._prepare_unlabeled_cases = lambda: (print("preparing", flush=True), time.sleep(100))

    def act(process):
        until(lambda: "preparing" in (Path(os.environ["nnUNet_results"]) / "output.txt").read_text())
        os.kill(process.pid, signal.SIGTERM)

    began = time.monotonic()
    code, output = in_a_process(trainer.run_training, act=act)
    assert code == 143 and time.monotonic() - began < 60 and "Traceback" not in output
    assert not list(Path(trainer.output_folder).glob("*.pth"))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_worker_is_named_and_training_does_not_hang(make):
    trainer = make()

    def act(process):
        until(lambda: (Path(trainer.output_folder) / "checkpoint_latest.pth").is_file())
        # In the order in which they are started.
        os.kill(sorted(children(process.pid))[-1], signal.SIGKILL)

    code, output = in_a_process(trainer.run_training, act=act)
    assert code == 1
    assert "worker 1 of 1 that make unlabeled batches was ended by SIGKILL" in output
    assert "nnUNet_n_proc_DA, 1 now" in output and "--c" in output
    torch.load(Path(trainer.output_folder) / "checkpoint_latest.pth", weights_only=True)


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(make, tmp_path):
    trainer = make()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()

    def write_with_little_room():
        # A file that may grow no further, as on a full disk. Python ignores the signal, and writing fails.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
        trainer.save_checkpoint(str(file))

    code, output = in_a_process(write_with_little_room)
    assert code == 1
    assert f"The checkpoint {file} could not be written" in output and "MiB are free there" in output
    assert file.read_bytes() == before and [path.name for path in tmp_path.glob("*.p*")] == [file.name]


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


def test_a_plan_of_one_epoch_writes_json_lists(make, tmp_path):
    """Checkpoints of an epoch that was cut off hold as many values per key as there are whole epochs: none."""
    trainer = make()
    trainer._write_checkpoint(str(tmp_path / "checkpoint.pth"), next_epoch=0)
    logging = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["logging"]
    assert json.dumps(logging) and not any(logging.values())
