"""The papers' protocol: of a fold's training cases few keep their labels, the others become unlabeled."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ssl.data.splits import (
    SPLITS_FILE,
    Fold,
    current_splits,
    labeled_cases,
    name_folds,
    read_splits,
    same_cases,
    write_splits,
)
from nnunet_ssl.errors import UserError


@dataclass(frozen=True)
class SplitReport:
    """What :func:`split_dataset` did.

    Attributes:
        file: the split file.
        folds: the folds made, by the number to pass to nnUNetv2_train.
        backup: copy of the file as it was before; None if nothing changed or there was none.
        conflicts_with_raw: a split file in nnUNet_raw whose folds differ, so that nnU-Net's planner would refuse this
            dataset; None if there is none.
    """

    file: Path
    folds: dict[int, Fold]
    backup: Path | None
    conflicts_with_raw: Path | None


def label_few(fold: Mapping[str, Sequence[str]], labeled: str, *, seed: int, with_labels: Collection[str]) -> Fold:
    """Keep some of a fold's training cases labeled; the rest go to ``unlabeled`` and ``val`` stays as it is.

    The cases are drawn from ``train`` and ``unlabeled`` together, so a fold can be split again and again without
    losing any. With the same seed a smaller number gives a subset of a larger one.

    Args:
        fold: lists ``train``, ``val`` and, if present, ``unlabeled``.
        labeled: a number of cases, or a percentage such as ``10%``, which is rounded up.
        seed: the draw depends on it and on the cases' names only.
        with_labels: the cases that have a label file; others stay unlabeled.

    Raises:
        UserError: the number is no number, less than one, or more than there are.
    """
    everything = sorted({*fold["train"], *fold.get("unlabeled", ())})
    pool = [case for case in everything if case in with_labels]
    count = parse_count(labeled, len(pool))
    drawn = np.random.default_rng(seed).permutation(len(pool))[:count]
    train = sorted(pool[index] for index in drawn)
    return {
        "train": train,
        "val": list(fold["val"]),
        "unlabeled": [case for case in everything if case not in set(train)],
    }


def parse_count(text: str, available: int) -> int:
    """A number of cases from ``8`` or ``10%`` (of those available, rounded up).

    Raises:
        UserError: see :func:`label_few`.
    """
    number = text.strip()
    percentage = number.endswith("%")
    try:
        value = Decimal(number.removesuffix("%"))
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or value <= 0 or (not percentage and value != int(value)):
        raise UserError(
            f"The number of labeled cases is {text!r}; give a number such as 8, or a percentage such as 10%."
        )
    count = math.ceil(value * available / 100) if percentage else int(value)
    if count > available:
        raise UserError(f"Asked for {text} labeled cases, but the fold has {available} training cases with labels.")
    return count


def split_dataset(
    preprocessed_folder: Path,
    raw_folder: Path | None,
    *,
    labeled: str,
    seed: int = 0,
    fold: int | None = None,
    append: bool = False,
) -> SplitReport:
    """Apply :func:`label_few` to the folds of ``splits_final.json`` in nnUNet_preprocessed.

    Without such a file, the one in nnUNet_raw is the start, and without that nnU-Net's own five folds. With fewer than
    five labeled cases, each is the validation case of one fold; a single one is trained on and none validated. The
    file is replaced atomically and the previous one kept next to it. If nothing changes, nothing is written.

    Args:
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX_Name``; made if it does not exist.
        raw_folder: ``nnUNet_raw/DatasetXXX_Name``, or None if there is none.
        labeled: see :func:`label_few`.
        seed: see :func:`label_few`.
        fold: only this fold; by default all.
        append: add the new folds after the existing ones rather than replacing them. A fold that is there already is
            not added again.

    Raises:
        UserError: no such dataset or fold, an unreadable file, or a number of cases that cannot be had.
    """
    file = preprocessed_folder / SPLITS_FILE
    raw_file = raw_folder / SPLITS_FILE if raw_folder is not None else None
    cases = labeled_cases(preprocessed_folder, raw_folder)
    before, source = current_splits(preprocessed_folder, raw_folder, cases)
    if not before:
        raise UserError(f"{source} contains no fold. Move it away, so that split starts from nnU-Net's own folds.")
    if fold is not None and not 0 <= fold < len(before):
        raise UserError(f"There is no fold {fold}: {source or preprocessed_folder} has {name_folds(len(before))}.")

    after = [dict(entry) for entry in before]
    folds: dict[int, Fold] = {}
    for number in range(len(before)) if fold is None else [fold]:
        try:
            made = label_few(before[number], labeled, seed=seed, with_labels=cases)
        except UserError as error:
            raise UserError(f"Fold {number}: {error}") from None
        if append:
            same = [index for index, entry in enumerate(after) if same_cases(entry, made)]
            number = same[0] if same else len(after)
            if not same:
                after.append(made)
        else:
            after[number] = {**after[number], **made}
        folds[number] = made

    backup = None
    if not file.is_file() or after != before:
        if file.is_file():
            backup = _unused_name(file)
            backup.write_bytes(file.read_bytes())
        write_splits(file, after)
    conflict = raw_file is not None and raw_file.is_file() and not _planner_accepts(read_splits(raw_file), after)
    return SplitReport(file, folds, backup, raw_file if conflict else None)


def _planner_accepts(raw: Sequence[Mapping[str, Any]], splits: Sequence[Mapping[str, Any]]) -> bool:
    """Whether nnU-Net's planner finds its raw folds again: it asserts that they begin the preprocessed file."""
    return len(raw) <= len(splits) and all(
        set(one[name]) == set(other[name]) for one, other in zip(raw, splits, strict=False) for name in ("train", "val")
    )


def _unused_name(file: Path) -> Path:
    candidate, number = file.with_name(f"{file.name}.bak"), 1
    while candidate.exists() or candidate.is_symlink():
        number += 1
        candidate = file.with_name(f"{file.name}.bak{number}")
    return candidate
