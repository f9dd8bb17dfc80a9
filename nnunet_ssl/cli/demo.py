"""``nnunet-ssl demo``: nnU-Net's own commands, with and without unlabeled images, on a dataset made for it.

Everything lies in a folder of its own; none of the user's nnU-Net folders is read or written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.benchmark.arms import BASELINE
from nnunet_ssl.cli.demo_steps import Steps, duration, ended_by_signals
from nnunet_ssl.cli.lookup import RECOMMENDED, device_name, trainer_descriptions, trainers_folder
from nnunet_ssl.data.nnunet_files import read_json, read_plans
from nnunet_ssl.data.small_plan import inheriting
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import ELSEWHERE, cannot_write, list_names, lock, write_text
from nnunet_ssl.settings import PLANS_KEY
from nnunet_ssl.text import dataset_number

if TYPE_CHECKING:
    from nnunet_ssl.evaluation.comparison import PairedDifference

HELP = "train and compare nnUNetTrainer and semi-supervised trainers on phantoms, in a few minutes"

CONFIGURATION = "demo"
PARENT = "2d"
DATASET = "Dataset001_Phantom"
FOLD = 0
CHANNELS = (8, 16, 32, 32)
LONGEST_PATCH, BATCH_SIZE = 64, 4
EPOCHS, ITERATIONS, VALIDATION_ITERATIONS = 10, 80, 2
# Trainings. One leaves a core idle while it starts, evaluates and predicts.
AT_ONCE = 2

NEXT = """
These phantoms are made so that unlabeled images help: they differ much in contrast and shading, and the two that have
labels show only a part of it. To see whether unlabeled images help with your data:

  nnunet-ssl doctor -d DATASET -c 3d_fullres -tr {trainer}    # with unlabeled images in imagesUn: is anything missing?
  nnunet-ssl pilot -d DATASET -c 3d_fullres -tr {trainer}     # short trainings with and without them
  nnUNetv2_train DATASET 3d_fullres 0 -tr {trainer}
