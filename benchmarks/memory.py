"""Peak memory of a training step: nnU-Net's, and a method's in both memory modes.

    python benchmarks/memory.py -d 901 -c 3d_small
    python benchmarks/memory.py -d 901 -c 3d_fullres -device cuda

Each is measured in a process of its own, as what two steps add to the memory the process held before them. On a GPU it
is what PyTorch allocated, on a CPU what the process had resident.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import add_trainer_arguments, give_unlabeled_batches, labeled_batch, make_trainer, where

from nnunet_ssl.evaluation.tables import format_table


def resident_peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(args: argparse.Namespace, mode: str) -> int:
    """Bytes that two steps add, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        supervised = mode == "supervised"
        settings = {} if supervised else {"memory_mode": mode}
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
    parser.add_argument("--mode", choices=["supervised", "split", "stacked"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(f"bytes {measure(args, args.mode)}")
        return
    # Freed blocks go back to the system at once, or the peak would depend on what came before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks = {}
    for mode in ("supervised", "split", "stacked"):
        command = [sys.executable, *sys.argv, "--mode", mode]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        peaks[mode] = int(done.stdout.split()[-1])
    names = {"supervised": "nnUNetTrainer", "split": f"{args.tr}, split", "stacked": f"{args.tr}, stacked"}
    rows = [[names[m], f"{peak / 2**20:.0f}", f"{peak / peaks['supervised']:.2f}"] for m, peak in peaks.items()]
    print(f"\n{where()}\n{args.c}\n")
    print(format_table(["step", "peak MiB", "x nnUNetTrainer"], rows, markdown=True))


if __name__ == "__main__":
    main()
