"""Whether a fold can be trained, known before any work is done."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nnunet_ssl.data.splits import LISTS, NNUNETS_FOLDS, Fold, check_unlabeled, name_folds, read_splits
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import some_of


def train_all(dataset: str, configuration: str, plans: str, trainer: str) -> str:
    """The command that trains on all labeled cases."""
    command = f"nnUNetv2_train {dataset} {configuration} all -tr {trainer}"
    return command if plans == "nnUNetPlans" else f"{command} -p {plans}"


def check_fold(
    file: Path,
    fold: int | str,
    labeled: Path,
    cases: Collection[str],
    *,
    train_all: str,
    needs_validation: bool = False,
) -> list[str]:
    """Whether the fold can be trained, known before any work is done.

    Args:
        file: ``splits_final.json`` in nnUNet_preprocessed; may not exist.
        fold: its number, or "all".
        labeled: the folder of the preprocessed labeled cases.
        cases: those cases.
        train_all: the command that trains on all of them.
        needs_validation: whether the trainer is one of nnU-Net's, which train no fold without validation cases.

    Returns:
        what a user should know of a fold that can be trained.

    Raises:
        UserError: nnU-Net would stop at this fold later, or train on labels that other folds hide.
    """
    if not cases:
        raise UserError(
            f"{labeled} contains no preprocessed labeled case. Run nnUNetv2_plan_and_preprocess for "
            f"{file.parent.name} and this configuration."
        )
    if not file.is_file() and fold != "all" and len(cases) < NNUNETS_FOLDS:
        raise UserError(
            f"{labeled} contains {len(cases)} labeled case(s), too few for the five folds that nnU-Net makes, and "
            f"there is no {file}. Make folds (nnunet-ssl split -d {file.parent.name} --labeled 100%) and start "
            f"again, or train on all labeled cases, without validation cases ({train_all})."
        )
    splits = read_splits(file) if file.is_file() else None
    hiding = [str(number) for number, lists in enumerate(splits or ()) if lists.get("unlabeled")]
    if fold == "all":
        hidden = f"Fold all trains with all labels, also with those that fold(s) {some_of(hiding)} of {file} hide."
        return [hidden] if hiding else []
    number, folds = int(fold), NNUNETS_FOLDS if splits is None else len(splits)
    if splits is not None and 0 <= number < folds:
        return _notes(splits[number], f"fold {fold} in {file}", labeled, cases, needs_validation=needs_validation)
    if 0 <= number < folds:
        return []
    there = f"There is no fold {fold}: {file} has {name_folds(folds)}."
    if hiding:
        raise UserError(
            f"{there} nnU-Net would train on a random 80 % of all labeled cases, also with labels that fold(s) "
            f"{some_of(hiding)} hide ('unlabeled'). Choose another fold, or add one with nnunet-ssl split --append."
        )
    if number < 0 or len(cases) < 2:
        raise UserError(f"{there} Choose another fold, or add one with nnunet-ssl split --append.")
    return [f"{there} nnU-Net draws a random 80 % of all labeled cases for training, and validates on the others."]


def _notes(lists: Fold, where: str, labeled: Path, cases: Collection[str], *, needs_validation: bool) -> list[str]:
    """What a user should know of one fold's lists; errors as :func:`check_fold` has them."""
    train, val, unlabeled = (set(lists.get(name, ())) for name in LISTS)
    if not train:
        raise UserError(f"There is no case in the 'train' list of {where}. Add the cases to train on.")
    if needs_validation and not val:
        raise UserError(
            f"There is no case in the 'val' list of {where}, and nnU-Net's own trainers cannot train a fold without "
            "validation cases. Add some, or use fold all."
        )
    missing = sorted((train | val) - set(cases))
    if missing:
        raise UserError(
            f"The lists 'train' and 'val' of {where} name {some_of(missing)}, but {labeled} contains no such case. "
            "Correct the lists, or preprocess the dataset again (nnUNetv2_preprocess)."
        )
    check_unlabeled(lists, where, labeled, cases)
    notes = []
    if not val:
        notes.append(
            f"There is no case in the 'val' list of {where}: the training validates on training cases instead, as "
            "nnU-Net does for fold all. These scores say nothing about other images."
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
