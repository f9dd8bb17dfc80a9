"""The folds of a converted dataset: a fifth of the training cases for validation, few of the others labeled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.dataset_conversion.Dataset027_ACDC import create_ACDC_split
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ssl.data.conversion.datasets import BENCHMARKS
from nnunet_ssl.data.few_labels import label_few, parse_count
from nnunet_ssl.data.splits import SPLITS_FILE, Fold, read_splits, write_splits
from nnunet_ssl.errors import UserError

_FOLDS = 5


def check_labeled(
    labeled: str, groups: int, remedy: str = "Fix the cases that were left out, or complete the download."
) -> None:
    """Find out before a long conversion whether so many can be labeled.

    Args:
        labeled: a number or a percentage.
        groups: training cases; where a patient has several, patients.
        remedy: what to do if these are too few.

    Raises:
        UserError: too many, too few, or no number.
    """
    if groups < _FOLDS:
        raise UserError(
            f"{_FOLDS} folds need at least {_FOLDS} training cases of different patients; found {groups}. {remedy}"
        )
    parse_count(labeled, groups - math.ceil(groups / _FOLDS))


def write_folds(
    kind: str, dataset_folder: Path, preprocessed_folder: Path, cases: Sequence[str], *, labeled: str, seed: int
) -> tuple[Path, list[Fold]]:
    """Write ``splits_final.json`` to nnUNet_preprocessed, where nnU-Net and ``nnunet-ssl split`` look for it.

    The folds are nnU-Net's own: the five it makes without a split file, or for ACDC those of its converter, which keep
    a patient's frames together. Of each fold's training cases, few stay labeled and the others become ``unlabeled``.

    Args:
        kind: a key of ``BENCHMARKS``.
        dataset_folder: ``nnUNet_raw/DatasetXXX_Name``, converted.
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX_Name``; made if it does not exist.
        cases: the training cases.
        labeled: number or percentage of a fold's training cases that stay labeled; where a patient has several cases,
            of its patients.
        seed: of the draw, as in ``nnunet-ssl split``.

    Returns:
        the file and its folds.

    Raises:
        UserError: there are other folds already, or so many cannot be labeled.
    """
    group = BENCHMARKS[kind].group
    members: dict[str, list[str]] = {}
    for case in sorted(cases):
        members.setdefault(group(case), []).append(case)
    check_labeled(labeled, len(members))
    if kind == "acdc":
        folds = create_ACDC_split(str(dataset_folder / "labelsTr"))
    else:
        folds = generate_crossval_split(sorted(members), seed=12345, n_splits=_FOLDS)
    made: list[Fold] = []
    for fold in folds:
        groups = {name: sorted({group(str(case)) for case in fold[name]}) for name in ("train", "val")}
        few = label_few(groups, labeled, seed=seed, with_labels=set(members))
        made.append({name: [case for one in few[name] for case in members[one]] for name in few})

    file = preprocessed_folder / SPLITS_FILE
    if file.is_file():
        if read_splits(file) != made:
            raise UserError(
                f"{file} already has other folds. To change the number of labeled cases, run nnunet-ssl split, which "
                "keeps the previous file. To get the folds of this conversion, move that file away and run this "
                "again."
            )
    else:
        write_splits(file, made)
    return file, made
