"""SIGTERM, workers that die, a full disk: training ends in an orderly way, and what was saved stays."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from method_steps import TRAINERS, make_short
from own_process import children, exit_code, shared_memory, until

from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.processes import handled_signals, killed_workers
from nnunet_ssl.trainer.loaders import Loaders

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.fixture(autouse=True)
def sigint_is_not_ignored():
    """A shell that runs the tests in the background has SIGINT ignored, by them and by what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)


def train(*arguments):
    make_short(*arguments).run_training()


def prepare_for_ever(*arguments):
    trainer = make_short(*arguments)
    trainer.do_split = lambda: (print("preparing", flush=True), time.sleep(1000))
    trainer.run_training()


def write_with_little_room(method, planned, folder, size):
    trainer = make_short(method, planned, folder)
    # A file that may grow no further, as on a full disk. Python ignores the signal, and writing fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))


@pytest.fixture
def folder(environment, tmp_path):
    return tmp_path


def checkpoint_of(folder) -> Path | None:
    return next(folder.glob("*/*/fold_0/checkpoint_latest.pth"), None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("method", TRAINERS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("to_workers_too", [False, True], ids=["to the training", "to all its processes"])
def test_sigterm_leaves_a_checkpoint_and_no_process(method, to_workers_too, planned_2d, folder):
    pids: list[int] = []

    def act(process):
        until(lambda: checkpoint_of(folder))
        workers = children(process.pid)
        pids.extend([process.pid, *workers])
        assert len(workers) >= 3, "loaders of training, validation and unlabeled batches"
        for pid in [*(workers if to_workers_too else []), process.pid]:
            os.kill(pid, signal.SIGTERM)

    code, output = exit_code(train, method, planned_2d, folder, log=folder / "log", act=act)
    assert code == 143, output[-3000:]
    assert "SIGTERM in epoch" in output
    # Where workers end first, the thread that waits for them says so with a traceback.
    assert to_workers_too or "Traceback" not in output
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds=10)
    assert not shared_memory(pids)

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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_ends_as_asked(sent, code, planned_2d, tmp_path):
    """A signal to nnUNetv2_train and its workers, as from a scheduler or from Ctrl-C."""
    command = [Path(sysconfig.get_path("scripts"), "nnUNetv2_train"), planned_2d.dataset_id, "tiny", 0]
    command += ["-tr", "CrossMatchTrainer_1epoch", "-device", "cpu"]
    environment = {**planned_2d.environment, "nnUNet_results": str(tmp_path)}
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            list(map(str, command)),
            env=environment,
            start_new_session=True,
            stdout=output,
            stderr=output,
            # What a shell starts in the background has it ignored, and these tests may be.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        try:
            until(lambda: "Epoch 0" in log.read_text())
            time.sleep(1)  # steps are done
            pids = [process.pid, *children(process.pid)]
            os.killpg(process.pid, sent)
            assert process.wait(300) == code, log.read_text()[-3000:]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert len(pids) > 3
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds=10)
    assert not shared_memory(pids)
    latest = checkpoint_of(tmp_path)
    assert torch.load(latest, weights_only=True)["current_epoch"] == 0
    assert f"{'Ctrl-C' if sent == signal.SIGINT else 'SIGTERM'} in epoch 0, after" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_sigterm_before_the_first_step_ends_at_once(planned_2d, folder):
    log = folder / "log"

    def act(process):
        until(lambda: log.is_file() and "preparing" in log.read_text())
        os.kill(process.pid, signal.SIGTERM)

    code, output = exit_code(prepare_for_ever, CrossMatchTrainer, planned_2d, folder, log=log, act=act)
    assert code == 143 and "Traceback" not in output, output[-3000:]
    assert checkpoint_of(folder) is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_worker_is_named_and_training_does_not_hang(planned_2d, folder):
    def act(process):
        until(lambda: checkpoint_of(folder))
        # In the order in which they are started, the unlabeled loader's last.
        os.kill(sorted(children(process.pid))[-1], signal.SIGKILL)

    code, output = exit_code(train, CrossMatchTrainer, planned_2d, folder, log=folder / "log", act=act)
    assert code == 1
    assert "worker 1 of 1 that make unlabeled batches was killed by SIGKILL" in output
    assert "nnUNet_n_proc_DA, 1 now" in output and "--c" in output
    torch.load(checkpoint_of(folder), weights_only=True)


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(planned_2d, folder):
    file = folder / "checkpoint_latest.pth"
    make_short(CrossMatchTrainer, planned_2d, folder).save_checkpoint(str(file))
    before = file.read_bytes()
    arguments = CrossMatchTrainer, planned_2d, folder, len(before) // 2
    code, output = exit_code(write_with_little_room, *arguments, log=folder / "log")
    assert code == 1
    assert f"The checkpoint {file} could not be written" in output and "MiB are free there" in output
    assert file.read_bytes() == before and [path.name for path in folder.glob("*.p*")] == [file.name]


