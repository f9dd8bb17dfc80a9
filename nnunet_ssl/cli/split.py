"""``nnunet-ssl split``: leave few cases of a fold labeled, as the papers do."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_ssl.cli.lookup import RECOMMENDED, dataset_name
from nnunet_ssl.errors import UserError

HELP = "leave few training cases of a fold labeled; the others become unlabeled (the papers' protocol)"

_EXPLANATION = """\
In each fold, the number of training cases asked for keeps its labels ('train' in splits_final.json); all others are
listed as 'unlabeled', and 'val' stays as it is. nnUNetTrainer then sees the labeled cases only, this package's
trainers use the unlabeled ones too, as they use those in imagesUn.

The draw is seeded. Splitting again starts from labeled and unlabeled cases together, so nothing is lost: --labeled 8,
then --labeled 100%, is the fold as it was. With the same seed, a smaller number is a part of a larger one.

The folds are those of splits_final.json in nnUNet_preprocessed; if there is no such file, nnU-Net's own five folds. Two
to four labeled cases make as many folds, each with one case for validation. A single case makes one fold, which trains
on it and validates none. The previous file is kept as splits_final.json.bak; if there is one already, as .bak2, .bak3
and so on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl split``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset's number or name")
    parser.add_argument(
        "--labeled",
        required=True,
        metavar="N",
        help="cases that stay labeled: a number, or a percentage such as 10%%, rounded up",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the draw; a smaller N with the same seed is a part of a larger one (default: 0)",
    )
    parser.add_argument("-f", type=int, default=None, metavar="FOLD", help="only this fold (default: all)")
    parser.add_argument(
        "--append",
        action="store_true",
        help="add the new folds after the existing ones, so that several counts coexist",
    )


def run(args: argparse.Namespace) -> int:
    """Write the folds and print a table of them."""
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; give 0 or more.")

    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

    from nnunet_ssl.data.few_labels import split_dataset
    from nnunet_ssl.evaluation.tables import format_table

    if not nnUNet_preprocessed.is_set():
        raise UserError(
            "The environment variable nnUNet_preprocessed is not set; nnU-Net reads splits_final.json in that folder."
        )
    name = dataset_name(args.d)
    raw = Path(nnUNet_raw) / name if nnUNet_raw.is_set() else None
    report = split_dataset(
        Path(nnUNet_preprocessed) / name,
        raw,
        labeled=args.labeled,
        seed=args.seed,
        fold=args.f,
        append=args.append,
    )

    lists = ("train", "unlabeled", "val")
    rows = [[number, *(len(fold[entry]) for entry in lists)] for number, fold in report.folds.items()]
    print(format_table(["fold", "labeled", "unlabeled", "validation"], rows))
    print(f"\n{report.file}" + (f" (previous: {report.backup.name})" if report.backup else ""))
    for number, fold in report.folds.items():
        if not fold["val"]:
            print(
                f"Note: fold {number} has no validation case. This package's trainers validate its training cases "
                "instead, whose scores tell nothing about other images. nnUNetTrainer does not train it; use fold all."
            )
    if report.conflicts_with_raw:
        print(
            f"Note: nnU-Net will refuse to plan {name} again while {report.conflicts_with_raw} has other folds. "
            "Move that file away first, or use --append, which keeps its folds."
        )
    example = next(iter(report.folds))
    print(f"Train with: nnUNetv2_train {name} CONFIGURATION {example} -tr {RECOMMENDED}")
    return 0
