"""Options that evaluate, compare and overlay share: folders of predictions, and what they hold."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.cli.lookup import dataset_folder
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.evaluation.folders import FolderResult
    from nnunet_ssl.evaluation.segmentations import Segmentations


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Where the names and values of the structures come from."""
    group = parser.add_argument_group(
        "labels", "default: the dataset.json that nnU-Net wrote into or above the folder of the (first) predictions"
    )
    group.add_argument(
        "-d", metavar="DATASET", help="dataset's number or name; its dataset.json names labels and file ending"
    )
    group.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="labels, instead of -d: 1 2, or organ=1 tumor=2, or whole=1,2 for a region",
    )
    group.add_argument("--ignore-label", type=int, metavar="N", help="with --labels: value of voxels to ignore")
    group.add_argument(
        "--file-ending", metavar="ENDING", help="with --labels: ending of the segmentations (default: .nii.gz)"
    )


def add_processes_option(parser: argparse.ArgumentParser) -> None:
    """The option ``-np``, named as nnU-Net's."""
    parser.add_argument(
        "-np",
        type=int,
        metavar="N",
        help="processes; each has one case in memory (default: depends on cases and cores)",
    )


def segmentations_of(args: argparse.Namespace, predictions: Sequence[Path]) -> Segmentations:
    """Labels and file ending, from the options or from nnU-Net's own dataset.json.

    Raises:
        UserError: there is none, or the options contradict each other.
    """
    from nnunet_ssl.evaluation.segmentations import Segmentations

    if args.labels:
        if args.d:
            raise UserError("-d and --labels both give the labels; use one of them.")
        return Segmentations.from_options(args.labels, args.file_ending or ".nii.gz", args.ignore_label)
    for option, value in (("--ignore-label", args.ignore_label), ("--file-ending", args.file_ending)):
        if value is not None:
            raise UserError(f"{option} needs --labels; otherwise dataset.json gives this value.")
    if args.d:
        return Segmentations.from_dataset_json(dataset_folder(args.d, "dataset.json") / "dataset.json")
    looked = [folder.resolve() for one in predictions for folder in (one, *one.resolve().parents[:2])]
    for folder in looked:
        if (folder / "dataset.json").is_file():
            return Segmentations.from_dataset_json(folder / "dataset.json")
    raise UserError(
        f"There is no dataset.json, which gives the labels, in {', '.join(map(str, dict.fromkeys(looked)))}. Name "
        "the dataset with -d, or the labels with --labels."
    )


def named_folders(arguments: Sequence[str], option: str) -> dict[str, list[Path]]:
    """From ``NAME=FOLDER``, or ``FOLDER`` alone, which is then its own name; a name can have several folders."""
    folders: dict[str, list[Path]] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        # A folder's own name can have the sign.
        if not equals or Path(argument).is_dir():
            name = folder = argument
        path = Path(folder)
        if not path.is_dir():
            raise UserError(f"{option} {argument}: there is no folder {path.resolve()}.")
        if path.resolve() in [one.resolve() for one in folders.get(name, [])]:
            raise UserError(f"{option} {argument}: {name} has that folder already.")
        folders.setdefault(name, []).append(path)
    return folders


def make_folder(folder: Path) -> Path:
    """Make the folder for results before the work begins.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"-o {folder} cannot be created: {error.strerror}.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"Nothing can be written to {folder}; choose another folder with -o.")
    return folder


def processes(asked: int | None, cases: int) -> int:
    """What was asked for, or one process for every four cases, up to nnU-Net's default and the number of cores."""
    if asked is not None:
        if asked < 1:
            raise UserError(f"-np is {asked}; give 1 or more.")
        return asked
    from nnunet_ssl.data.worker_processes import default_workers

    # A process takes seconds to start.
    return max(1, min(default_workers(), cases // 4))


def report_problems(results: dict[str, FolderResult], *, chill: bool) -> bool:
    """Print which cases could not be evaluated and which have no prediction; True if there are any that count."""
    from nnunet_ssl.evaluation.tables import format_table

    rows = []
    for name, result in results.items():
        rows += [[name, case, reason] for case, reason in result.failed.items()]
        if not chill:
            rows += [[name, case, "has no prediction"] for case in result.missing]
    if rows:
        header = ["predictions", "case", "problem"]
        print(f"\n{len(rows)} {'case' if len(rows) == 1 else 'cases'} not evaluated:")
        print(format_table(header, rows) if len(results) > 1 else format_table(header[1:], [row[1:] for row in rows]))
    return bool(rows)
