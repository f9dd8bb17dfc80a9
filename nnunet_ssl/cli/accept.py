"""``nnunet-ssl accept``: segmentations that a person has corrected become labels."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.cli.lookup import dataset_name, nnunet_folder
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import some_of

if TYPE_CHECKING:
    from nnunet_ssl.data.accepting import DatasetFolders

HELP = "use corrected segmentations of unlabeled cases as labels; --undo reverses this"

_EXPLANATION = """\
Name each segmentation in FOLDER as its case: CASE.nii.gz (or .nrrd, .seg.nrrd, .mha, if the dataset's reader reads it).
The command moves the images of the case from imagesUn to imagesTr, writes its labels to labelsTr, updates numTraining
and splits_final.json, and preprocesses the case for all plans that are preprocessed already. It does not change your
files.

A fold trains on the new cases, unless it validates them. If a fold hides labels ('unlabeled' in splits_final.json), the
new cases are 'unlabeled' in it. No new case becomes a validation case.

All cases are accepted, or none. If anything is wrong with a case, the command names it first. After a kill, the next
run of this command completes the change; without --labels it does nothing else. --undo reverses the last acceptance, as
long as nobody has changed its files since.
"""

_MINUTES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl accept``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset's number or name")
    parser.add_argument("--labels", type=Path, metavar="FOLDER", help="the corrected segmentations")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only these cases (default: all in FOLDER)")
    parser.add_argument(
        "--allow-empty", action="store_true", help="also accept a segmentation that has only background"
    )
    parser.add_argument("--undo", action="store_true", help="reverse the last acceptance")
    parser.add_argument("-np", type=int, metavar="N", help="worker processes; each has one case in memory")


def run(args: argparse.Namespace) -> int:
    """Accept or take back, and print what changed."""
    if args.undo and (args.labels or args.cases or args.allow_empty):
        raise UserError("--undo reverses the whole last acceptance; give only -d with it.")
    if args.cases and not args.labels:
        raise UserError("Name the folder with the corrected segmentations: --labels FOLDER.")
    if args.np is not None and args.np < 0:
        raise UserError(f"-np is {args.np}; give 0 or more.")
    dataset = _folders(args.d)

    from nnunet_ssl.data.journal import recover
    from nnunet_ssl.data.splits import lock_file
    from nnunet_ssl.files import lock

    with lock(lock_file(dataset.preprocessed), wait=False) as held:
        if not held:
            raise UserError(
                f"Another command is changing {dataset.preprocessed.name} right now (its cases or its folds). Wait "
                "until it has ended, then run this again."
            )
        said: list[str] = []
        recover(dataset.roots, said.append)
        print(*said, sep="\n", end="\n" if said else "", flush=True)
        if args.undo:
            return _undo(dataset)
        if args.labels:
            return _accept(dataset, args)
        if not said:
            raise UserError(
                "No acceptance was interrupted. Name the folder with the corrected segmentations: --labels FOLDER."
            )
    return 0


def _folders(name: str) -> DatasetFolders:
    """The dataset's folders in nnU-Net's three."""
    raw = nnunet_folder("nnUNet_raw", "nnU-Net reads images and labels there.")
    preprocessed = nnunet_folder("nnUNet_preprocessed", "nnU-Net stores plans and preprocessed images there.")
    results = os.environ.get("nnUNet_results")
    dataset = dataset_name(name)

    from nnunet_ssl.data.accepting import DatasetFolders

    for folder in (raw / dataset, preprocessed / dataset):
        if not folder.is_dir():
            raise UserError(
                f"There is no folder {folder}. The dataset must be planned and preprocessed first: "
                f"nnUNetv2_plan_and_preprocess -d {name}."
            )
    return DatasetFolders(raw / dataset, preprocessed / dataset, Path(results) / dataset if results else None)


def _accept(dataset: DatasetFolders, args: argparse.Namespace) -> int:
    from nnunetv2.configuration import default_num_processes

    from nnunet_ssl.data.accepting import Wanted, accept
    from nnunet_ssl.data.corrections import LabelValues
    from nnunet_ssl.evaluation.segmentations import Segmentations

    description = Segmentations.from_dataset_json(dataset.preprocessed / "dataset.json")
    values = LabelValues(description.labels, description.values, description.ignore_label)
    _warn_of_trainings(dataset.results)
    cases, changes = accept(
        dataset,
        values,
        Wanted(args.labels, args.cases, args.allow_empty),
        num_processes=min(default_num_processes, os.cpu_count() or 1) if args.np is None else args.np,
    )
    print(f"Accepted {len(cases)} case(s) into {dataset.raw.name}: {some_of(cases)}")
    width = max(len(where) for where, _ in changes)
    print(*(f"  {where:<{width}}  {how}" for where, how in changes), sep="\n")
    print(f"To reverse this: nnunet-ssl accept -d {args.d} --undo")
    return 0


def _undo(dataset: DatasetFolders) -> int:
    from nnunet_ssl.data.journal import last_accepted

    last = last_accepted(dataset.roots)
    if last is None:
        raise UserError(f"There is no acceptance in {dataset.raw.name} to reverse.")
    if changed := last.changed_since():
        raise UserError(
            f"{len(changed)} file(s) of the last acceptance ({some_of(last.cases)}) have changed since: "
            f"{some_of(changed, 5)}. --undo would lose these changes. Restore the files, or reverse the acceptance "
            "by hand."
        )
    _warn_of_trainings(dataset.results)
    try:
        last.undo()
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be renamed: {error.strerror or error}. Check permissions there, then run "
            f"nnunet-ssl accept -d {dataset.raw.name}, which completes it."
        ) from error
    print(
        f"Reversed: {some_of(last.cases)}. The images are in imagesUn again, and every file of {dataset.raw.name} is "
        "as it was before the acceptance."
    )
    return 0


def _warn_of_trainings(results: Path | None) -> None:
    """Name trainings that seem to run; a training leaves no better sign than the files that it writes."""
    folders = sorted(results.glob("*/fold_*")) if results is not None else []
    running = [f"{folder.parent.name}/{folder.name}" for folder in folders if _seems_to_run(folder)]
    if running:
        print(
            f"Warning: {some_of(running)} changed in the last {_MINUTES} minutes, so a training may be running "
            "there. It continues with its old lists of cases. A trainer of this package stops with an error when it "
            "needs an unlabeled case that has moved. nnUNetv2_train ... --c then continues with the new lists.",
            flush=True,
        )


def _seems_to_run(folder: Path) -> bool:
    """Whether a training has lately written a checkpoint, or lines into its log before it had a final checkpoint."""
    unfinished = not (folder / "checkpoint_final.pth").is_file()
    signs = [folder / "checkpoint_latest.pth", *(folder.glob("training_log_*.txt") if unfinished else ())]
    return any(file.is_file() and time.time() - file.stat().st_mtime < 60 * _MINUTES for file in signs)