"""
_SETTINGS, _LOCK = "demo.json", "demo.lock"
_AFRESH = "Choose another folder with -o, or start again with --overwrite."
_OWN_FOLDERS = ("logs", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "trainers", "predictions")
_TRAINER = '''\
"""{base}, shortened for nnunet-ssl demo."""

import torch
from {module} import {base}


class {name}({base}):
    """{base} with {epochs} epochs of {iterations} iterations."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = {epochs}
        self.num_iterations_per_epoch = {iterations}
        self.num_val_iterations_per_epoch = {validation_iterations}
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl demo``."""
    parser.add_argument(
        "-o",
        type=Path,
        default=Path("nnunet_ssl_demo"),
        metavar="FOLDER",
        help="folder for all files (default: nnunet_ssl_demo)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "-tr",
        "--trainer",
        default=RECOMMENDED,
        metavar="NAME",
        help=f"trainer to compare with nnUNetTrainer (default: {RECOMMENDED})",
    )
    which.add_argument("--all", action="store_true", help="compare all trainers with nnUNetTrainer, which takes longer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the phantoms (default: 0)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=EPOCHS,
        metavar="N",
        help=f"length of each training, in epochs of {ITERATIONS} iterations (default: {EPOCHS})",
    )
    parser.add_argument(
        "-np",
        type=int,
        metavar="N",
        help="worker processes; with 1, one training runs at a time (default: cores, at most 8)",
    )
    parser.add_argument(
        "-device", choices=("cpu", "cuda", "mps"), help="device (default: cuda if there is one, else cpu)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again instead of continuing in the folder")


def run(args: argparse.Namespace) -> int:
    """Run the steps that are not done yet, then print the table and the paths of the pictures."""
    start = time.monotonic()
    folder = args.o.resolve()
    # All that can be wrong with the arguments is said before anything is written.
    if os.pathsep in str(folder):
        raise UserError(
            f"{folder} contains '{os.pathsep}', which nnUNet_extTrainer separates folders with. {ELSEWHERE}"
        )
    for option, value, least in (("--epochs", args.epochs, 1), ("--seed", args.seed, 0)):
        if value < least:
            raise UserError(f"{option} is {value}; give {least} or more.")
    if args.trainer == BASELINE:
        raise UserError(f"-tr names the trainer to compare with {BASELINE}; give another one, such as {RECOMMENDED}.")
    processes = args.np if args.np is not None else min(os.cpu_count() or 1, 8)
    if processes < 1:
        raise UserError(f"-np is {processes}; give 1 or more.")
    compared = list(trainer_descriptions(trainers_folder())) if args.all else [args.trainer]
    modules = {name: _module_of(name) for name in (BASELINE, *compared)}
    device = device_name(args.device)
    settings = {"trainer": "all" if args.all else args.trainer, "seed": args.seed, "epochs": args.epochs}
    _check_folder(folder, settings, overwrite=args.overwrite)
    with _held(folder), ended_by_signals():
        _prepare_folder(folder, settings, overwrite=args.overwrite)
        _run_steps(folder, modules, compared, device, processes, args)
    print(f"Done in {duration(time.monotonic() - start)}.")
    return 0


def _run_steps(
    folder: Path,
    modules: Mapping[str, str],
    compared: Sequence[str],
    device: str,
    processes: int,
    args: argparse.Namespace,
) -> None:
    """Run the steps that are not done yet, and print what they came to."""
    trainers = {name: f"{name}_demo" for name in modules}
    _write_trainers(folder / "trainers", modules, trainers, args.epochs)
    dataset = _Dataset(*(folder / name / DATASET for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")))
    steps = Steps(folder / "logs", _environment(folder, processes), total=5 + 2 * len(trainers))
    steps.function("phantoms", "make phantoms", lambda: _make_phantoms(dataset.raw, args.seed))
    _plan(steps, dataset, str(processes))
    chains = [_training(dataset, trainer, device, folder / "predictions" / trainer) for trainer in trainers.values()]
    steps.chains(chains, at_once=min(AT_ONCE, processes), epochs=args.epochs)
    with steps.with_progress("evaluate"):
        table, gains, overlay = _evaluate(folder, dataset, trainers, iterations=args.epochs * ITERATIONS)

    print(f"\n{table}\n\n{gains}\n")
    print(f"picture  {overlay}")
    for trainer in trainers.values():
        for picture in ("progress.png", "progress_ssl.png"):
            path = dataset.trained(trainer) / picture
            if path.is_file():
                print(f"curves   {path}")
    print(f"table    {folder / 'summary.md'}")
    print(NEXT.format(trainer=compared[0] if len(compared) == 1 else RECOMMENDED))


def _plan(steps: Steps, dataset: _Dataset, workers: str) -> None:
    """Plan and preprocess with nnU-Net's commands."""
    plan = ["nnUNetv2_plan_and_preprocess", "-d", dataset.number, "-npfp", workers, "--verify_dataset_integrity"]
    steps.command("plan", [*plan, "--no_pp"])
    steps.function(
        "configuration", f"add the configuration '{CONFIGURATION}' to the plans", lambda: _configure(dataset)
    )
    steps.command("preprocess", ["nnUNetv2_preprocess", "-d", dataset.number, "-c", PARENT, "-np", workers])


def _training(dataset: _Dataset, trainer: str, device: str, predictions: Path) -> dict[str, list[str]]:
    """The commands that train and predict the test images, by the name of the step."""
    return {
        f"train_{trainer}": [
            *("nnUNetv2_train", dataset.number, CONFIGURATION, str(FOLD), "-tr", trainer, "-device", device),
        ],
        f"predict_{trainer}": [
            *("nnUNetv2_predict", "-i", str(dataset.raw / "imagesTs")),
            *("-o", str(predictions), "-d", dataset.number, "-c", CONFIGURATION),
            *("-f", str(FOLD), "-tr", trainer, "-device", device, "-npp", "0", "-nps", "0"),
        ],
    }


