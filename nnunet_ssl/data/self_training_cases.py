"""Which cases of a self-trained dataset have labels, pseudo-labels or none, and which folds it has.

A dataset has one file of labels for each case. So all folds that are carried over must agree: a case that gets a
pseudo-label is one whose labels they all hide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.data.queue import Queue, Row, read_rows
from nnunet_ssl.data.raw_cases import (
    IMAGES_FOLDER,
    LABELED_IMAGES_FOLDER,
    CaseProblem,
    RawCase,
    files_per_case,
    find_raw_cases,
    name_problems,
)
from nnunet_ssl.data.splits import Fold, current_splits
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import some_of


@dataclass(frozen=True)
class JudgedFold:
    """A fold of the source.

    Attributes:
        number: in the source.
        fold: its lists.
        reason: why it cannot be carried over; None if it can.
    """

    number: int
    fold: Fold
    reason: str | None


@dataclass(frozen=True)
class Cases:
    """The cases of the new dataset, by name, and its folds.

    Attributes:
        labeled: with the labels of the source.
        pseudo_labeled: to be labeled by the models.
        unlabeled: without labels.
        folds: of the source, all of them.
        notes: what a user should know.
    """

    labeled: dict[str, RawCase]
    pseudo_labeled: dict[str, RawCase]
    unlabeled: dict[str, RawCase]
    folds: list[JudgedFold]
    notes: list[str]

    @property
    def carried(self) -> list[JudgedFold]:
        """The folds of the new dataset, in its order."""
        return [one for one in self.folds if one.reason is None]

    @property
    def validation(self) -> list[str]:
        """All cases that a fold validates."""
        return sorted({case for one in self.carried for case in one.fold["val"]})

    @property
    def splits(self) -> list[Fold]:
        """Lists of the new folds: a case without labels is in none, and so are hidden labels that no fold uses."""
        made = []
        for one in self.carried:
            new = {"train": [*one.fold["train"], *sorted(self.pseudo_labeled)], "val": list(one.fold["val"])}
            if hidden := [case for case in one.fold.get("unlabeled", ()) if case in self.labeled]:
                new["unlabeled"] = hidden
            made.append(new)
        return made


def choose_cases(
    queue: Queue, folder: Path, verdicts: Sequence[str], cases: Sequence[str] = (), best: str | None = None
) -> list[str]:
    """The cases that get pseudo-labels, by name.

    Args:
        queue: of the ranking.
        folder: of the queue.
        verdicts: cases with one of them; used where neither ``cases`` nor ``best`` is given.
        cases: exactly these.
        best: a number such as "12", or a share of all such as "50%": those on which the models agree most.

    Raises:
        UserError: a case is not in the queue, or none is left.
    """
    rows = {row.case: row for row in read_rows(folder, queue)}
    if unknown := sorted(set(cases) - set(rows)):
        raise UserError(f"{folder} has no ranked case {some_of(unknown)}. Choose of those in its cases.csv.")
    if best is not None:
        return sorted(_best(list(rows.values()), best, folder))
    chosen = list(cases) or [case for case, row in rows.items() if row.verdict in verdicts]
    if not chosen:
        found = [row.verdict for row in rows.values()]
        counts = ", ".join(f"{found.count(one)} '{one}'" for one in sorted(set(found)))
        alone = "with two or more models, since one alone agrees with no other"
        again = alone if len(queue.models) == 1 else "with a lower --reliable, which predicts nothing again"
        raise UserError(
            f"No case in {folder} has the verdict {' or '.join(map(repr, verdicts))}; there are "
            f"{counts or 'no cases'}. Look at them and name those whose consensus is good enough (--cases CASE ...), "
            f"or run nnunet-ssl rank again {again}."
        )
    return sorted(set(chosen))


def _best(rows: Sequence[Row], best: str, folder: Path) -> list[str]:
    """Of two on which the models agree as much, the first by name."""
    known = sorted((-row.dice, row.case) for row in rows if not math.isnan(row.dice))
    if not known:
        raise UserError(
            f"No case in {folder} says how far its models agree. That takes two models or more; rank again with them "
            "(nnunet-ssl rank)."
        )
    count = max(1, round(len(known) * float(best[:-1]) / 100)) if best.endswith("%") else int(best)
    if count > len(known):
        raise UserError(f"--best asks for {count} cases, and {folder} has {len(known)}. Give fewer.")
    return [case for _, case in known[:count]]


def sort_cases(
    raw: Path,
    preprocessed: Path,
    description: Mapping[str, Any],
    chosen: Sequence[str],
    seen: Mapping[str, set[str]],
    *,
    strict: bool,
) -> Cases:
    """Sort the cases of a dataset for self-training.

    Args:
        raw: ``nnUNet_raw/DatasetXXX_Name``.
        preprocessed: ``nnUNet_preprocessed/DatasetXXX_Name``.
        description: its dataset.json.
        chosen: cases to label by the models.
        seen: cases whose labels the labeling models have seen, by model.
        strict: whether a chosen case must not have labels; else it keeps them, and is named in a note.

    Raises:
        UserError: no fold can be carried over, or images or labels are missing.
    """
    ending, number = description["file_ending"], files_per_case(raw, dict(description))
    known, bad_known = find_raw_cases(raw / LABELED_IMAGES_FOLDER, ending, number)
    others, bad_others = find_raw_cases(raw / IMAGES_FOLDER, ending, number)
    with_labels, without = ({case.identifier: case for case in found} for found in (known, others))
    labels = raw / "labelsTr"
    folds, _ = current_splits(
        preprocessed, raw, [name for name in with_labels if (labels / f"{name}{ending}").is_file()]
    )
    judged = [JudgedFold(index, fold, _spoiled(fold, seen)) for index, fold in enumerate(folds)]
    _refuse_if_none(judged)

    usable = [one.fold for one in judged if one.reason is None]
    hidden = {case for fold in usable for case in fold.get("unlabeled", ())}
    shown = {case for fold in usable for case in (*fold["train"], *fold["val"])}
    labeled_since = [case for case in chosen if case in shown - hidden]
    notes = []
    if labeled_since and not strict:
        notes.append(f"{len(labeled_since)} case(s) have labels by now and keep them: {some_of(labeled_since)}.")
        chosen = [case for case in chosen if case not in labeled_since]
    bad = {problem.identifier: problem.reason for problem in [*bad_known, *bad_others]}
    problems = [
        CaseProblem(case, reason)
        for case in chosen
        if (reason := _not_to_label(case, with_labels, without, hidden, bad)) is not None
    ]
    if problems:
        raise UserError(f"Nothing was made, because of {name_problems(problems)}")
    if not chosen:
        raise UserError(f"Nothing was made: no case is left to label. {' '.join(notes)}")
    own = {case for case in chosen if case in with_labels}
    judged = [one if one.reason else JudgedFold(one.number, one.fold, _shows(one.fold, own)) for one in judged]
    _refuse_if_none(judged)

    carried = [one.fold for one in judged if one.reason is None]
    used = sorted({case for fold in carried for case in (*fold["train"], *fold["val"])})
    _check_labeled(used, with_labels, bad, labels, ending)
    rest = {case for fold in carried for case in fold.get("unlabeled", ()) if case in with_labels}
    unlabeled = {**without, **{case: with_labels[case] for case in sorted(rest)}}
    if left_out := [problem for problem in bad_others if problem.identifier not in chosen]:
        notes.append(f"{len(left_out)} case(s) of {IMAGES_FOLDER} are left out, the first: {_name(left_out[0])}.")
    return Cases(
        labeled={case: with_labels[case] for case in used},
        pseudo_labeled={case: (with_labels | without)[case] for case in sorted(chosen)},
        unlabeled={name: case for name, case in unlabeled.items() if name not in {*used, *chosen}},
        folds=judged,
        notes=notes,
    )


def _name(problem: CaseProblem) -> str:
    return f"{problem.identifier} ({problem.reason})"


def _spoiled(fold: Fold, seen: Mapping[str, set[str]]) -> str | None:
    """Why a fold cannot judge what the models teach: they have seen labels that it holds back."""
    if not fold["val"]:
        return "it validates no case"
    for name, what in (("val", "validation cases"), ("unlabeled", "cases whose labels it hides")):
        listed = fold.get(name, ())
        for model, labels in seen.items():
            if known := sorted(labels & set(listed)):
                return f"{model} has seen the labels of {len(known)} of its {len(listed)} {what} ({some_of(known, 3)})"
    return None


def _shows(fold: Fold, pseudo_labeled: set[str]) -> str | None:
    """Why a fold does not go together with pseudo-labels in place of labels."""
    if shown := sorted(pseudo_labeled - set(fold.get("unlabeled", ()))):
        return f"it does not hide the labels of {some_of(shown, 3)}, which get pseudo-labels"
    return None


def _refuse_if_none(folds: Sequence[JudgedFold]) -> None:
    if all(one.reason for one in folds):
        reasons = "".join(f"\n  fold {one.number}: {one.reason}" for one in folds)
        raise UserError(
            "Nothing was made: no fold could tell what the pseudo-labels are worth. The models that made them must not "
            f"know the labels that a fold holds back.{reasons}\nRank again with models of one fold only, several "
            "trainers or seeds of it: nnunet-ssl rank ... -f 0"
        )


def _not_to_label(
    case: str,
    with_labels: Mapping[str, RawCase],
    without: Mapping[str, RawCase],
    hidden: set[str],
    bad: Mapping[str, str],
) -> str | None:
    if case in bad:
        return bad[case]
    if case in with_labels and case in without:
        return f"it is in {IMAGES_FOLDER} and in {LABELED_IMAGES_FOLDER}; remove or rename one of them"
    if case in with_labels and case not in hidden:
        return "it has labels, and no fold that can be used lists it as 'unlabeled'; name the others with --cases"
    if case not in with_labels and case not in without:
        return f"its images are neither in {IMAGES_FOLDER} nor in {LABELED_IMAGES_FOLDER}; put them back, or rank again"
    return None


def _check_labeled(
    cases: Sequence[str], known: Mapping[str, RawCase], bad: Mapping[str, str], labels: Path, ending: str
) -> None:
    problems = []
    for case in cases:
        if case not in known:
            problems.append(
                CaseProblem(case, bad.get(case, f"a fold names it, but {LABELED_IMAGES_FOLDER} has no such case"))
            )
        elif not (labels / f"{case}{ending}").is_file():
            problems.append(CaseProblem(case, f"there is no {labels / f'{case}{ending}'}"))
    if problems:
        raise UserError(f"Nothing was made, because of {name_problems(problems)}")
