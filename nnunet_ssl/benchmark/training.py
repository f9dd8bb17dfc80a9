"""One training of a campaign, in a process of its own: ``python -m nnunet_ssl.benchmark.training TASK.json``.

What ``nnUNetv2_train`` does, with three differences: it is seeded, there is a checkpoint after each epoch, and its
validation is evaluated and added to the campaign's table.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nnunet_ssl
from nnunet_ssl.benchmark.arms import BASELINE, Arm, Stage, plans_of_arm, stages
from nnunet_ssl.benchmark.campaign import Campaign
from nnunet_ssl.benchmark.progress import Progress, costs, measure, progress_file
from nnunet_ssl.benchmark.results import add_run
from nnunet_ssl.benchmark.self_training import Home
from nnunet_ssl.data.nnunet_files import read_dataset_json, read_json, read_plans
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import lock, write_text
from nnunet_ssl.processes import derived_seed, handled_signals, seed_this_process

HELD = 75
"""Exit code of a process that leaves its training to the one that holds its lock (EX_TEMPFAIL)."""

WITH_PARENT = "--with-parent"
"""Last argument of a process whose standard input is a pipe that its parent's end closes."""

_REFERENCE_STEPS = 15

_REMEDY = "Run the benchmark again; it writes the file again."


@dataclass(frozen=True)
class Task:
    """What the process of a training is told; written as JSON.

    Attributes:
        folder: of the campaign.
        key: see :attr:`~nnunet_ssl.benchmark.campaign.Training.key`.
        arm: its name.
        trainer: class name.
        settings: see :class:`~nnunet_ssl.benchmark.arms.Arm`.
        warm: see :class:`~nnunet_ssl.benchmark.arms.Arm`.
        rounds: see :class:`~nnunet_ssl.benchmark.arms.Arm`.
        setting: name of the setting.
        labeled: number of labeled cases.
        fold: number of the fold.
        seed: see :func:`train`.
        device: cpu, cuda or mps.
        threads: of the training process.
        compiled: ``torch.compile`` on a CPU too, where nnU-Net itself never does.
        jobs: trainings at once, which make each other slower.
    """

    folder: str
    key: str
    arm: str
    trainer: str
    settings: Mapping[str, Any]
    warm: float
    rounds: int
    setting: str
    labeled: int
    fold: int
    seed: int
    device: str
    threads: int
    compiled: bool
    jobs: int

    def stages(self, campaign: Campaign) -> list[Stage]:
        """See :func:`~nnunet_ssl.benchmark.arms.stages`."""
        return stages(self._arm, campaign.epochs)

    def home(self, campaign: Campaign, task_file: Path) -> Home | None:
        """The folders in which self-training takes place; None for any other arm."""
        folder = campaign.folder / "self_training" / task_file.stem
        return Home(folder, campaign, self.setting, self._arm, self.device) if self.rounds else None

    @property
    def _arm(self) -> Arm:
        return Arm(self.arm, self.trainer, self.settings, self.warm, self.rounds)

    def write(self, file: Path) -> None:
        """Write it to a file."""
        write_text(file, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Task:
        """Read what :meth:`write` wrote."""
        try:
            return cls(**read_json(file, otherwise=_REMEDY))
        except TypeError as error:
            raise UserError(f"{file} is from another version ({error}). {_REMEDY}") from None


def lock_file(task_file: Path) -> Path:
    """Held by the process that trains."""
    return task_file.with_suffix(".lock")


def main(task_file: Path, *, with_parent: bool) -> int:
    """Train, validate, evaluate, and add the result to the campaign's table; ends with its parent if so asked."""
    if with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    with handled_signals(), lock(lock_file(task_file), wait=False) as held:
        if not held:
            return HELD
        train(Task.read(task_file), task_file)
    return 0


def train(task: Task, task_file: Path) -> None:
    """Train from the last checkpoint, or from the start, and add the result to the campaign's table.

    With a warm start nnUNetTrainer trains first, to the end of a shorter training, and the trainer then starts from its
    weights as with ``-pretrained_weights``. In self-training every training starts with random weights; the last
    one is evaluated.

    The seed sets Python, NumPy and PyTorch of this process and of the workers of nnU-Net's loaders. What goes on from a
    checkpoint is seeded by the epoch too.
    """
    import torch

    from nnunet_ssl.benchmark.campaign import read_campaign

    torch.set_num_threads(task.threads)
    # As nnUNetv2_train has them.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    campaign = read_campaign(Path(task.folder))
    progress = Progress.read(progress_file(task_file))
    parts = task.stages(campaign)
    home = task.home(campaign, task_file)
    if home is not None:
        home.enter()
    start, before = None, 0
    reference = functools.cache(functools.partial(baseline_step, task, campaign))
    for stage in parts:
        if home is not None and stage.round and stage.fold == 0:
            progress.between += home.make_dataset(stage.round)
        trainer = make_trainer(task, campaign, stage, home)
        _train_stage(trainer, task.seed, progress, progress_file(task_file), reference, start=start, before=before)
        folder = Path(trainer.output_folder)
        start = folder / "checkpoint_final.pth" if home is None else None
        before += stage.epochs

    started = time.monotonic()
    # Not compiled: validation has other shapes, for which it would be compiled again.
    validating = make_trainer(task, campaign, parts[-1], home, compiled=False)
    validating.initialize()
    validating.load_checkpoint(str(folder / "checkpoint_final.pth"))
    validating.perform_actual_validation(False)
    seconds = time.monotonic() - started

    from nnunetv2.paths import nnUNet_preprocessed

    from nnunet_ssl.evaluation.folders import evaluate_folder
    from nnunet_ssl.evaluation.segmentations import Segmentations

    # In self-training, the last dataset has an ignore label that the campaign's has not.
    preprocessed = Path(str(nnUNet_preprocessed)) / campaign.dataset
    segmentations = Segmentations.from_dataset_json(preprocessed / "dataset.json")
    result = evaluate_folder(folder / "validation", preprocessed / "gt_segmentations", segmentations)
    _, expected = trainer.do_split()
    if result.failed or {case.case for case in result.cases} != set(expected):
        raise UserError(f"Not all validation cases could be evaluated in {folder / 'validation'}: {result.failed}")
    iterations = campaign.epochs * trainer.num_iterations_per_epoch
    measured = costs(progress, [stage.epochs for stage in parts], campaign.epochs)
    about = {
        **describe(task, campaign, compiled=trainer._do_i_compile()),
        "iterations": iterations,
        **measured,
        "validation_seconds": round(seconds, 1),
    }
    add_run(campaign.results, about, result)


def _train_stage(
    trainer: Any,
    seed: int,
    progress: Progress,
    file: Path,
    reference: Callable[[], tuple[float, float]],
    *,
    start: Path | None,
    before: int,
) -> None:
    """Train one stage to its end, unless that is done; ``before`` is the number of epochs of the stages before it."""
    from nnunet_ssl.trainer.checkpoint import best_so_far

    folder = Path(trainer.output_folder)
    if (folder / "checkpoint_final.pth").is_file():
        return
    begun = (folder / "checkpoint_latest.pth").is_file()
    if not begun:
        progress.forget(before)
    measure(trainer, progress, file, reference())
    seed_this_process(derived_seed(seed, *([before] if before else [])))
    trainer.initialize()
    if begun:
        trainer.load_checkpoint(str(folder / "checkpoint_latest.pth"))
        # nnU-Net writes checkpoint_latest before it compares the epoch with the best one.
        trainer._best_ema = best_so_far(trainer.logger.get_value("ema_fg_dice", step=None))
    elif start is not None:
        from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

        load_pretrained_weights(trainer.network, str(start))
    _seed_workers(seed, before + trainer.current_epoch)
    seed_this_process(derived_seed(seed, before + trainer.current_epoch))
    trainer.run_training()


def baseline_step(task: Task, campaign: Campaign) -> tuple[float, float]:
    """Median seconds of a step of nnUNetTrainer in this process, and of its processor time.

    Another machine, or another day of the same one, can be half as fast: a training's steps are compared with these.
    """
    import torch

    from nnunet_ssl.trainer.memory import without_a_trace
    from nnunet_ssl.trainer.step_time import step_times

    with without_a_trace():
        trainer = make_trainer(task, campaign, Stage(Arm(BASELINE, BASELINE), 1))
    walls, cpus = zip(*step_times(trainer, steps=_REFERENCE_STEPS), strict=True)
    del trainer
    gc.collect()
    # The training that follows begins as if nothing had been there.
    torch._dynamo.reset()
    if task.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return statistics.median(walls), statistics.median(cpus)


def make_trainer(
    task: Task, campaign: Campaign, stage: Stage, home: Home | None = None, *, compiled: bool | None = None
) -> Any:
    """nnU-Net's trainer of a stage, with a checkpoint after each epoch; ``compiled`` is for another choice."""
    import torch
    from nnunetv2.paths import nnUNet_preprocessed

    from nnunet_ssl.trainer_lookup import find_trainer

    if home is None:
        dataset = Path(str(nnUNet_preprocessed)) / campaign.dataset
        plans = read_plans(campaign.plans_file, otherwise=_REMEDY)
        plans, configuration = plans_of_arm(plans, campaign.configuration, stage.arm)
    else:
        dataset = home.preprocessed(stage.round)
        plans, configuration = home.plans(stage)
    plans["continue_training"] = False
    plans["plans_name"] += stage.plans
    dataset_json = read_dataset_json(dataset / "dataset.json", otherwise="Plan the dataset again.")
    trainer_class = find_trainer(stage.arm.trainer)
    device = torch.device(task.device)
    fold = task.fold if stage.fold is None else stage.fold
    trainer = trainer_class(
        plans=plans, configuration=configuration, fold=fold, dataset_json=dataset_json, device=device
    )
    trainer.num_epochs = stage.epochs
    trainer.save_every = 1
    wanted = task.compiled if compiled is None else compiled
    if compiled is not None or task.device == "cpu":
        trainer._do_i_compile = lambda: wanted
    save = trainer.save_checkpoint

    def save_whole(filename: str) -> None:
        # nnU-Net writes over the last checkpoint, and a kill meanwhile would leave none.
        save(f"{filename}.whole")
        if Path(f"{filename}.whole").is_file():
            Path(f"{filename}.whole").replace(filename)

    trainer.save_checkpoint = save_whole
    return trainer


def _seed_workers(seed: int, epoch: int) -> None:
    """Give nnU-Net's loaders, which are not seeded otherwise, seeds for their workers, in the order they start in."""
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

    start: Callable[[Any], None] = NonDetMultiThreadedAugmenter._start
    count = 0

    def seeded(self: Any) -> None:
        nonlocal count
        if not self.initialized and not any(self.seeds):
            count += 1
            self.seeds = [derived_seed(seed, epoch, count, worker) for worker in range(self.num_processes)]
        start(self)

    NonDetMultiThreadedAugmenter._start = seeded


def describe(task: Task, campaign: Campaign, *, compiled: bool) -> dict[str, object]:
    """The columns on what a training was made with."""
    import torch

    device = f"cuda: {torch.cuda.get_device_name()}" if task.device == "cuda" else task.device
    return {
        "training": task.key,
        "campaign": campaign.identifier,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "dataset": campaign.dataset,
        "plans": campaign.plans,
        "configuration": campaign.configuration,
        "arm": task.arm,
        "trainer": task.trainer,
        "settings": json.dumps(task.settings),
        "setting": task.setting,
        "labeled": task.labeled,
        "fold": task.fold,
        "seed": task.seed,
        "epochs": campaign.epochs,
        "nnunet_ssl": f"{nnunet_ssl.__version__} ({source_digest()})",
        "nnunetv2": version("nnunetv2"),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "processor": processor_name(),
        "device": device,
        "threads": task.threads,
        "compiled": compiled,
        "jobs": task.jobs,
    }


def source_digest() -> str:
    """Of this package's source: between two releases there are many versions of one number."""
    home = Path(nnunet_ssl.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(home.rglob("*.py")):
        # The trainers' folder lies inside the package or next to it, and only names what the package holds.
        if file.parent.name != "trainers":
            content = file.read_bytes().replace(b"\r\n", b"\n")
            digest.update(file.relative_to(home).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()[:8]


def processor_name() -> str:
    """What the maker calls it, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def _end_with_parent() -> None:
    """Stop when the benchmark that started this process is gone: nothing else would. Its end closes the pipe."""
    while os.read(0, 1):
        pass
    if sys.platform != "win32":
        # Not SIGINT, which a process in the background may have been told to ignore.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), with_parent=sys.argv[2:] == [WITH_PARENT]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
