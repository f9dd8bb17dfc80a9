"""The papers' protocol: of a fold's training cases few keep their labels, the others become unlabeled.

A fold of ``splits_final.json`` may hold a third list beside ``train`` and ``val``: ``unlabeled``, cases of imagesTr
whose labels the fold must not see. nnU-Net ignores it; this package's trainers read it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.data.nnunet_files import read_any_json, read_json
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import lock, write_text
from nnunet_ssl.text import shorten, some_of

SPLITS_FILE = "splits_final.json"
_LISTS = ("train", "val", "unlabeled")
_NNUNETS_FOLDS = 5
_MEND = "Correct it, or copy it from where the dataset came from."
_MEND_SPLITS = (
    "Correct it, or move it away, so that nnunet-ssl split or the next training starts from nnU-Net's own folds."
)
Fold = dict[str, list[str]]


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
    file is replaced atomically and the previous one kept beside it. If nothing changes, nothing is written.

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
    if fold is not None and not 0 <= fold < len(before):
        raise UserError(f"There is no fold {fold}: {source or preprocessed_folder} has {_name_folds(len(before))}.")

    after = [dict(entry) for entry in before]
    folds: dict[int, Fold] = {}
    for number in range(len(before)) if fold is None else [fold]:
        try:
            made = label_few(before[number], labeled, seed=seed, with_labels=cases)
        except UserError as error:
            raise UserError(f"Fold {number}: {error}") from None
        if append:
            same = [index for index, entry in enumerate(after) if _same_cases(entry, made)]
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


def current_splits(
    preprocessed_folder: Path, raw_folder: Path | None, cases: Sequence[str]
) -> tuple[list[Fold], Path | None]:
    """The folds that a training would use: of nnUNet_preprocessed, else of nnUNet_raw, else nnU-Net's own five.

    With fewer than five cases, those of :func:`split_dataset`.

    Args:
        preprocessed_folder: see :func:`split_dataset`.
        raw_folder: see :func:`split_dataset`.
        cases: those that have a label.

    Returns:
        the folds, and the file they come from, if there is one.

    Raises:
        UserError: the file is broken.
    """
    for folder in (preprocessed_folder, raw_folder):
        if folder is not None and (folder / SPLITS_FILE).is_file():
            return read_splits(folder / SPLITS_FILE), folder / SPLITS_FILE
    return _default_splits(cases), None


def append_fold(
    preprocessed_folder: Path, raw_folder: Path | None, cases: Sequence[str], fold: Mapping[str, Sequence[str]]
) -> int:
    """The number of a fold with these cases in ``splits_final.json``; where none has them, it is added as the last.

    Args:
        preprocessed_folder: see :func:`split_dataset`.
        raw_folder: see :func:`split_dataset`.
        cases: see :func:`current_splits`.
        fold: lists ``train``, ``val`` and, if present, ``unlabeled``.

    Raises:
        UserError: see :func:`current_splits`; or the file cannot be written.
    """
    file = preprocessed_folder / SPLITS_FILE
    with lock(file.with_name(f".{file.name}.lock")):
        splits, source = current_splits(preprocessed_folder, raw_folder, cases)
        for number, entry in enumerate(splits):
            if _same_cases(entry, fold) and source == file:
                return number
        number = next((index for index, entry in enumerate(splits) if _same_cases(entry, fold)), len(splits))
        write_splits(file, [*splits, dict(fold)] if number == len(splits) else splits)
    return number


def read_splits(file: Path) -> list[Fold]:
    """Read a split file; nothing else reads one.

    Returns:
        the folds, each with the lists ``train`` and ``val``, and ``unlabeled`` where the file has it.

    Raises:
        UserError: it cannot be read, or is no list of such folds.
    """
    splits = read_any_json(file, otherwise=_MEND_SPLITS)
    if not isinstance(splits, list):
        raise UserError(f"{file} must hold a list of folds, found {shorten(splits)}. {_MEND_SPLITS}")
    for number, fold in enumerate(splits):
        if not isinstance(fold, dict):
            raise UserError(
                f"Fold {number} in {file} must be a table with the lists 'train' and 'val', found {shorten(fold)}. "
                f"{_MEND_SPLITS}"
            )
        for name in _LISTS:
            _check_list(fold, name, f"fold {number} in {file}")
    return splits


def _check_list(fold: Mapping[str, Any], name: str, where: str) -> None:
    if name not in fold:
        if name == "unlabeled":
            return
        raise UserError(f"There is no list '{name}' in {where}. {_MEND_SPLITS}")
    names = fold[name]
    if not isinstance(names, list) or not all(isinstance(case, str) for case in names):
        raise UserError(f"The '{name}' list of {where} must be a list of case names, found {shorten(names)}.")
    twice = sorted(case for case, count in Counter(names).items() if count > 1)
    if twice and name == "unlabeled":
        raise UserError(f"The 'unlabeled' list of {where} names {some_of(twice)} more than once.")


def fold_lists(file: Path, fold: int | str) -> Fold | None:
    """The lists of one fold; None for fold "all", or without the file or such a fold, where nnU-Net makes its own.

    Raises:
        UserError: see :func:`read_splits`.
    """
    if fold == "all" or not file.is_file():
        return None
    splits = read_splits(file)
    return splits[int(fold)] if 0 <= int(fold) < len(splits) else None


def unlabeled_list(file: Path, fold: int | str) -> list[str]:
    """Cases of imagesTr whose labels the fold must not see; none where :func:`fold_lists` finds no fold.

    Raises:
        UserError: see :func:`read_splits`.
    """
    return (fold_lists(file, fold) or {}).get("unlabeled", [])


def train_all(dataset: str, configuration: str, plans: str, trainer: str) -> str:
    """The command that trains on all labeled cases."""
    command = f"nnUNetv2_train {dataset} {configuration} all -tr {trainer}"
    return command if plans == "nnUNetPlans" else f"{command} -p {plans}"


def check_fold(file: Path, fold: int | str, labeled: Path, cases: Collection[str], *, train_all: str) -> list[str]:
    """Whether the fold can be trained, known before any work is done.

    Args:
        file: ``splits_final.json`` in nnUNet_preprocessed; may not exist.
        fold: its number, or "all".
        labeled: the folder of the preprocessed labeled cases.
        cases: those cases.
        train_all: the command that trains on all of them.

    Returns:
        what a user should know of a fold that can be trained.

    Raises:
        UserError: nnU-Net would stop at this fold later, or train on labels that other folds hide.
    """
    if not cases:
        raise UserError(
            f"{labeled} holds no preprocessed labeled case. Run nnUNetv2_plan_and_preprocess for "
            f"{file.parent.name} and this configuration."
        )
    if not file.is_file() and fold != "all" and len(cases) < _NNUNETS_FOLDS:
        raise UserError(
            f"{labeled} holds {len(cases)} labeled case(s), too few for the five folds that nnU-Net makes, and there "
            f"is no {file}. Make folds (nnunet-ssl split -d {file.parent.name} --labeled 100%) and start again, or "
            f"train on all labeled cases, without validation cases ({train_all})."
        )
    splits = read_splits(file) if file.is_file() else None
    hiding = [str(number) for number, lists in enumerate(splits or ()) if lists.get("unlabeled")]
    if fold == "all":
        hidden = f"Fold all trains with all labels, also with those that fold(s) {some_of(hiding)} of {file} hide."
        return [hidden] if hiding else []
    number, folds = int(fold), _NNUNETS_FOLDS if splits is None else len(splits)
    if splits is not None and 0 <= number < folds:
        return _notes(splits[number], f"fold {fold} in {file}", labeled, cases)
    if 0 <= number < folds:
        return []
    there = f"There is no fold {fold}: {file} has {_name_folds(folds)}."
    if hiding:
        raise UserError(
            f"{there} nnU-Net would train on a random 80 % of all labeled cases, also with labels that fold(s) "
            f"{some_of(hiding)} hide ('unlabeled'). Choose another fold, or add one with nnunet-ssl split --append."
        )
    if number < 0 or len(cases) < 2:
        raise UserError(f"{there} Choose another fold, or add one with nnunet-ssl split --append.")
    return [f"{there} nnU-Net draws 80 % at random of all labeled cases to train on, and validates the others."]


def _notes(lists: Fold, where: str, labeled: Path, cases: Collection[str]) -> list[str]:
    """What a user should know of one fold's lists; errors as :func:`check_fold` has them."""
    train, val, unlabeled = (set(lists.get(name, ())) for name in _LISTS)
    if not train:
        raise UserError(f"There is no case in the 'train' list of {where}. Name there what to train on.")
    missing = sorted((train | val) - set(cases))
    if missing:
        raise UserError(
            f"The lists 'train' and 'val' of {where} name {some_of(missing)}, but {labeled} holds no such case. "
            "Correct the lists, or preprocess the dataset again (nnUNetv2_preprocess)."
        )
    notes = []
    if not val:
        notes.append(
            f"There is no case in the 'val' list of {where}: training cases are validated instead, as nnU-Net does "
            "for fold all. Their scores tell nothing about other images."
        )
    if train & val:
        notes.append(f"The lists 'train' and 'val' of {where} both name {some_of(sorted(train & val))}.")
    left = sorted(set(cases) - train - val - unlabeled)
    if left:
        notes.append(
            f"{len(left)} labeled case(s) are in no list of {where}, so neither image nor label is used: "
            f"{some_of(left)}. Add them to 'train', or to 'unlabeled' to use their images only."
        )
    return notes


