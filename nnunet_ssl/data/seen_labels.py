"""Which labels a model has learned from, and what a self-trained dataset tells of that.

A model that was trained with a case's label knows it. If it then labels other cases, a model that is trained on those
has seen that label too, at second hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nnunet_ssl.data.nnunet_files import read_json
from nnunet_ssl.data.queue import Model
from nnunet_ssl.data.records import folder_name
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import sha256_of
from nnunet_ssl.trainer_lookup import model_name

RECORD = "self_training.json"
FORMAT_VERSION = 1
_COUNTS = re.compile(r"split has (\d+) training and (\d+) validation cases")


def read_record(dataset: str, *roots: Path) -> dict[str, Any] | None:
    """What the making of a self-trained dataset has written down; None for any other dataset.

    Args:
        dataset: its name.
        roots: nnUNet_raw and nnUNet_preprocessed; the first that has the record counts.

    Raises:
        UserError: the record is broken.
    """
    for root in roots:
        file = root / folder_name(dataset, "dataset") / RECORD
        if file.is_file():
            record = read_json(
                file,
                otherwise="Copy it from the other of nnUNet_raw and nnUNet_preprocessed, which both have it.",
                entries={"source": str, "pseudo_labeled": dict, "labels_seen": list},
            )
            if record.get("version") != FORMAT_VERSION:
                raise UserError(f"{file} was written by another version of nnunet-ssl. Use that version.")
            return record
    return None


def labels_seen(model: Model, dataset: str, *roots: Path) -> set[str]:
    """Cases of a dataset whose labels a model has learned from, itself or from the models that labeled for it.

    Args:
        model: trained on the dataset, or on one that self-training has made from it.
        dataset: the name of the source.
        roots: see :func:`read_record`.

    Raises:
        UserError: the model comes from elsewhere.
    """
    if model.dataset in (None, dataset):
        return set(model.trained_on)
    record = read_record(str(model.dataset), *roots)
    if record is None or record["source"] != dataset:
        raise UserError(
            f"{model} was trained on a dataset of which no {RECORD} says that it was made from {dataset}. So nobody "
            "knows which labels it has seen. Rank with other models."
        )
    return set(model.trained_on) - set(record["pseudo_labeled"]) | set(record["labels_seen"])


def check_model(model: Model, dataset: str, results: Path) -> None:
    """Whether a model's own folder, where it is there, fits what the queue says of it.

    Args:
        model: of a queue.
        dataset: the queue's.
        results: nnUNet_results.

    Raises:
        UserError: it was trained again since, or with other cases.
    """
    name = model_name(model.trainer, model.plans, model.configuration)
    folder = results / (model.dataset or dataset) / name / f"fold_{model.fold}"
    checkpoint = folder / model.checkpoint
    again = "Rank again: nnunet-ssl rank."
    if checkpoint.is_file() and sha256_of(checkpoint) != model.sha256:
        raise UserError(f"{checkpoint} is not the one that ranked the cases: it was trained again since. {again}")
    counts = (len(model.trained_on), len(model.validated_on))
    listed = model.dataset is None and model.fold != "all"
    if listed and (found := _counts_of_log(folder)) not in (None, counts):
        raise UserError(
            f"{folder} was trained with {found[0]} and validated with {found[1]} cases, as its log says; the queue "
            f"names {counts[0]} and {counts[1]}. The folds have changed since the training, so nobody knows which "
            "labels the model has seen. Put the folds of that time back into splits_final.json and rank again, or "
            "rank with other models."
        )


def _counts_of_log(folder: Path) -> tuple[int, int] | None:
    """Training and validation cases of the last training, as its log names them."""
    logs = sorted(folder.glob("training_log_*.txt"), key=lambda file: file.stat().st_mtime, reverse=True)
    for log in logs:
        text = log.read_text(encoding="utf-8", errors="replace")
        # A later validation writes a log too.
        if "Current learning rate" in text and (match := _COUNTS.search(text)):
            return int(match[1]), int(match[2])
    return None