@dataclass(frozen=True)
class _Dataset:
    """A dataset's folders in nnUNet_raw, nnUNet_preprocessed and nnUNet_results."""

    raw: Path
    preprocessed: Path
    results: Path

    @property
    def number(self) -> str:
        return dataset_number(self.raw.name)

    def plans(self) -> dict[str, Any]:
        return read_plans(self.preprocessed / "nnUNetPlans.json", otherwise=_AFRESH)

    def trained(self, trainer: str) -> Path:
        return self.results / f"{trainer}__nnUNetPlans__{CONFIGURATION}" / f"fold_{FOLD}"


def _check_folder(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check that the folder is new, or that a demo with these settings made it."""
    file = folder / _SETTINGS
    others = folder.exists() and (not folder.is_dir() or list_names(folder) - {_LOCK})
    if others and not file.is_file():
        raise UserError(f"{folder} exists, but not from a demo. Choose another folder with -o.")
    if file.is_file() and not overwrite and (before := read_json(file, otherwise=_AFRESH)) != settings:
        raise UserError(f"{folder} contains a demo with other settings ({before}). {_AFRESH}")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Within, no other demo writes into this folder."""
    with lock(folder / _LOCK, wait=False) as held:
        if not held:
            raise UserError(f"Another demo runs in {folder}. Wait for its end, or choose another folder with -o.")
        yield


def _prepare_folder(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the folder's parts, afresh with ``overwrite``."""
    try:
        for name in _OWN_FOLDERS:
            if overwrite and (folder / name).is_dir():
                shutil.rmtree(folder / name)
        write_text(folder / _SETTINGS, json.dumps(settings, indent=2) + "\n", otherwise=ELSEWHERE)
        for name in _OWN_FOLDERS:
            (folder / name).mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error, ELSEWHERE) from error


def _environment(folder: Path, processes: int) -> dict[str, str]:
    """The environment of nnU-Net's commands: none of the user's nnU-Net settings, and this demo's folders."""
    import nnunet_ssl

    environment = {name: value for name, value in os.environ.items() if not name.lower().startswith("nnunet_")}
    environment |= {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment |= {
        "nnUNet_extTrainer": os.pathsep.join([str(folder / "trainers"), str(trainers_folder())]),
        "nnUNet_def_n_proc": str(processes),
        "nnUNet_n_proc_DA": str(max(1, processes // (2 * AT_ONCE))),
        # Compiling takes longer than this training.
        "nnUNet_compile": "false",
    }
    # Where few cores are shared with the loaders' workers, threads that spin while they wait cost more than the work.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # nnU-Net's commands know a plain checkout, which is not installed, only through PYTHONPATH.
    home = Path(nnunet_ssl.__file__).resolve().parent.parent
    if home not in {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}:
        paths = [str(home), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _write_trainers(folder: Path, modules: Mapping[str, str], trainers: Mapping[str, str], epochs: int) -> None:
    """nnU-Net's way to shorten a training is a subclass: one module each for the demo's."""
    for base, name in trainers.items():
        text = _TRAINER.format(
            base=base,
            name=name,
            module=modules[base],
            epochs=epochs,
            iterations=ITERATIONS,
            validation_iterations=VALIDATION_ITERATIONS,
        )
        write_text(folder / f"{name}.py", text)


def _module_of(trainer: str) -> str:
    """The module of a trainer, to import it from."""

    if trainer == BASELINE:
        return "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    file = trainers_folder() / f"{trainer}.py"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("[!_]*.py")))
        raise UserError(f"There is no trainer {trainer} in {file.parent}; there is {known}.")
    specification = importlib.util.spec_from_file_location(f"_nnunet_ssl_demo_{trainer}", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return str(getattr(module, trainer).__module__)


def _make_phantoms(folder: Path, seed: int) -> None:
    from nnunet_ssl.data.phantoms import Look, write_phantom_dataset

    # Two-dimensional images are so small that a network sees many in a few minutes. Two labels show little of how the
    # shading differs, and only a middle part of the contrasts: the network then recognizes structures of most images
    # in part, and learns the rest from them. benchmarks/results has the gain in several seeds, and what other phantoms
    # came to.
    look = Look(contrast=(0.35, 1.0), noise=(0.03, 0.06), shading=2.0)
    write_phantom_dataset(
        folder,
        labeled=2,
        unlabeled=60,
        validation=1,
        test=24,
        seed=seed,
        shape=(64, 64),
        num_classes=1,
        two_d=True,
        look=look,
        labeled_look=replace(look, contrast=(0.5, 0.7)),
    )


def _configure(dataset: _Dataset) -> None:
    """Add a small configuration to the plans."""
    plans = dataset.plans()
    plans["configurations"][CONFIGURATION] = demo_configuration(plans["configurations"][PARENT])
    write_text(dataset.preprocessed / "nnUNetPlans.json", json.dumps(plans, indent=4) + "\n")


def demo_configuration(parent: Mapping[str, Any]) -> dict[str, Any]:
    """A 2D configuration for a few minutes on two CPU cores; it shares the preprocessed data of its parent."""
    patch = [min(LONGEST_PATCH, length) for length in parent["patch_size"]]
    made = inheriting(PARENT, parent, patch_size=patch, batch_size=BATCH_SIZE, channels=CHANNELS)
    # The patches are so small that passes are faster stacked, on a CPU too.
    return {**made, PLANS_KEY: {"memory_mode": "stacked"}}


def _evaluate(
    folder: Path, dataset: _Dataset, trainers: Mapping[str, str], *, iterations: int
) -> tuple[str, str, Path]:
    """Evaluate and draw; return the table, the gains in words and the path of the picture."""
    import numpy as np

    from nnunet_ssl.evaluation.comparison import average_scores, paired_difference
    from nnunet_ssl.evaluation.folders import evaluate_folder
    from nnunet_ssl.evaluation.pictures import draw_cases
    from nnunet_ssl.evaluation.segmentations import Segmentations
    from nnunet_ssl.evaluation.tables import summarize

    segmentations = Segmentations.from_dataset_json(dataset.raw / "dataset.json")
    references, images = dataset.raw / "labelsTs", dataset.raw / "imagesTs"
    predictions = {base: folder / "predictions" / name for base, name in trainers.items()}
    results = {base: evaluate_folder(path, references, segmentations) for base, path in predictions.items()}
    failed = {case: reason for result in results.values() for case, reason in result.failed.items()}
    if failed:
        raise UserError("; ".join(f"{case} could not be evaluated: {reason}" for case, reason in failed.items()))

    by_trainer = {base: result.cases for base, result in results.items()}
    caption = f"{iterations} labeled iterations each; test cases, mean ± standard deviation"
    dice = {base: average_scores([result], list(segmentations.labels), "dice") for base, result in results.items()}
    compared = [base for base in trainers if base != BASELINE]
    gains = "\n".join(_gain(base, paired_difference(dice[base], dice[BASELINE])) for base in compared)
    table = summarize(by_trainer, style="markdown")
    write_text(folder / "summary.md", f"{table}\n\n{caption}\n\n{gains}\n")

    gained = np.mean([dice[base].by_case() for base in compared], axis=0) - dice[BASELINE].by_case()
    order = np.argsort(gained)
    names = dice[BASELINE].cases
    titles = {names[order[len(order) // 2]]: "a typical test case", names[order[-1]]: "the test case that gained most"}
    overlay = folder / "overlay.png"
    draw_cases(overlay, titles, images, references, predictions, segmentations, errors=False)
    return f"{summarize(by_trainer)}\n{caption}", gains, overlay


def _gain(trainer: str, found: PairedDifference) -> str:
    more = "more" if found.mean >= 0 else "less"
    interval = f"95 % interval over {found.cases} test cases {found.low:+.3f} to {found.high:+.3f}"
    shown = "" if found.low > 0 or found.high < 0 else "; it contains 0, so this does not show a difference"
    return f"{trainer}: {abs(found.mean):.3f} Dice {more} than {BASELINE} on average ({interval}{shown})."
