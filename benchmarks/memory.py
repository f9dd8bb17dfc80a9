"""Peak memory of a training step: nnU-Net's, and a method's in both memory modes, measured and computed beforehand.

    python benchmarks/memory.py -d 901 -c 3d_small
    python benchmarks/memory.py -d 901 -c 3d_fullres -device cuda

Each is measured in a process of its own, as what two steps add to the memory the process held before them. On a GPU it
is what PyTorch allocated, on a CPU what the process had resident. The table also has what nnunet_ssl.trainer.memory
computes for the same step, in mixed precision on a GPU as nnU-Net trains there, in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import (
    add_trainer_arguments,
    give_unlabeled_batches,
    labeled_batch,
    make_trainer,
    resident_peak,
    where,
)

from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.trainer.memory import step_bytes

STEPS = ("supervised", "split", "split, checkpointing", "stacked", "stacked, checkpointing")


def measure(args: argparse.Namespace, step: str) -> int:
    """Bytes that two steps add, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        mode, _, checkpointing = step.partition(", ")
        supervised = mode == "supervised"
        settings: dict[str, Any] = (
            {} if supervised else {"memory_mode": mode, "activation_checkpointing": bool(checkpointing)}
        )
        trainer = make_trainer(args, "nnUNetTrainer" if supervised else args.tr, Path(folder), **settings)
        batch = labeled_batch(trainer)
        if not supervised:
            give_unlabeled_batches(trainer)
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
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(f"bytes {measure(args, args.step)}")
        return
    # Freed blocks go back to the system at once, or the peak would depend on what came before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    measured = {}
    for step in STEPS:
        command = [sys.executable, *sys.argv, "--step", step]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        measured[step] = int(done.stdout.split()[-1])
    # Afterwards: a process begins with the largest resident size that the one which started it ever had.
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(argparse.Namespace(**(vars(args) | {"device": "cpu"})), args.tr, Path(folder))
    rows = []
    for step, peak in measured.items():
        mode: Any
        mode, _, checkpointing = step.partition(", ")
        found = step_bytes(
            trainer, mode, mixed_precision=args.device == "cuda", activation_checkpointing=bool(checkpointing)
        )
        computed = found.peak - found.before
        name = "nnUNetTrainer" if step == "supervised" else f"{args.tr}, {step}"
        row = [name, f"{peak / 2**20:.0f}", f"{peak / measured['supervised']:.2f}"]
        rows.append([*row, f"{computed / 2**20:.0f}", f"{computed / peak:.2f}"])
    print(f"\n{where()}\n{args.c}\n")
    header = ["step", "peak MiB", "x nnUNetTrainer", "computed MiB", "computed / measured"]
    print(format_table(header, rows, style="markdown"))


if __name__ == "__main__":
    main()
