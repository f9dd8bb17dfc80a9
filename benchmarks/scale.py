"""Do start-up, memory and step time stay flat as unlabeled cases grow from 10 to 10,000?

    python benchmarks/scale.py --folder /scratch/scale            # needs no dataset; about 1 GB of disk

Writes a phantom dataset with small images, all different, plans and preprocesses it with nnU-Net's own commands, and
lets a trainer start with 10, 100, 1,000 and 10,000 unlabeled cases: each count in a process of its own, with its
loaders in that process, so that its peak memory holds them. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nnunet_ssl.files import replacing, write_text

DATASET = "Dataset990_Scale"
STEPS = 15


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for nnU-Net's three folders; kept")
    parser.add_argument("-tr", default="CrossMatchTrainer", help="trainer")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (args.folder / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(args.folder / name)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    done_file = args.folder / "measured.json"
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    rows = []
    for count in sorted(args.counts):
        key = f"{args.tr}, {count}"
        if key in done:
            rows.append(done[key])
            continue
        add_unlabeled(args.folder, count)
        started = time.perf_counter()
        command = [sys.executable, "-m", "nnunet_ssl.cli.main", "preprocess", "-d", "990", "-c", "3d_fullres"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        preprocessing = time.perf_counter() - started
        command = [sys.executable, __file__, "--folder", str(args.folder), "-tr", args.tr, "--measure"]
        # Only for this command: nnU-Net's planner does not work with 0.
        environment = {**os.environ, "nnUNet_n_proc_DA": "0"}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        found = json.loads(output.splitlines()[-1])
        cells = [f"{found[key]:.2f}" for key in ("start", "loader", "step")]
        rows.append([f"{count:,}", f"{preprocessing:.0f}", *cells, f"{found['memory']:.0f}"])
        done[key] = rows[-1]
        write_text(done_file, json.dumps(done, indent=1))
        print(f"{count} cases: {found}", flush=True)

    from common import where

    from nnunet_ssl.evaluation.tables import format_table

    header = ["unlabeled cases", "preprocessing of new ones (s)", "start-up (s)", "unlabeled batch (s)", "step (s)"]
    print(f"\n{where()}\n{args.tr}, 3d_fullres of {DATASET}\n")
    print(format_table([*header, "peak memory (MB)"], rows, style="markdown"))


def add_unlabeled(folder: Path, count: int) -> None:
    """Make the dataset if it is not there, and unlabeled images up to a number."""
    import numpy as np
    import SimpleITK as sitk

    from nnunet_ssl.data.phantoms import write_phantom_dataset

    raw, planned = folder / "nnUNet_raw" / DATASET, folder / "planned"
    if not planned.is_file():
        shutil.rmtree(raw, ignore_errors=True)
        write_phantom_dataset(raw, labeled=6, unlabeled=1, validation=0, test=0, seed=0, shape=(24, 32, 32))
        bin_folder = Path(sys.executable).parent
        plan = [str(bin_folder / "nnUNetv2_plan_and_preprocess"), "-d", "990", "-c", "3d_fullres", "-np", "1"]
        subprocess.run(plan, check=True, stdout=subprocess.DEVNULL)
        make_small(folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json")
        planned.touch()
    there = sorted((raw / "imagesUn").iterdir())
    if len(there) > count:
        raise SystemExit(f"{raw} has {len(there)} unlabeled cases already: measure {count} of them in a new --folder")
    image = sitk.ReadImage(str(next(file for file in there if not file.name.startswith("scale"))))
    array = sitk.GetArrayFromImage(image).astype(np.float32)
    for number in range(len(there), count):
        noise = np.random.default_rng(number).normal(0, array.std(), array.shape)
        changed = sitk.GetImageFromArray((array + noise).astype(np.int16))
        changed.CopyInformation(image)
        target = raw / "imagesUn" / f"scale{number:05d}_0000.nii.gz"
        # A file that a stop left half written would count.
        with replacing(target, aside=folder / "half.nii.gz") as unfinished:
            sitk.WriteImage(changed, str(unfinished))


def make_small(file: Path) -> None:
    """A small network in the plans: its time does not depend on the number of cases, and is waited for."""
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {
        "n_stages": 3,
        "features_per_stage": [8, 16, 32],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
    }
    write_text(file, json.dumps(plans, indent=4))


def measure(args: argparse.Namespace) -> None:
    """Start a trainer; print how long it took, how long a batch and a step take, and the peak memory."""
    import torch
    from common import make_trainer

    torch.set_num_threads(os.cpu_count() or 1)
    arguments = argparse.Namespace(d="990", c="3d_fullres", p="nnUNetPlans", device="cpu")
    with tempfile.TemporaryDirectory() as results:
        trainer = make_trainer(arguments, args.tr, Path(results))
        started = time.perf_counter()
        trainer.on_train_start()
        start = time.perf_counter() - started
        trainer.on_train_epoch_start()
        loader, steps = [], []
        for _ in range(STEPS):
            started = time.perf_counter()
            next(trainer.dataloader_unlabeled)
            loader.append(time.perf_counter() - started)
            started = time.perf_counter()
            trainer.train_step(next(trainer.dataloader_train))
            steps.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    found = {"start": start, "loader": statistics.median(loader), "step": statistics.median(steps), "memory": peak}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
