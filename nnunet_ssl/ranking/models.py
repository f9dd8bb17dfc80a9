"""The models that rank cases: where they are, whether they go together, and what they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.nnunet_files import read_dataset_json, read_plans
from nnunet_ssl.data.queue import Model
from nnunet_ssl.data.records import IMAGE_KEYS
from nnunet_ssl.data.splits import Fold
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import sha256_of
from nnunet_ssl.networks.architectures import check_architecture
from nnunet_ssl.text import shorten, some_of
from nnunet_ssl.trainer_lookup import model_name

_MEND = "nnU-Net writes it when a training starts: train again, or copy it from where the model came from."
# What preprocessing and the way back read of plans, and of a configuration; all models get one preprocessed image.
_OF_PLANS = (
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
    "foreground_intensity_properties_per_channel",
    "label_manager",
)
_OF_CONFIGURATION = (
    *IMAGE_KEYS,
    "resampling_fn_probabilities",
    "resampling_fn_probabilities_kwargs",
)
_OF_DATASET = ("labels", "regions_class_order", "channel_names", "modality", "file_ending")


@dataclass(frozen=True)
class Wanted:
    """Which models.

    Attributes:
        results: the dataset's folder in nnUNet_results.
        trainers: their names.
        plans: their name.
        configuration: such as ``3d_fullres``.
        folds: numbers, or "all".
        checkpoint: name of the file in a fold's folder.
    """

    results: Path
    trainers: Sequence[str]
    plans: str
    configuration: str
    folds: Sequence[int | str]
    checkpoint: str

    def folder(self, trainer: str) -> Path:
        """Of a trainer's models."""
        return self.results / model_name(trainer, self.plans, self.configuration)

    def file(self, trainer: str, fold: int | str) -> Path:
        """A model's checkpoint."""
        return self.folder(trainer) / f"fold_{fold}" / self.checkpoint


def check_there(wanted: Wanted) -> None:
    """Whether all checkpoints are there.

    Raises:
        UserError: they are not; the text lists those that are missing and what there is.
    """
    files = [wanted.file(trainer, fold) for trainer in wanted.trainers for fold in wanted.folds]
    missing = [str(file) for file in files if not file.is_file()]
    if not missing:
        return
    there = [
        f"{folder.parent.name.split('__')[0]} {folder.name} "
        f"({', '.join(sorted(one.name for one in folder.glob('checkpoint_*.pth'))) or 'no checkpoint'})"
        for folder in sorted(wanted.results.glob(f"*__{wanted.plans}__{wanted.configuration}/fold_*"))
    ]
    others = sorted(
        f"-tr {name[0]} -p {name[1]} -c {name[2]}"
        for folder in wanted.results.glob("*__*__*")
        if len(name := folder.name.split("__")) == 3
    )
    found = (
        f"Of these plans and this configuration there are: {some_of(there, 20)}" if there else "Of these there is none"
    )
    if not there and others:
        found += f". Trained are: {some_of(others)}"
    raise UserError(
        f"{len(missing)} of {len(files)} checkpoints are not there: {some_of(missing, 5)}. {found}. Choose with -tr, "
        "-f, -p, -c and -chk, or finish the trainings."
    )


def check_alike(wanted: Wanted, dataset_json: dict[str, Any]) -> None:
    """Whether all models can be given the same preprocessed images, and their predictions be averaged.

    Args:
        wanted: which models.
        dataset_json: of the dataset as it is now.

    Raises:
        UserError: they cannot; the text names what differs. Or plans name anything but layers.
    """
    described = {"the dataset": _part(dataset_json, _OF_DATASET)}
    prepared = {}
    for trainer in wanted.trainers:
        folder = wanted.folder(trainer)
        plans = read_plans(folder / "plans.json", otherwise=_MEND)
        described[trainer] = _part(read_dataset_json(folder / "dataset.json", otherwise=_MEND), _OF_DATASET)
        if wanted.configuration not in plans["configurations"]:
            raise UserError(f"{folder / 'plans.json'} has no configuration {wanted.configuration}. {_MEND}")
        configuration = PlansManager(plans).get_configuration(wanted.configuration)
        check_architecture(configuration)
        if configuration.previous_stage_name is not None:
            raise UserError(
                f"{wanted.configuration} refines what {configuration.previous_stage_name} predicts, and cannot be "
                f"ranked. Rank with {configuration.previous_stage_name} or 3d_fullres."
            )
        prepared[trainer] = {**_part(plans, _OF_PLANS), **_part(configuration.configuration, _OF_CONFIGURATION)}
    for what, of_each in (("dataset.json", described), ("plans.json", prepared)):
        (first, expected), *others = of_each.items()
        for name, found in others:
            for key, value in found.items():
                if not _same(value, expected[key]):
                    raise UserError(
                        f"The models do not go together: {key!r} is {shorten(expected[key], 200)} for {first} and "
                        f"{shorten(value, 200)} for {name}, by {wanted.folder(name) / what}. Rank with models of the "
                        "same plans and labels."
                    )


def _part(content: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    part = {key: content.get(key) for key in keys}
    if isinstance(labels := part.get("labels"), dict):
        # No output of a network: a dataset may have it where the one that self-training has made it from has not.
        part["labels"] = {name: value for name, value in labels.items() if name != "ignore"}
    return part


def _same(one: Any, other: Any) -> bool:
    """Whether two entries are equal, also in their order, which is that of the networks' outputs."""
    return one == other and (not isinstance(one, dict) or list(one) == list(other))


def describe(wanted: Wanted, splits: Sequence[Fold], labeled: Sequence[str]) -> list[Model]:
    """All models, trainer by trainer, with the cases that they know.

    Args:
        wanted: which models.
        splits: the folds.
        labeled: all labeled cases, on which fold "all" is trained.

    Raises:
        UserError: there is no such fold, or a checkpoint cannot be read.
    """
    models = []
    for trainer in wanted.trainers:
        for fold in wanted.folds:
            lists = _lists(fold, splits, labeled)
            file = wanted.file(trainer, fold)
            models.append(
                Model(
                    trainer=trainer,
                    plans=wanted.plans,
                    configuration=wanted.configuration,
                    fold=fold,
                    checkpoint=wanted.checkpoint,
                    sha256=sha256_of(file),
                    trained_on=tuple(lists["train"]),
                    validated_on=tuple(lists["val"]),
                )
            )
    return models


def _lists(fold: int | str, splits: Sequence[Fold], labeled: Sequence[str]) -> Fold:
    if fold == "all":
        return {"train": list(labeled), "val": []}
    if int(fold) >= len(splits):
        raise UserError(
            f"splits_final.json has {len(splits)} fold(s) and no fold {fold}, so nothing tells what the models of fold "
            f"{fold} were trained on. Choose other folds with -f, or put back the splits_final.json of the training."
        )
    return splits[int(fold)]
