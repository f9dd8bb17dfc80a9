"""Do the methods help? The papers' protocol on the left atrium: few labeled cases, many unlabeled ones, several seeds.

    python benchmarks/left_atrium.py -d 901                   # two CPU cores: hours, in as many runs as you like
    python benchmarks/left_atrium.py -d 901 -c 3d_fullres --epochs 20 -device cuda  # nnU-Net's own plan
    python benchmarks/left_atrium.py -d 901 --table                                 # what there is so far

Trains nnUNetTrainer, each method and each method's matched control: the same trainer with the weights of its
unsupervised terms at 0. CrossMatch's control is nnUNetTrainer itself, whose steps it then takes
(tests/methods/test_crossmatch.py shows that). All have the same labeled cases, plans and number of labeled iterations.
The final checkpoint is what counts; checkpoint_best, which nnU-Net chose on the same validation cases, is evaluated
beside it to show how much such a choice would pretend. There are no test cases here, and nothing is chosen by them.

Run again after a stop, and it goes on: a training from its last epoch, and what is in the table of results, a CSV file
beside the other results of this folder with every case's metrics, is not trained again: remove what a change of a
method has made outdated. Each seed has a folder of its own under nnUNet_results/left_atrium, with nnU-Net's usual
content.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.files import replacing, write_text

if TYPE_CHECKING:
    from nnunet_ssl.evaluation.folders import FolderResult


@dataclass(frozen=True)
class Arm:
    """One way to train; ``settings`` are added to the configuration as ``semi_supervised``."""

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""


ARMS = {
    "nnU-Net": Arm("nnUNetTrainer"),
    "CrossMatch": Arm("CrossMatchTrainer"),
    # Without weights, unlabeled images change nothing but the time: as few as there can be.
    "mutual, terms off": Arm("MutualReliableTrainer", {"mutual_weight": 0.0, "unlabeled_batch_size": 2}, "mutual_off"),
    "mutual": Arm("MutualReliableTrainer"),
    "SimCVD, terms off": Arm(
        "SimCVDTrainer",
        {"contrast_weight": 0.0, "structure_weight": 0.0, "consistency_weight": 0.0, "unlabeled_batch_size": 2},
        "simcvd_off",
    ),
    "SimCVD": Arm("SimCVDTrainer"),
    "CrossMatch, τ 0.99": Arm("CrossMatchTrainer", {"confidence_threshold": 0.99}, "crossmatch_099"),
}
# Tried because of what docs/explanation/evidence.md suspects; trained when --arms names them.
TRIALS = ("CrossMatch, τ 0.99",)
CONTROLS = {
    "CrossMatch": "nnU-Net",
    "CrossMatch, τ 0.99": "nnU-Net",
    "mutual": "mutual, terms off",
    "SimCVD": "SimCVD, terms off",
}


@dataclass(frozen=True)
class Training:
    """One training of the benchmark."""

    arm: str
    labeled: int
    fold: int
    seed: int
    configuration: str
    trainer: str
    folder: Path

    @property
    def predictions(self) -> dict[str, Path]:
        """Of the validation cases, by checkpoint."""
        return {checkpoint: self.folder / f"validation_{checkpoint}" for checkpoint in ("final", "best")}

    @property
    def done(self) -> bool:
        """Whether both checkpoints were validated."""
        return all(folder.is_dir() for folder in self.predictions.values())

    def key(self, checkpoint: str) -> str:
        """Its name in the table of results."""
        return f"{self.arm}; {self.labeled} labeled; seed {self.seed}; {checkpoint}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset id or name, planned and preprocessed")
    parser.add_argument("-c", default="2d_small", help="configuration; 2d_small is added where it is missing")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--labeled", type=int, nargs="+", default=[2, 8], help="numbers of labeled cases")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5, help="of 250 labeled iterations; a length that nnU-Net has")
    parser.add_argument("--arms", nargs="+", default=[arm for arm in ARMS if arm not in TRIALS], choices=list(ARMS))
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile on a CPU too, where nnU-Net itself never does"
    )
    parser.add_argument("--table", action="store_true", help="train nothing, print what there is")
    parser.add_argument("--results", type=Path, help="default: results/DATASET-PLANS-CONFIGURATION-ITERATIONS.csv")
    parser.add_argument("--train", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args, *args.train)
        return
    if args.results is None:
        name = f"{preprocessed_folder(args).name}-{args.p}-{args.c}-{args.epochs * 250}.csv"
        args.results = Path(__file__).resolve().parent / "results" / name
    trainings = plan(args)
    results = collect(args, trainings)
    if not args.table:
        for number, training in enumerate(trainings, start=1):
            name = f"{number}/{len(trainings)} {training.arm}, {training.labeled} labeled, seed {training.seed}"
            if training.key("best") in results:
                print(f"{name}: done before", flush=True)
                continue
            minutes = run(args, training, name)
            results = collect(args, trainings)
            dice = results[training.key("final")].cases
            mean = statistics.fmean(one.dice for case in dice for one in case.metrics.values())
            print(f"{name}: Dice {mean:.3f}, {minutes:.1f} min", flush=True)
    print_tables(args, trainings, results)


def preprocessed_folder(args: argparse.Namespace) -> Path:
    """The dataset in nnUNet_preprocessed."""
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    return Path(str(nnUNet_preprocessed)) / str(maybe_convert_to_dataset_name(args.d))


def plan(args: argparse.Namespace) -> list[Training]:
    """Add configurations and folds to the preprocessed dataset; the trainings, whole seeds first."""
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.paths import nnUNet_results
    from small_plans import add_fold, add_plans

    folder = preprocessed_folder(args)
    plans_file = folder / f"{args.p}.json"
    if args.c not in load_json(str(plans_file))["configurations"]:
        add_plans(plans_file)
    plans = load_json(str(plans_file))
    # What a configuration inherits is replaced as a whole.
    inherited = plans["configurations"][args.c].get("semi_supervised", {})
    controls = {
        f"{args.c}_{arm.suffix}": {"inherits_from": args.c, "semi_supervised": {**inherited, **arm.settings}}
        for arm in ARMS.values()
        if arm.settings
    }
    if any(plans["configurations"].get(name) != control for name, control in controls.items()):
        plans["configurations"].update(controls)
        write_text(plans_file, json.dumps(plans, indent=4) + "\n")
    folds = {labeled: add_fold(folder / "splits_final.json", labeled=labeled) for labeled in args.labeled}

    trainings = []
    for seed, labeled, name in itertools.product(args.seeds, args.labeled, args.arms):
        arm = ARMS[name]
        configuration = f"{args.c}_{arm.suffix}" if arm.settings else args.c
        trainer = f"{arm.trainer}_{args.epochs}epoch{'s' if args.epochs > 1 else ''}"
        results = Path(str(nnUNet_results)) / "left_atrium" / f"seed_{seed}"
        output = results / folder.name / f"{trainer}__{args.p}__{configuration}" / f"fold_{folds[labeled]}"
        trainings.append(Training(name, labeled, folds[labeled], seed, configuration, trainer, output))
    return trainings


def run(args: argparse.Namespace, training: Training, name: str) -> float:
    """One training in a process of its own; how many minutes it took."""
    from nnunet_ssl.cli.trainers import trainers_folder

    results = training.folder.parents[2]
    results.mkdir(parents=True, exist_ok=True)
    environment = {
        "nnUNet_compile": "t" if args.compile else "f",
        "nnUNet_n_proc_DA": "1" if args.device == "cpu" else "8",
        # Processes that write predictions; each takes seconds to start.
        "nnUNet_def_n_proc": "1" if args.device == "cpu" else "8",
        **os.environ,
        "nnUNet_results": str(results),
        "nnUNet_extTrainer": str(trainers_folder()),
    }
    command = [sys.executable, __file__, "-d", args.d, "-p", args.p, "-device", args.device]
    command += ["--compile"] if args.compile else []
    command += ["--train"]
    command += [training.trainer, training.configuration, str(training.fold), str(training.seed), str(training.folder)]
    started, log = time.monotonic(), results / f"{training.arm}, {training.labeled} labeled.log"
    with log.open("a") as output:
        code = subprocess.call(command, env=environment, stdout=output, stderr=output)
    if code:
        raise SystemExit(f"{name} ended with exit code {code}; the end of {log} says why")
    return (time.monotonic() - started) / 60


def train(args: argparse.Namespace, trainer: str, configuration: str, fold: str, seed: str, folder: str) -> None:
    """What nnUNetv2_train does, but seeded, with a checkpoint after each epoch, and validation of both checkpoints."""
    import fcntl

    import numpy as np
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    device, output = torch.device(args.device), Path(folder)
    if args.device == "cuda":
        torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    lock = (output / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"another process, perhaps one whose parent was killed, trains in {output}: end it") from None
    validation, final, best = (output / name for name in ("validation", "validation_final", "validation_best"))

    def make(continue_training: bool, *, compiled: bool = False) -> Any:
        made = get_trainer_from_args(args.d, configuration, int(fold), trainer, args.p, continue_training, device)
        # Not for validation: a compiled network would be compiled again for its shapes.
        made._do_i_compile = lambda: compiled and args.compile
        made.save_every = 1
        save = made.save_checkpoint

        def save_whole(filename: str) -> None:
            # nnU-Net writes over the last checkpoint, and a kill meanwhile would leave none.
            with replacing(Path(filename), aside=Path(f"{filename}.whole")) as unfinished:
                save(str(unfinished))

        made.save_checkpoint = save_whole
        return made

    if not final.is_dir():
        trained = (output / "checkpoint_final.pth").is_file()
        begun = (output / "checkpoint_latest.pth").is_file()
        if not begun:
            random.seed(int(seed))
            np.random.seed(int(seed))
            torch.manual_seed(int(seed))
        if not trained:
            model = make(begun, compiled=True)
            maybe_load_checkpoint(model, begun, False)
            if begun:
                # nnU-Net writes checkpoint_latest before it compares the epoch with the best one.
                model._best_ema = max(model.logger.get_value("ema_fg_dice", step=None))
            model.run_training()
        model = make(False)
        maybe_load_checkpoint(model, False, True)
        model.perform_actual_validation(False)
        validation.rename(final)
    if not best.is_dir():
        model = make(False)
        maybe_load_checkpoint(model, False, True)
        model.load_checkpoint(str(output / "checkpoint_best.pth"))
        model.perform_actual_validation(False)
        validation.rename(best)


def collect(args: argparse.Namespace, trainings: list[Training]) -> dict[str, FolderResult]:
    """Every case's metrics of what is done: those of the table of results, and new ones, which are added to it."""
    from batchgenerators.utilities.file_and_folder_operations import load_json

    from nnunet_ssl.evaluation.folders import Segmentations, evaluate_folder, read_csv, write_csv

    folder = preprocessed_folder(args)
    segmentations = Segmentations.from_dataset_json(folder / "dataset.json")
    validation = set(load_json(str(folder / "splits_final.json"))[0]["val"])
    results = read_csv(args.results, key="training") if args.results.is_file() else {}
    known = len(results)
    for training in trainings:
        if training.done and training.key("best") not in results:
            for checkpoint, path in training.predictions.items():
                result = evaluate_folder(path, folder / "gt_segmentations", segmentations)
                assert {case.case for case in result.cases} == validation, f"{path}: {result.failed}"
                results[training.key(checkpoint)] = result
    if len(results) > known:
        write_csv(args.results, results, key="training")
        # With the table's decimals, so that a table printed now is the one that is printed from the file later.
        results = read_csv(args.results, key="training")
    return results