def sent(number, seconds):
    """A forked process that was sent a signal, after it has ended or ``seconds`` are over."""
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.3)
    os.kill(child.pid, number)
    child.join(seconds)
    return child


def start_orphan(pids):
    """Forks a shielded process, whose number it sends, and ends before it."""
    with handled_signals() as state:
        state.shields = True
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        pids.send(child.pid)
        os._exit(0)


@BOTH
def test_shielded_processes_leave_signals_to_the_one_that_forked_them(number):
    fork = multiprocessing.get_context("fork")
    with handled_signals() as state:
        state.shields = True
        child = sent(number, seconds=1)
        assert child.is_alive() and not state.wanted
        child.kill()
        child.join(20)
        state.shields = False
        assert sent(number, seconds=20).exitcode == -number
    here, there = fork.Pipe()
    parent = fork.Process(target=start_orphan, args=(there,))
    parent.start()
    orphan = here.recv()
    # join() would wait for the orphan too, which holds the same pipe.
    until(lambda: parent.exitcode is not None, seconds=20)
    os.kill(orphan, number)

    def gone() -> bool:
        file = Path(f"/proc/{orphan}/stat")
        return not file.exists() or file.read_text().rpartition(")")[2].split()[0] == "Z"

    until(gone, seconds=10)


class Endless:
    """What a worker makes batches of."""

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(0.01)
        return {"data": 0}

    def set_thread_id(self, thread_id):
        pass


def test_workers_end_although_one_was_killed_in_a_lock(monkeypatch):
    """A killed worker may have held the lock of the event by which all are told to end."""
    monkeypatch.setattr("nnunet_ssl.trainer.loaders.SECONDS_TO_END", 1)
    loaders = Loaders()
    loader = NonDetMultiThreadedAugmenter(Endless(), None, 2, wait_time=0.002)
    loaders.augmenters["training"] = loader
    next(loader)
    workers = list(loader._processes)

    def die_in_the_lock():
        loader.abort_event._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=die_in_the_lock)
    killed.start()
    killed.join(20)
    start = time.monotonic()
    loaders.finish()
    assert time.monotonic() - start < 10
    assert not any(worker.is_alive() for worker in workers)


@BOTH
def test_signals_in_forked_processes_and_other_threads_are_as_ever(number):
    before = signal.getsignal(number)
    with handled_signals() as state:
        state.held = True
        child = sent(number, seconds=20)
        assert child.exitcode == -number and not state.wanted
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert state.came == number, "the first of several"
        assert state.name == ("Ctrl-C" if number == signal.SIGINT else "SIGTERM")
        assert killed_workers({"batches": [child]}) == []
    assert signal.getsignal(number) is before

    def elsewhere():
        with handled_signals() as state:
            states.append(state)

    states: list = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(states) == 1 and signal.getsignal(number) is before


@BOTH
def test_signals_end_a_process_with_their_code_where_nothing_holds_them(number):
    with pytest.raises(SystemExit) as stopped, handled_signals():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert stopped.value.code == 128 + number


def test_ctrl_c_that_is_ignored_stays_ignored():
    """As in a background job of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_checkpoint_of_an_epoch_that_was_cut_off_logs_whole_epochs_alone(planned_2d, folder):
    trainer = make_short(CrossMatchTrainer, planned_2d, folder)
    trainer.logger.log("lrs", 0.01, 0)
    trainer.write_checkpoint_of_epoch(str(folder / "checkpoint.pth"), next_epoch=0)
    assert not any(torch.load(folder / "checkpoint.pth", weights_only=True)["logging"].values())
