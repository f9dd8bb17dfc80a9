"""``nnunet-ssl extend``: a longer training that goes on from a finished one."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from nnunet_ssl.cli.lookup import (
    check_fold_name,
    dataset_name,
    find_program,
    find_trainer,
    model_name,
    nnunet_folder,
    plan_again,
    read_plans,
)
from nnunet_ssl.data.nnunet_files import read_dataset_json
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import AGAIN, cannot_write, replacing

HELP = "train longer: continue a finished training with more epochs"

_EXPLANATION = """\
TRAINER is the longer one, such as CrossMatchTrainer_2000epochs. The command continues the longest finished training of
the same trainer with fewer epochs, for the same dataset, plans, configuration and fold. The folder of that training
does not change. After an interruption, run the same command again, or nnUNetv2_train --c.
"""

# In the order in which nnUNetv2_train --c looks for them.
_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
_UNNAMED_BEST = ".checkpoint_best.pth.copied"
_LENGTH = r"_\d+epochs?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl extend``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset's number or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    parser.add_argument("-f", required=True, metavar="FOLD", help="fold, a number or 'all'")
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="the longer trainer")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument(
        "-device", choices=("cuda", "cpu", "mps"), default="cuda", help="as for nnUNetv2_train (default: %(default)s)"
    )
    parser.add_argument("-num_gpus", type=int, metavar="N", default=1, help="as for nnUNetv2_train (default: 1)")
    parser.add_argument(
        "--only-prepare", action="store_true", help="do not train; print the command, for torchrun or a cluster"
    )


def run(args: argparse.Namespace) -> int:
    """Copy the checkpoint, then train in place of this process."""
    check_fold_name(args.f)
    results = nnunet_folder("nnUNet_results", "nnU-Net keeps trained models there.") / dataset_name(args.d)
    folder = _fold_folder(results, args.tr, args)
    begun = next((folder / name for name in _CHECKPOINTS if (folder / name).is_file()), None)
    if begun is not None:
        _name_best(folder)
        finished = begun.name == _CHECKPOINTS[0]
        print(f"{args.tr} {'has finished: validating' if finished else 'has begun: continuing from'} {begun}")
    else:
        _prepare(folder, results, args)
    arguments = [results.name, args.c, args.f, "-tr", args.tr, "-p", args.p, "--c"]
    arguments += ["-device", args.device, "-num_gpus", str(args.num_gpus)]
    print(f"nnUNetv2_train {' '.join(arguments)}", flush=True)
    if args.only_prepare:
        return 0
    program = find_program("nnUNetv2_train")
    if os.name == "posix":
        # Signals then reach the training itself.
        os.execv(program, [program, *arguments])  # noqa: S606 - nnU-Net's own command, without a shell
    return subprocess.call([program, *arguments])


def _fold_folder(results: Path, trainer: str, args: argparse.Namespace) -> Path:
    return results / model_name(trainer, args.p, args.c) / f"fold_{args.f}"


def _prepare(folder: Path, results: Path, args: argparse.Namespace) -> None:
    """Put the shorter training's checkpoint into the longer one's folder."""
    if not hasattr(find_trainer(args.tr), "settings_class"):
        raise UserError(
            f"{args.tr} is not a semi-supervised trainer; nnunet-ssl extend only continues trainings of those."
        )
    preprocessed = nnunet_folder("nnUNet_preprocessed", "nnU-Net keeps the plans there.") / results.name
    configurations = read_plans(preprocessed, args.p, args.d)["configurations"]
    if args.c not in configurations:
        raise UserError(f"{args.p} has no configuration {args.c}; it has {', '.join(configurations)}. Correct -c.")
    read_dataset_json(preprocessed / "dataset.json", otherwise=plan_again(args.d))

    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    from nnunet_ssl.trainer.memory import without_a_trace

    fold: Any = args.f if args.f == "all" else int(args.f)
    with without_a_trace():
        trainer = get_trainer_from_args(results.name, args.c, fold, args.tr, args.p, True, torch.device("cpu"))
        finished = _longest(results, trainer.num_epochs, args)
        # Before anything is copied: whether the longer training can go on from it.
        trainer.load_checkpoint(str(finished))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The best one gets its name last: left alone by a kill, --c would go on from it.
        for source, name in ((finished.with_name(_CHECKPOINTS[2]), _UNNAMED_BEST), (finished, _CHECKPOINTS[1])):
            if source.is_file():
                with replacing(folder / name, durable=True) as unfinished:
                    shutil.copyfile(source, unfinished)
        _name_best(folder)
    except OSError as error:
        raise cannot_write(folder, error, AGAIN) from error
    print(f"{args.tr} continues from {finished}, after {trainer.current_epoch} of {trainer.num_epochs} epochs")


def _name_best(folder: Path) -> None:
    """Give the copied best checkpoint its name, if a kill was in between; the training's own is kept."""
    copied, best = folder / _UNNAMED_BEST, folder / _CHECKPOINTS[2]
    if copied.is_file() and not best.is_file():
        copied.replace(best)
    copied.unlink(missing_ok=True)


def _longest(results: Path, epochs: int, args: argparse.Namespace) -> Path:
    """The final checkpoint of the longest finished training with fewer epochs."""
    from nnunet_ssl.networks.checkpoints import read_checkpoint

    base = re.sub(f"{_LENGTH}$", "", args.tr)
    variant = re.compile(f"{re.escape(base)}({_LENGTH})?")
    trainers = sorted({folder.name.split("__")[0] for folder in results.glob(model_name(f"{base}*", args.p, args.c))})
    finals = [
        _fold_folder(results, name, args) / _CHECKPOINTS[0]
        for name in trainers
        if variant.fullmatch(name) and name != args.tr
    ]
    lengths = {file: int(read_checkpoint(file).get("current_epoch", epochs)) for file in finals if file.is_file()}
    shorter = {file: length for file, length in lengths.items() if length < epochs}
    if not shorter:
        found = ", ".join(f"{file.parts[-3].split('__')[0]} ({length} epochs)" for file, length in lengths.items())
        raise UserError(
            f"{args.tr} has {epochs} epochs, and {results} contains no finished training of {base} with fewer epochs "
            f"for plans {args.p}, configuration {args.c} and fold {args.f}. Finished trainings: {found or 'none'}. "
            "Correct -tr, -p, -c or -f, or finish the shorter training."
        )
    return max(shorter, key=lambda file: shorter[file])
