"""Models of a dataset that self-training has made of the ranked one: they rank for the next round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_ssl.data.queue import Model
from nnunet_ssl.data.seen_labels import labels_seen, read_record
from nnunet_ssl.data.splits import Fold
from nnunet_ssl.errors import UserError


def students(models: Sequence[Model], dataset: str, source: str, *roots: Path) -> list[Model]:
    """The models with their dataset, and with all labels of the source that they have seen.

    Args:
        models: of the self-trained dataset.
        dataset: its name.
        source: name of the ranked dataset.
        roots: nnUNet_raw and nnUNet_preprocessed.

    Raises:
        UserError: the one dataset was not made from the other.
    """
    named = [replace(model, dataset=dataset) for model in models]
    return [replace(model, trained_on=tuple(sorted(labels_seen(model, source, *roots)))) for model in named]


def source_folds(folds: Sequence[int | str], dataset: str, splits: Sequence[Fold], *roots: Path) -> list[Fold]:
    """The source's folds of which folds of a self-trained dataset were made.

    Args:
        folds: of the self-trained dataset; "all" was made of none.
        dataset: its name.
        splits: of the source.
        roots: nnUNet_raw and nnUNet_preprocessed.

    Raises:
        UserError: the source has no such fold any more.
    """
    numbers = (read_record(dataset, *roots) or {}).get("folds", [])
    wanted = [numbers[int(fold)] for fold in folds if fold != "all" and int(fold) < len(numbers)]
    if gone := [number for number in wanted if number >= len(splits)]:
        raise UserError(
            f"{dataset} was made from fold {gone[0]} of a splits_final.json that had more folds than now. Put back the "
            "splits_final.json of that time."
        )
    return [splits[number] for number in wanted]
