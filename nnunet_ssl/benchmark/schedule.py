"""The trainings of a campaign, several at once, each in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from tqdm import tqdm

from nnunet_ssl.benchmark.arms import stages
from nnunet_ssl.benchmark.campaign import Campaign, Training
from nnunet_ssl.benchmark.progress import Progress, progress_file
from nnunet_ssl.benchmark.results import Run, read_runs
from nnunet_ssl.benchmark.training import HELD, WITH_PARENT, Task, lock_file
from nnunet_ssl.files import lock

_LOOK_SECONDS = 1.0
_LOG_LINES = 15


@dataclass(frozen=True)
class Machine:
    """What trainings get.

    Attributes:
        device: cpu, cuda or mps.
        jobs: trainings at once.
        gpus: for ``CUDA_VISIBLE_DEVICES``, one name per GPU; empty without.
        threads: of each training process.
        workers: that make batches, for each training's loader.
        compiled: see :class:`~nnunet_ssl.benchmark.training.Task`.
    """

    device: str
    jobs: int
    gpus: tuple[str, ...]
    threads: int
    workers: int
    compiled: bool

    def environment(self, place: int) -> dict[str, str]:
        """Of the training in one of the ``jobs`` places; what the user has set stays."""
        one_each = {"nnUNet_n_proc_DA": str(self.workers), "nnUNet_def_n_proc": str(self.workers)}
        # Where few cores are shared with the workers, threads that spin while they wait cost more than the work.
        environment = {**one_each, "OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        return environment


@dataclass
class _Running:
    training: Training
    place: int
    process: subprocess.Popen[bytes]
    started: float


def run_trainings(
    campaign: Campaign, trainings: Sequence[Training], machine: Machine, *, until: float = math.inf
) -> dict[str, str]:
    """Train what the table of results lacks; one that another process trains is waited for.

    Args:
        campaign: of the trainings.
        trainings: in the order that they begin in.
        machine: see :class:`Machine`.
        until: ``time.monotonic()`` at which what is not ready is stopped; it can go on later.

    Returns:
        by key, why a training ended without a result.
    """
    problems: dict[str, str] = {}
    waiting = [training for training in trainings if training.key not in results_of(campaign)]
    names = {training.key: f"{number}/{len(trainings)} {training.key}" for number, training in enumerate(trainings, 1)}
    if len(waiting) < len(trainings):
        print(f"{len(trainings) - len(waiting)} of {len(trainings)} trainings are in {campaign.results}", flush=True)
    running: dict[int, _Running] = {}
    total = sum(epochs_of(campaign, training) for training in trainings)
    with (
        tqdm(total=total, unit="epoch", desc="train", disable=None, leave=False) as bar,
        _all_ended(running),
    ):
        while (waiting or running) and time.monotonic() < until:
            waiting = [training for training in waiting if training.key not in results_of(campaign)]
            free = [place for place in range(machine.jobs) if place not in running]
            for training in [one for one in waiting if free and not _is_held(campaign, one)][: len(free)]:
                waiting.remove(training)
                place = free.pop(0)
                running[place] = _start(campaign, training, machine, place)
            time.sleep(_LOOK_SECONDS)
            for place, one in list(running.items()):
                code = one.process.poll()
                if code is None:
                    continue
                del running[place]
                minutes = (time.monotonic() - one.started) / 60
                if code == HELD:
                    waiting.append(one.training)
                elif code or one.training.key not in results_of(campaign):
                    problems[one.training.key] = _why(campaign, one.training, code)
                    tqdm.write(f"{names[one.training.key]}: {problems[one.training.key]}", file=sys.stdout)
                else:
                    rest = expected_seconds(campaign, trainings, machine.jobs)
                    text = f"{names[one.training.key]}: {_summary(campaign, one.training)}, {minutes:.1f} min"
                    tqdm.write(f"{text}{'; ' + _end(rest) if rest else ''}", file=sys.stdout)
                sys.stdout.flush()
            bar.n = sum(epochs_done(campaign, training) for training in trainings)
            bar.set_postfix_str(_end(expected_seconds(campaign, trainings, machine.jobs)), refresh=True)
    return problems


def expected_seconds(campaign: Campaign, trainings: Sequence[Training], jobs: int) -> float:
    """Until all trainings are done, by what their epochs have taken so far; 0 while nothing is known.

    An arm of which no epoch has ended is taken to be as slow as the mean of the others.
    """
    left: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    for training in trainings:
        name = training.arm.name
        progress = Progress.read(progress_file(campaign.task(training)))
        seconds.setdefault(name, []).extend(progress.epochs)
        left[name] = left.get(name, 0) + epochs_of(campaign, training) - epochs_done(campaign, training)
    known = {name: statistics.fmean(values) for name, values in seconds.items() if values}
    if not known:
        return 0.0
    unknown = statistics.fmean(known.values())
    return sum(count * known.get(name, unknown) for name, count in left.items()) / jobs


def epochs_of(campaign: Campaign, training: Training) -> int:
    """Of all its stages."""
    return sum(stage.epochs for stage in stages(training.arm, campaign.epochs))


def epochs_done(campaign: Campaign, training: Training) -> int:
    """That a training has done; all where its result is known, even if its folder has gone."""
    total = epochs_of(campaign, training)
    if training.key in results_of(campaign):
        return total
    return min(total, len(Progress.read(progress_file(campaign.task(training))).epochs))


def _end(seconds: float) -> str:
    if not seconds:
        return ""
    end = datetime.now() + timedelta(seconds=seconds)
    return f"all done about {end:%H:%M}" + (f" on {end:%d %b}" if end.date() != datetime.now().date() else "")


def results_of(campaign: Campaign) -> Mapping[str, Run]:
    """The table of results, by training; empty where there is none yet."""
    file = campaign.results
    return _read(file, file.stat().st_mtime_ns) if file.is_file() else {}


@functools.lru_cache(maxsize=1)
def _read(file: Path, written: int) -> Mapping[str, Run]:
    return read_runs(file)


def _is_held(campaign: Campaign, training: Training) -> bool:
    file = lock_file(campaign.task(training))
    if not file.is_file():
        return False
    with lock(file, wait=False) as held:
        return not held


def _start(campaign: Campaign, training: Training, machine: Machine, place: int) -> _Running:
    task_file, log = campaign.task(training), campaign.log(training)
    task = Task(
        folder=str(campaign.folder),
        key=training.key,
        arm=training.arm.name,
        trainer=training.arm.trainer,
        settings=training.arm.settings,
        warm=training.arm.warm,
        rounds=training.arm.rounds,
        setting=training.setting.name,
        labeled=training.setting.labeled,
        fold=training.setting.fold,
        seed=training.seed,
        device=machine.device,
        threads=machine.threads,
        compiled=machine.compiled,
        jobs=machine.jobs,
    )
    task.write(task_file)
    results = campaign.nnunet_results(training)
    for folder in (results, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    environment = {**machine.environment(place), "nnUNet_results": str(results)}
    command = [sys.executable, "-m", "nnunet_ssl.benchmark.training", str(task_file), WITH_PARENT]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
        )
    return _Running(training, place, process, time.monotonic())


@contextlib.contextmanager
def _all_ended(running: Mapping[int, _Running]) -> Iterator[None]:
    """However this ends, no training goes on behind the user's back."""
    try:
        yield
    finally:
        for one in running.values():
            assert one.process.stdin is not None
            one.process.stdin.close()
        for one in running.values():
            one.process.wait()


def _why(campaign: Campaign, training: Training, code: int) -> str:
    log = campaign.log(training)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])
    return f"ended with exit code {code} and no result. The end of {log}:\n{last}"


def _summary(campaign: Campaign, training: Training) -> str:
    run = results_of(campaign)[training.key]
    dice = [metrics.dice for case in run.result.cases for metrics in case.metrics.values()]
    known = [value for value in dice if value == value]
    return f"Dice {statistics.fmean(known):.3f}" if known else "no Dice"


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_machine(device: str, jobs: int, *, compiled: bool) -> Machine:
    """Share this machine's GPUs and cores among ``jobs`` trainings; 1 thread on a GPU, as nnU-Net has it."""
    gpus: tuple[str, ...] = ()
    if device == "cuda":
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        named = [name.strip() for name in visible.split(",") if name.strip()] if visible else []
        gpus = tuple(named or map(str, range(torch.cuda.device_count())))
    share = max(1, cores() // jobs)
    threads = int(os.environ.get("OMP_NUM_THREADS") or share) if device == "cpu" else 1
    workers = 1 if device == "cpu" else min(12, share)
    return Machine(device, jobs, gpus, threads, workers, compiled)
