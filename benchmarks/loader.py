"""How many patches per second does one worker make, labeled ones by nnU-Net's loader and unlabeled ones by ours?

    python benchmarks/loader.py -d 901 -c 3d_small

Both loaders run in this process on one thread, a batch of each in turn. An unlabeled patch is a weak view and the
strong views that the method asks for. Target: at least half as many unlabeled patches per second as labeled ones.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import add_trainer_arguments, make_trainer, where

from nnunet_ssl.evaluation.tables import format_table


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trainer_arguments(parser)
    parser.add_argument("--repeats", type=int, default=15, help="batches of each loader, after a first one")
    args = parser.parse_args()
    os.environ["nnUNet_n_proc_DA"] = "0"
    torch.set_num_threads(1)
    print(where())
    rows: list[list[object]] = []
    for name in args.tr:
        with tempfile.TemporaryDirectory() as results:
            trainer = make_trainer(args, name, Path(results))
            trainer.on_train_start()
            loaders = {"nnU-Net, labeled": trainer.dataloader_train, f"{name}, unlabeled": trainer.dataloader_unlabeled}
            patches = {label: len(next(loader)["keys"]) for label, loader in loaders.items()}
            seconds: dict[str, list[float]] = {label: [] for label in loaders}
            for _ in range(args.repeats):
                for label, loader in loaders.items():
                    started = time.perf_counter()
                    next(loader)
                    seconds[label].append(time.perf_counter() - started)
            views = trainer.unlabeled_views().strong
            trainer.on_train_end()
        rate = {label: patches[label] / statistics.median(of_loader) for label, of_loader in seconds.items()}
        reference = rate["nnU-Net, labeled"]
        for label in loaders:
            strong = views if label != "nnU-Net, labeled" else None
            rows.append([label, strong, f"{rate[label]:.2f}", f"{rate[label] / reference:.2f}"])
    print(f"{args.c}, median of {args.repeats} batches\n")
    print(format_table(["loader", "strong views", "patches per second", "x nnU-Net"], rows, style="markdown"))


if __name__ == "__main__":
    main()