def print_tables(args: argparse.Namespace, trainings: list[Training], results: dict[str, FolderResult]) -> None:
    """Every method against nnU-Net and against its control, from the trainings that are done."""
    from common import where

    from nnunet_ssl.evaluation.comparison import compare
    from nnunet_ssl.evaluation.tables import format_table

    def runs(arm: str, labeled: int, checkpoint: str) -> list[FolderResult]:
        keys = [one.key(checkpoint) for one in trainings if (one.arm, one.labeled) == (arm, labeled)]
        return [results[key] for key in keys if key in results]

    print(f"\n{where()}\n{args.c}, {args.epochs * 250} labeled iterations, {args.results}\n")
    for labeled, metric in itertools.product(args.labeled, ("dice", "hd95")):
        found = {arm: runs(arm, labeled, "final") for arm in args.arms if runs(arm, labeled, "final")}
        if len(found) < 2:
            continue
        best = {arm: runs(arm, labeled, "best") for arm in found}
        structures = list(next(iter(found.values()))[0].cases[0].metrics)
        print(f"{labeled} labeled, {metric}, against the first row\n")
        header, rows = compare(found, structures, metric, best=best)
        print(format_table(header, rows, style="markdown") + "\n")
        controlled = []
        for arm, control in CONTROLS.items():
            if arm in found and control in found:
                table = compare({control: found[control], arm: found[arm]}, structures, metric)[1]
                controlled += [row for row in table if row[1] == arm]
        if controlled:
            print(f"{labeled} labeled, {metric}, against the matched control\n")
            print(format_table(header[:-1], controlled, style="markdown") + "\n")


if __name__ == "__main__":
    main()
