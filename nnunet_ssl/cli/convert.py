"""``nnunet-ssl convert``: bring a benchmark dataset into nnU-Net's layout, with few labeled cases."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.text import planning_command, some_of

HELP = "convert a benchmark dataset of semi-supervised segmentation from its official download"

DATASETS = ("la", "pancreas", "acdc", "brats19", "isic2018")

_EXPLANATION = """\
la        2018 Atrial Segmentation Challenge, the original files or the h5 files that most papers use
pancreas  Pancreas-CT of the NIH (The Cancer Imaging Archive), DICOM or NIfTI, with its labels
acdc      Automated Cardiac Diagnosis Challenge; --labeled counts patients
brats19   Brain Tumor Segmentation Challenge 2019
isic2018  ISIC Challenge 2018, task 1: skin lesions

SOURCE is the folder of the unpacked download. Whole volumes are written to nnUNet_raw/DatasetXXX_NAME. Official test
cases, and those of --test-list, go to imagesTs and labelsTs and never into a fold.

The folds are written to splits_final.json in nnUNet_preprocessed/DatasetXXX_NAME, as nnunet-ssl split writes them.
There are five folds, and each validates on a fifth of the training cases. Of the other cases, N keep their labels, and
the rest is 'unlabeled'. All label files stay in labelsTr: the list of the fold hides them. To change N, use nnunet-ssl
split.

If you run the command again, it converts only what is missing. It never changes a dataset folder with other content.

Exit code: 0; 1 if a case cannot be used (the table says why; the others are converted); 2 for an error in the call.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl convert``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("dataset", choices=DATASETS, help="which dataset")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the unpacked download")
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="number of the new dataset, 1 to 999")
    parser.add_argument(
        "--labeled",
        required=True,
        metavar="N",
        help="training cases (for acdc: patients) that stay labeled in each fold: a number, or a percentage such "
        "as 10%%",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the draw; with the same seed, the cases of a smaller N are among those of a larger N "
        "(default: 0)",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the new dataset (default: the benchmark's)")
    parser.add_argument(
        "--test-list",
        type=Path,
        metavar="FILE",
        help="text file with the test cases, one case or patient per line (default for la: the download's test.list)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert, print what came of it, and return 1 if a case cannot be used."""
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; give 0 or more.")
    if not 1 <= args.d <= 999:
        raise UserError(f"-d is {args.d}; give a number from 1 to 999 that no dataset has.")
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", args.name):
        raise UserError(f"--name is {args.name!r}; use letters, digits, '_' and '-' only.")

    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    from nnunet_ssl.data.conversion import BENCHMARKS, convert_dataset, write_folds
    from nnunet_ssl.evaluation.tables import format_table

    name = f"Dataset{args.d:03d}_{args.name or BENCHMARKS[args.dataset].dataset_name}"
    for variable, purpose in ((nnUNet_raw, "the dataset goes there"), (nnUNet_preprocessed, "the folds go there")):
        if not variable.is_set():
            raise UserError(f"The environment variable {variable.env_var_name} is not set; {purpose}.")
        _check_writable(Path(variable) / name, f"the environment variable {variable.env_var_name}; {purpose}")
    others = [str(one) for one in find_candidate_datasets(args.d) if one != name]
    if others:
        raise UserError(f"The number {args.d} is taken by {', '.join(others)}. Choose another with -d.")

    folder = Path(nnUNet_raw) / name
    report = convert_dataset(args.dataset, args.source, folder, labeled=args.labeled, test_list=args.test_list)
    for remark in report.remarks:
        print(remark)
    print(
        f"{folder}: {len(report.train)} training cases, {len(report.test)} test cases "
        f"({report.written} converted now), {len(report.failed)} left out"
    )
    for note in sorted({one.reason for one in report.notes}):
        cases = [one.identifier for one in report.notes if one.reason == note]
        print(f"Note: {note} ({len(cases)} cases: {some_of(cases)}).")
    if report.failed:
        rows = [[problem.identifier, problem.reason] for problem in report.failed]
        print(f"\n{format_table(['case', 'left out because'], rows)}")
    if not report.train:
        return 1

    preprocessed = Path(nnUNet_preprocessed) / name
    file, folds = write_folds(args.dataset, folder, preprocessed, report.train, labeled=args.labeled, seed=args.seed)
    lists = ("train", "unlabeled", "val")
    counts = [[number, *(len(fold[entry]) for entry in lists)] for number, fold in enumerate(folds)]
    print(f"\n{format_table(['fold', 'labeled', 'unlabeled', 'validation'], counts)}\n\n{file}")
    print(f"Next: {planning_command(str(args.d))}")
    return 1 if report.failed else 0


def _check_writable(folder: Path, remedy: str) -> None:
    """Find out before the work begins whether a folder can be made and written to.

    Args:
        folder: need not exist, nor those above it.
        remedy: what to correct if not.
    """
    nearest = next(one for one in (folder, *folder.parents) if os.access(one, os.F_OK))
    if not nearest.is_dir():
        raise UserError(f"{nearest} is not a folder. Remove it, or correct {remedy}.")
    if not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"Nothing can be written to {nearest}. Check its permissions, or correct {remedy}.")
