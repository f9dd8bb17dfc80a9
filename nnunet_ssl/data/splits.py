"""Folds of ``splits_final.json``: the one reader and writer of these files.

A fold may hold a third list next to ``train`` and ``val``: ``unlabeled``, cases of imagesTr whose labels the fold must
not see. nnU-Net ignores it; this package's trainers read it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.data.nnunet_files import MEND, read_any_json, read_json
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import lock, write_text
from nnunet_ssl.text import closest, shorten, some_of

SPLITS_FILE = "splits_final.json"
LISTS = ("train", "val", "unlabeled")
NNUNETS_FOLDS = 5
_MEND_SPLITS = (
    "Correct it, or move it away, so that nnunet-ssl split or the next training starts from nnU-Net's own folds."
)
Fold = dict[str, list[str]]


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
        for name in LISTS:
            _check_list(fold, name, f"fold {number} in {file}")
        if unread := [name for name in fold if name not in LISTS and closest(name, ["unlabeled"], cutoff=0.9)]:
            raise UserError(
                f"Fold {number} in {file} has the list {unread[0]!r}, which nothing reads. Did you mean 'unlabeled'? "
                "Rename it."
            )
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
    if twice:
        raise UserError(f"The '{name}' list of {where} names {some_of(twice)} more than once. Name each case once.")


def check_unlabeled(lists: Fold, where: str, labeled: Path, cases: Collection[str]) -> None:
    """Whether a fold's ``unlabeled`` list names preprocessed cases that it does not train on.

    Args:
        lists: of the fold.
        where: the fold and the file, for the message.
        labeled: the folder of the preprocessed labeled cases.
        cases: those cases.

    Raises:
        UserError: it does not.
    """
    listed = set(lists.get("unlabeled", ()))
    if both := sorted(listed & set(lists["train"])):
        raise UserError(
            f"{where[0].upper()}{where[1:]} lists {some_of(both)} as 'train' and as 'unlabeled', so a training would "
            "see labels that should be hidden. Keep each case in one of the two lists."
        )
    if missing := sorted(listed - set(cases)):
        raise UserError(
            f"The 'unlabeled' list of {where} names {some_of(missing)}, but {labeled} contains no such case. Correct "
            "the list, or preprocess the dataset again (nnUNetv2_preprocess)."
        )


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


def write_splits(file: Path, splits: Sequence[Mapping[str, Any]]) -> None:
    """Write a split file, atomically.

    Raises:
        UserError: it cannot be written.
    """
    write_text(file, json.dumps(splits, indent=4) + "\n")


def current_splits(
    preprocessed_folder: Path, raw_folder: Path | None, cases: Sequence[str]
) -> tuple[list[Fold], Path | None]:
    """The folds that a training would use: of nnUNet_preprocessed, else of nnUNet_raw, else nnU-Net's own five.

    With fewer than five cases, those of :func:`~nnunet_ssl.data.few_labels.split_dataset`.

    Args:
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        raw_folder: ``nnUNet_raw/DatasetXXX_Name``, or None if there is none.
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
        preprocessed_folder: see :func:`current_splits`.
        raw_folder: see :func:`current_splits`.
        cases: see :func:`current_splits`.
        fold: lists ``train``, ``val`` and, if present, ``unlabeled``.

    Raises:
        UserError: see :func:`current_splits`; or the file cannot be written.
    """
    file = preprocessed_folder / SPLITS_FILE
    with lock(lock_file(preprocessed_folder)):
        splits, source = current_splits(preprocessed_folder, raw_folder, cases)
        for number, entry in enumerate(splits):
            if same_cases(entry, fold) and source == file:
                return number
        number = next((index for index, entry in enumerate(splits) if same_cases(entry, fold)), len(splits))
        write_splits(file, [*splits, dict(fold)] if number == len(splits) else splits)
    return number


def lock_file(preprocessed_folder: Path) -> Path:
    """Whoever reads the folds in order to write them holds this lock meanwhile."""
    return preprocessed_folder / f".{SPLITS_FILE}.lock"


def add_labeled(fold: Mapping[str, Any], cases: Sequence[str]) -> dict[str, Any]:
    """A fold after cases have got labels: they are trained on, unless that would change what the fold is for.

    A validation case stays one. A fold that hides labels of others measures how far few labels lead: there a new case
    goes to ``unlabeled``, so that its image is used as before and the labels stay as few as they were.

    Args:
        fold: lists ``train``, ``val`` and, if present, ``unlabeled``.
        cases: that have got labels.
    """
    labeled, listed = set(cases), set(fold.get("unlabeled", ()))
    hidden = [case for case in fold.get("unlabeled", ()) if case not in labeled]
    here = {*fold["train"], *fold["val"]}
    new = [case for case in cases if case not in here]
    trained = {case for case in new if not hidden or case in listed}
    changed = {**fold, "train": [*fold["train"], *(case for case in new if case in trained)]}
    if "unlabeled" in fold:
        changed["unlabeled"] = [*hidden, *(case for case in new if case not in trained)]
    return changed


def labeled_cases(preprocessed_folder: Path, raw_folder: Path | None) -> list[str]:
    """The cases that have a label, sorted: those in nnUNet_raw, or else those that were preprocessed.

    Raises:
        UserError: neither folder has any.
    """
    if raw_folder is not None and (raw_folder / "dataset.json").is_file():
        description = read_json(raw_folder / "dataset.json", otherwise=MEND, entries={"file_ending": str})
        if "dataset" in description or (raw_folder / "imagesTr").is_dir():
            dataset = get_filenames_of_train_images_and_targets(str(raw_folder), description)
            cases = sorted(str(case) for case, files in dataset.items() if Path(files["label"]).is_file())
            if cases:
                return cases
    references = preprocessed_folder / "gt_segmentations"
    if references.is_dir() and (preprocessed_folder / "dataset.json").is_file():
        file = preprocessed_folder / "dataset.json"
        ending = read_json(file, otherwise=MEND, entries={"file_ending": str})["file_ending"]
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
    splits = generate_crossval_split(list(cases), seed=12345, n_splits=min(NNUNETS_FOLDS, len(cases)))
    return [{name: [str(case) for case in fold[name]] for name in ("train", "val")} for fold in splits]


def same_cases(one: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]]) -> bool:
    """Whether two folds have the same cases in each of the three lists."""
    return all(set(one.get(name, ())) == set(other.get(name, ())) for name in LISTS)


def name_folds(count: int) -> str:
    """Which folds there are, for a message."""
    return ("no folds", "fold 0 only")[count] if count < 2 else f"folds 0 to {count - 1}"
