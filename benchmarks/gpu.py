"""Everything that only a GPU can show, in one command: one table per question, the most important first.

    python benchmarks/gpu.py -o FOLDER
    python benchmarks/gpu.py -o FOLDER -d 901 -c 3d_fullres --accuracy 2d_coarse

Questions:

    a  what does a training step cost against nnU-Net's and against its bare passes, split and stacked, compiled or not?
    b  how much memory does it take, against what is computed beforehand?
    c  does the memory mode "auto" fall back from stacked to split when the memory ends?
    d  which kernels take the time of a mutual learning step?
    e  where does a step wait for the GPU?
    f  does the inductor's force_layout_optimization help?
    g  mixed precision: which of the first steps are skipped, are all losses finite?
    h  accuracy: nnunet-ssl benchmark with trainings in parallel (needs a dataset and --accuracy)

All but h run on random images and need no data: with patches of 128x128x128 voxels, batches of 2 and the plain U-Net of
32 to 320 features, and with the plans of -d and -c where these are given. Each group of measurements has processes of
its own; those that are timed have the GPU for themselves. Every row is written to FOLDER/gpu.jsonl as soon as it is
known, and the tables to FOLDER/gpu.md; after --minutes what is left is skipped, and its rows say so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from common import method_names
from gpu_measurements import measure
from gpu_report import header, one_line, report
from gpu_rows import LARGE_PLAN, SMALL_PLAN, SUPERVISED, Arm, Row, read_rows, write_row

from nnunet_ssl.files import write_text

QUESTIONS = "abcdefgh"
MODES, BARE = ("stacked", "split"), ("bare stacked", "bare separate")


@dataclass(frozen=True)
class Stage:
    """Measurements that may begin together.

    Attributes:
        arms: the most important first.
        together: arms of which it is the same share a process.
        until: the share of all minutes after which the rest is skipped.
        at_once: whether all processes run at once, because they only wait for the GPU most of the time.
        cores: of each process, for compilations.
    """

    arms: list[Arm]
    together: Callable[[Arm], Hashable]
    until: float
    at_once: bool = False
    cores: int = 2


def main() -> None:
    """Run from the command line."""
    args = _arguments()
    if args.measure:
        measure(args, [Arm(**arm) for arm in json.loads(args.measure)])
        return
    if (args.output / "gpu.jsonl").exists():
        raise SystemExit(f"{args.output} holds results of another run: name another folder with -o")
    (args.output / "logs").mkdir(parents=True, exist_ok=True)
    # A scheduler's signal ends it like Ctrl-C: with its processes, and with the tables of what is known.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = Run(args)
    try:
        for stage in stages(args):
            run.stage(stage)
        if "h" in args.questions:
            run.accuracy()
    except KeyboardInterrupt:
        run.show_new_rows()
        raise SystemExit(f"interrupted; {args.output / 'gpu.md'} has what is known") from None
    run.show_new_rows()
    print("\n" + (args.output / "gpu.md").read_text(encoding="utf-8"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="output", type=Path, required=True, help="a new folder for rows, tables and logs")
    parser.add_argument("-d", help="dataset id or name, planned; preprocessed for question h")
    parser.add_argument("-c", default="3d_fullres", help="its configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="its plans")
    parser.add_argument("-tr", nargs="+", help="methods; default: all that nnunet-ssl trainers lists")
    parser.add_argument("--questions", default=QUESTIONS, help=f"letters; default: {QUESTIONS}")
    parser.add_argument("--minutes", type=float, default=8, help="after which the rest is skipped; default: 8")
    parser.add_argument(
        "--jobs", type=int, help="processes at a time; half of the CPU's cores (default), fewer for compilations"
    )
    parser.add_argument("--accuracy", metavar="CONFIGURATION", help="configuration to train for question h")
    parser.add_argument("--labeled", nargs="+", type=int, default=[2, 8], help="labeled cases in question h")
    parser.add_argument("--epochs", type=int, default=10, help="of 250 iterations, in question h")
    parser.add_argument("--dry-run", action="store_true", help="all of it with tiny plans and few steps, on a CPU")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output = args.output.resolve()
    args.device = "cpu" if args.dry_run else "cuda"
    args.jobs = args.jobs or max(1, (os.cpu_count() or 2) // 2)
    if unknown := set(args.questions) - set(QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    if not (args.dry_run or args.measure or torch.cuda.is_available()):
        parser.error("PyTorch finds no CUDA GPU here; --dry-run does all of it on a CPU, with tiny plans")
    return args


def stages(args: argparse.Namespace) -> list[Stage]:
    """What is to be measured, the most important first."""
    methods = args.tr or method_names()
    plans = [LARGE_PLAN, *(["dataset"] if args.d else [])]

    def one(preferred: str) -> str:
        return preferred if preferred in methods else methods[0]

    def steps(compiled: bool) -> list[Arm]:
        arms = []
        for plan in plans:
            arms.append(Arm("a", SUPERVISED, plan, compiled=compiled))
            arms += [Arm("a", name, plan, mode, compiled) for name, mode in itertools.product(methods, MODES)]
        return arms

    everyone = [SUPERVISED, *methods]
    default_modes = [(name, "" if name == SUPERVISED else "stacked") for name in everyone]
    largest, mutual = one("CrossMatchTrainer"), one("MutualReliableTrainer")
    fall_back = [Arm("c", largest, LARGE_PLAN, limit=limit) for limit in (0.5, 0.1, 0.9)]
    bare = [Arm("a", name, plan, mode) for mode, plan, name in itertools.product(BARE, plans, methods)]
    kernels = [Arm("d", mutual, LARGE_PLAN, "stacked")]
    synchronizations = [Arm("e", name, SMALL_PLAN, mode) for name, mode in default_modes]
    compilations = [Arm("c", largest, LARGE_PLAN, compiled=True, limit=0.5)]
    compilations += [
        Arm("f", name, LARGE_PLAN, mode, compiled=True, layout=True)
        for name, mode in ((SUPERVISED, ""), (largest, "stacked"))
    ]
    scaled = [Arm("g", name, SMALL_PLAN, mode) for name, mode in default_modes]
    found = [
        # What is timed without torch.compile needs the GPU all the time. Few processes: each tries on its own which
        # convolutions are the fastest, which takes longer than the timed steps. With 16 cores beside an H200, eight
        # compilations at once took 50 to 80 seconds.
        Stage(steps(compiled=False), lambda arm: everyone.index(arm.trainer) % 3, 0.25, at_once=True),
        Stage([*fall_back, *kernels, *synchronizations], lambda arm: (arm.question, arm.trainer), 0.35),
        Stage(scaled, lambda arm: arm, 0.45),
        Stage(bare, lambda arm: everyone.index(arm.trainer) % 3, 0.55, at_once=True),
        Stage(steps(compiled=True), lambda arm: arm, 0.85),
        Stage(compilations, lambda arm: arm, 1.0),
    ]
    asked = set(args.questions) | ({"a"} if "b" in args.questions else set())
    found = [replace(stage, arms=[arm for arm in stage.arms if arm.question in asked]) for stage in found]
    found = [stage for stage in found if stage.arms]
    if found and "h" not in asked:
        # Nothing comes after the last.
        found = [replace(stage, until=stage.until / found[-1].until) for stage in found]
    if args.dry_run:
        # Two cores spend most of the time on starting processes.
        return [Stage([arm for stage in found for arm in stage.arms], lambda arm: arm.trainer, 0.7)]
    return found


class Run:
    """One run: its clock, its processes and what it has shown."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.start = time.monotonic()
        self.header = header(f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}", datetime.now())
        self.shown = 0

    def left(self, until: float = 1.0) -> float:
        """Seconds until a share of all minutes is over."""
        return self.start + 60 * self.args.minutes * until - time.monotonic()

    def stage(self, stage: Stage) -> None:
        """Measure the arms of a stage; those that are not done in time get a row that says so."""
        waiting: dict[Hashable, list[Arm]] = {}
        for arm in stage.arms:
            waiting.setdefault(stage.together(arm), []).append(arm)
        groups = list(waiting.values())
        # Not one as soon as another ends: new ones would compile while the others wait for a quiet GPU.
        jobs = len(groups) if stage.at_once else max(1, 2 * self.args.jobs // stage.cores)
        for first in range(0, len(groups), max(1, jobs)):
            self._batch(groups[first : first + jobs], stage)
        self.show_new_rows()

    def _batch(self, groups: list[list[Arm]], stage: Stage) -> None:
        until = stage.until
        running: list[tuple[list[Arm], subprocess.Popen]] = []
        try:
            if self.left(until) > 0:
                running = [(arms, self._start(arms, stage.cores)) for arms in groups]
            while any(process.poll() is None for _, process in running) and self.left(until) > 0:
                time.sleep(0.2)
                self.show_new_rows()
            ended = [process.poll() for _, process in running] or [None] * len(groups)
        finally:
            for _, process in running:
                _end(process)
        known = {_arm_of(row) for row in read_rows(self.args.output)}
        for arms, code in zip(groups, ended, strict=True):
            for arm in arms:
                if arm not in known:
                    why = f"failed: its process ended with exit code {code}; the end of its log in logs/ says why"
                    why = "skipped: no time was left" if code is None else why
                    write_row(self.args.output, arm, {"note": why})

    def _start(self, arms: list[Arm], cores: int) -> subprocess.Popen:
        name = f"{arms[0].question} {arms[0].trainer} {len(list((self.args.output / 'logs').iterdir()))}"
        command = [sys.executable, *sys.argv, "--measure", json.dumps([vars(arm) for arm in arms])]
        # By default each process that compiles would start as many of its own as there are cores.
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": str(cores), **os.environ}
        with (self.args.output / "logs" / f"{name}.log").open("w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def accuracy(self) -> None:
        """Train with ``nnunet-ssl benchmark`` in the time that is left."""
        args, folder = self.args, self.args.output / "accuracy"
        if not (args.d and args.accuracy):
            self._accuracy_row({"note": "skipped: it needs -d and --accuracy"})
            return
        trainers = [SUPERVISED, *(args.tr or method_names())]
        command = ["benchmark", "-d", args.d, "-c", args.accuracy, "-p", args.p, "-tr", *trainers]
        command += ["--labeled", *map(str, args.labeled), "--seeds", "0", "--epochs", str(args.epochs)]
        command += ["-o", str(folder), "--jobs", str(args.jobs), "-device", args.device]
        row: Row = {"command": f"nnunet-ssl {' '.join(command)}"}
        if self.left() <= 0:
            self._accuracy_row({**row, "note": "skipped: no time was left"})
            return
        with (args.output / "logs" / "h.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "nnunet_ssl.cli.main", *command], stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = process.wait(max(1.0, self.left()))
                row["note"] = "" if code == 0 else f"failed with exit code {code}; {log.name} says why"
            except subprocess.TimeoutExpired:
                row["note"] = "stopped: no time was left; the command goes on where it stopped"
            finally:
                _end(process)
        self._accuracy_row(row)

    def _accuracy_row(self, row: Row) -> None:
        write_row(self.args.output, Arm("h", "", "dataset"), row)
        self.show_new_rows()

    def show_new_rows(self) -> None:
        """Print what is new, in one line each, and write the tables with it."""
        rows = read_rows(self.args.output)
        if len(rows) > self.shown:
            for row in rows[self.shown :]:
                print(f"{time.monotonic() - self.start:5.0f} s  {one_line(row)}", flush=True)
            self.shown = len(rows)
            write_text(self.args.output / "gpu.md", self.header + report(rows, self.args.output))


def _arm_of(row: Row) -> Arm:
    return Arm(**{name: row[name] for name in Arm.__dataclass_fields__})


def _end(process: subprocess.Popen) -> None:
    """End a process and those that it started, if it still runs."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