def _name_folds(count: int) -> str:
    return ("no folds", "fold 0 only")[count] if count < 2 else f"folds 0 to {count - 1}"


def write_splits(file: Path, splits: Sequence[Mapping[str, Any]]) -> None:
    """Write a split file, atomically.

    Raises:
        UserError: it cannot be written.
    """
    write_text(file, json.dumps(splits, indent=4) + "\n")


def labeled_cases(preprocessed_folder: Path, raw_folder: Path | None) -> list[str]:
    """The cases that have a label, sorted: those in nnUNet_raw, or else those that were preprocessed.

    Raises:
        UserError: neither folder has any.
    """
    if raw_folder is not None and (raw_folder / "dataset.json").is_file():
        description = read_json(raw_folder / "dataset.json", otherwise=_MEND, entries={"file_ending": str})
        if "dataset" in description or (raw_folder / "imagesTr").is_dir():
            dataset = get_filenames_of_train_images_and_targets(str(raw_folder), description)
            cases = sorted(str(case) for case, files in dataset.items() if Path(files["label"]).is_file())
            if cases:
                return cases
    references = preprocessed_folder / "gt_segmentations"
    if references.is_dir() and (preprocessed_folder / "dataset.json").is_file():
        file = preprocessed_folder / "dataset.json"
        ending = read_json(file, otherwise=_MEND, entries={"file_ending": str})["file_ending"]
        cases = sorted(file.name[: -len(ending)] for file in references.glob(f"*{ending}"))
        if cases:
            return cases
    raise UserError(
        f"No labeled case found: neither in {raw_folder or 'nnUNet_raw'} (imagesTr, labelsTr, dataset.json) nor in "
        f"{references}."
    )


def _default_splits(cases: Sequence[str]) -> list[Fold]:
    """The five folds that nnU-Net makes when there is no split file; with fewer cases, one fold for each of them."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split  # slow to import, for scikit-learn

    if len(cases) == 1:
        return [{"train": list(cases), "val": []}]
    splits = generate_crossval_split(list(cases), seed=12345, n_splits=min(_NNUNETS_FOLDS, len(cases)))
    return [{name: [str(case) for case in fold[name]] for name in ("train", "val")} for fold in splits]


def _same_cases(one: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]]) -> bool:
    return all(set(one.get(name, ())) == set(other.get(name, ())) for name in _LISTS)


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
