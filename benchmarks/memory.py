"""Peak memory of a training step: nnU-Net's, and a method's in both memory modes, measured and computed beforehand.

    python benchmarks/memory.py -d 901 -c 3d_small -tr SimCVDTrainer --checkpointing
    python benchmarks/memory.py -d 901 -c 3d_fullres -device cuda            # every trainer

Each is measured in a process of its own, as what two steps add to the memory the process held before them. On a GPU it
is what PyTorch allocated, on a CPU what the process had resident. The table also has what nnunet_ssl.trainer.memory
computes for the same step, in mixed precision on a GPU as nnU-Net trains there, in float32 on a CPU. ``--save`` keeps
the measured ratios for ``nnunet-ssl methods``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import (
    add_trainer_arguments,
    give_unlabeled_batches,
    in_largest_stage,
    labeled_batch,
    make_trainer,
    resident_peak,
    save_costs,
    where,
)

from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.memory import step_bytes

SUPERVISED = "nnUNetTrainer"
MODES = ("split", "stacked")


def measure(args: argparse.Namespace, name: str, step: str) -> int:
    """Bytes that two steps of a trainer add, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        mode, _, checkpointing = step.partition(", ")
        settings: dict[str, Any] = {"memory_mode": mode, "activation_checkpointing": bool(checkpointing)}
        trainer = make_trainer(args, name, Path(folder), **({} if name == SUPERVISED else settings))
        batch = labeled_batch(trainer)
        if isinstance(trainer, SemiSupervisedTrainer):
            give_unlabeled_batches(in_largest_stage(trainer))
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            before = resident_peak()
        for _ in range(2):
            trainer.train_step(batch)
        return (torch.cuda.max_memory_allocated() if args.device == "cuda" else resident_peak()) - before


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trainer_arguments(parser)
    parser.add_argument("--checkpointing", action="store_true", help="also with activation checkpointing")
    parser.add_argument("--save", action="store_true", help="keep the ratios for nnunet-ssl methods")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(f"bytes {measure(args, *args.step)}")
        return
    steps = [*MODES, *(f"{mode}, checkpointing" for mode in MODES if args.checkpointing)]
    supervised = measured_apart(SUPERVISED, "supervised")
    measured = {(name, step): measured_apart(name, step) for name in args.tr for step in steps}
    # Afterwards: a process begins with the largest resident size that the one which started it ever had.
    rows = [_row(args, SUPERVISED, "supervised", supervised, supervised, trainer_name=args.tr[0])]
    rows += [_row(args, name, step, peak, supervised) for (name, step), peak in measured.items()]
    print(f"\n{where()}\n{args.c}\n")
    header = ["step", "peak MiB", "x nnUNetTrainer", "computed MiB", "computed / measured"]
    print(format_table(header, rows, style="markdown"))
    if args.save:
        ratios = {name: {mode: measured[name, mode] / supervised for mode in MODES} for name in args.tr}
        save_costs("memory", ratios, f"{date.today()}, {args.c}; {where()}")


def measured_apart(name: str, step: str) -> int:
    """Bytes, measured in a process of its own."""
    # Freed blocks go back to the system at once, or the peak would depend on what came before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, *sys.argv, "--step", name, step]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def _row(
    args: argparse.Namespace, name: str, step: str, peak: int, supervised: int, *, trainer_name: str | None = None
) -> list[str]:
    mode: Any
    mode, _, checkpointing = step.partition(", ")
    with tempfile.TemporaryDirectory() as folder:
        given = argparse.Namespace(**(vars(args) | {"device": "cpu"}))
        trainer = make_trainer(given, trainer_name or name, Path(folder))
    found = step_bytes(
        trainer, mode, mixed_precision=args.device == "cuda", activation_checkpointing=bool(checkpointing)
    )
    computed = found.peak - found.before
    what = name if name == SUPERVISED else f"{name}, {step}"
    row = [what, f"{peak / 2**20:.0f}", f"{peak / supervised:.2f}"]
    return [*row, f"{computed / 2**20:.0f}", f"{computed / peak:.2f}"]


if __name__ == "__main__":
    main()
