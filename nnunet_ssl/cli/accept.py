"""``nnunet-ssl accept``: segmentations that a person has corrected become labels."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.cli.lookup import dataset_folders, held_dataset, worker_processes
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import planning_command, some_of

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
    num_processes = worker_processes(args.np)
    dataset = dataset_folders(
        args.d,
        otherwise=f"The dataset must be planned and preprocessed first: {planning_command(args.d)}.",
    )

    from nnunet_ssl.data.journal import recover

    with held_dataset(dataset.preprocessed):
        said: list[str] = []
        recover(dataset.roots, said.append)
        print(*said, sep="\n", end="\n" if said else "", flush=True)
        if args.undo:
            return _undo(dataset)
        if args.labels:
            return _accept(dataset, args, num_processes)
        if not said:
            raise UserError(
                "No acceptance was interrupted. Name the folder with the corrected segmentations: --labels FOLDER."
            )
    return 0


def _accept(dataset: DatasetFolders, args: argparse.Namespace, num_processes: int) -> int:
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
        num_processes=num_processes,
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
