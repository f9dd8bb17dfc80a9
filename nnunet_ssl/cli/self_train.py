"""``nnunet-ssl self-train``: cases on which models agree become training cases of a new dataset."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.cli.lookup import dataset_folders, held_dataset, worker_processes
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import dataset_number, some_of

if TYPE_CHECKING:
    from nnunet_ssl.data.self_training import Made

HELP = "make a new dataset in which models have labeled the cases on which they agree"

_EXPLANATION = """\
The queue is a folder that nnunet-ssl rank has written. Its reliable cases get the models' consensus as labels, and
voxels on which the models disagree get nnU-Net's ignore label, which no loss counts. Labeled cases stay as they are,
and all other unlabeled cases are in imagesUn of the new dataset. The plans are those of the source.

The new dataset has the folds of the source whose validation cases no labeling model was trained on, and never validates
a case that the models have labeled. If there is no such fold, the command refuses and says which model has seen what.

The dataset is made as a whole or not at all. The commands that come next are printed.
"""

_NUMBER_OR_NAME = re.compile(r"\d{1,3}|Dataset\d{3}_[A-Za-z0-9][A-Za-z0-9_-]*", re.ASCII)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl self-train``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("-d", required=True, metavar="DATASET", help="ranked dataset's number or name")
    parser.add_argument("--queue", required=True, type=Path, metavar="QUEUE", help="folder written by nnunet-ssl rank")
    parser.add_argument(
        "--as",
        required=True,
        dest="target",
        metavar="NEW",
        help="number of the new dataset, 1 to 999, or its whole name, such as Dataset951_Mine",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--verdicts",
        nargs="+",
        default=["reliable"],
        metavar="VERDICT",
        help="take cases with one of these verdicts (default: reliable); quote those of several words",
    )
    chosen.add_argument(
        "--cases", nargs="+", default=[], metavar="CASE", help="take these cases, whatever their verdict"
    )
    chosen.add_argument(
        "--best",
        metavar="N",
        help="take the N cases on which the models agree most, or a share of all such as 50%%, whatever their verdict",
    )
    parser.add_argument("--copy", action="store_true", help="copy the images (default: link to them)")
    parser.add_argument("-np", type=int, metavar="N", help="worker processes, each holds one case in memory")


def run(args: argparse.Namespace) -> int:
    """Make the dataset, and print what it holds and which commands come next."""
    num_processes = worker_processes(args.np)
    _check_best(args)
    source = dataset_folders(args.d, otherwise="The ranked dataset is needed with its images and plans.")
    name = _new_name(args.target, source.raw.name)

    from nnunet_ssl.data.corrections import LabelValues
    from nnunet_ssl.data.queue import VERDICTS
    from nnunet_ssl.data.self_training import Wanted, self_train
    from nnunet_ssl.evaluation.segmentations import Segmentations

    if unknown := sorted(set(args.verdicts) - set(VERDICTS)):
        raise UserError(f"--verdicts {some_of(unknown)}: the verdicts are {', '.join(map(repr, VERDICTS))}.")
    with held_dataset(source.preprocessed):
        description = Segmentations.from_dataset_json(source.raw / "dataset.json")
        made = self_train(
            source,
            LabelValues(description.labels, description.values, description.ignore_label),
            Wanted(name, args.queue, args.verdicts, args.cases, args.best, args.copy),
            num_processes=num_processes,
        )
    _report(name, source.raw.name, made)
    _print_next(name, made)
    return 0


def _check_best(args: argparse.Namespace) -> None:
    if args.best is None:
        return
    number = re.fullmatch(r"(\d+(?:\.\d+)?)%|(\d+)", args.best, re.ASCII)
    if number is None or not (0 < float(number[1]) <= 100 if number[1] else int(number[2])):
        raise UserError(f"--best is {args.best!r}; give a number of cases from 1, or a share such as 50%.")


def _new_name(target: str, source: str) -> str:
    """The new dataset's whole name.

    Raises:
        UserError: what was given is no number and no name.
    """
    if not _NUMBER_OR_NAME.fullmatch(target):
        raise UserError(f"--as is {target!r}; give a number from 1 to 999, or a name such as Dataset951_Mine.")
    number = int(dataset_number(target))
    if not number:
        raise UserError(f"--as is {target!r}; numbers of datasets are 1 to 999.")
    return f"Dataset{number:03d}_{source[11:]}_SelfTrained" if target.isdigit() else target


def _report(name: str, source: str, made: Made) -> None:
    from nnunet_ssl.evaluation.tables import format_table

    cases = made.cases
    print(f"{name}: made from {source}")
    print(
        f"  labeled {len(cases.labeled)}, pseudo-labeled {len(cases.pseudo_labeled)}, unlabeled {len(cases.unlabeled)} "
        "case(s)"
    )
    share = sum(made.ignored.values()) / len(made.ignored)
    print(f"  ignored because the models disagree: {100 * share:.2f} % of the pseudo-labeled voxels")
    rows = [
        [
            number,
            one.number,
            len(fold["train"]) - len(cases.pseudo_labeled),
            len(cases.pseudo_labeled),
            len(fold["val"]),
        ]
        for number, (one, fold) in enumerate(zip(cases.carried, cases.splits, strict=True))
    ]
    print(f"\n{format_table(['fold', f'of {source}', 'labeled', 'pseudo-labeled', 'validation'], rows)}\n")
    for one in cases.folds:
        if one.reason is not None:
            print(f"Note: fold {one.number} of {source} is left out: {one.reason}.")
    for note in cases.notes:
        print(f"Note: {note}")


def _print_next(name: str, made: Made) -> None:
    """nnU-Net's own commands."""
    number, configuration = dataset_number(name), made.configuration
    plans = "" if made.plans == "nnUNetPlans" else f" -p {made.plans}"
    folds = range(len(made.cases.carried))
    print("Next:")
    print(f"  nnUNetv2_preprocess -d {number} -plans_name {made.plans} -c {configuration}")
    for fold in folds:
        print(f"  nnUNetv2_train {number} {configuration} {fold}{plans}")
    trained = " ".join(map(str, folds))
    print(f"  nnUNetv2_predict -d {number} -c {configuration} -f {trained}{plans} -i IMAGES -o PREDICTIONS")
