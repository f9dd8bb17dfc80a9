"""What ``nnunet-ssl benchmark`` and ``pilot`` have in common: where a campaign's dataset is, and the machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.cli.lookup import dataset_name, device_name, nnunet_folder
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import planning_command
from nnunet_ssl.trainer_lookup import name_trainers_folder

if TYPE_CHECKING:
    from nnunet_ssl.benchmark.arms import Arm
    from nnunet_ssl.benchmark.schedule import Machine


@dataclass(frozen=True)
class Dataset:
    """A planned dataset.

    Attributes:
        name: its full one.
        preprocessed: ``nnUNet_preprocessed/DatasetXXX_Name``.
        raw: ``nnUNet_raw/DatasetXXX_Name``, which may not exist, or None where nnUNet_raw is not set.
    """

    name: str
    preprocessed: Path
    raw: Path | None


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`choose_machine` reads."""
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="trainings at the same time, on one GPU or distributed over several; on a CPU they share the cores "
        "(default: 1)",
    )
    parser.add_argument(
        "-device", choices=("cpu", "cuda", "mps"), help="device (default: cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="use torch.compile on a CPU too, which nnU-Net itself never does"
    )


def check_numbers(**options: int | None) -> None:
    """Each option, by its name, must be 1 or more where it is given.

    Raises:
        UserError: one is not.
    """
    for option, value in options.items():
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; give 1 or more.")


def find_dataset(dataset: str, folder: Path) -> Dataset:
    """The dataset that the user named; also sets what trainings inherit from this process's environment.

    Args:
        dataset: number or name.
        folder: of the campaign.

    Raises:
        UserError: a folder of nnU-Net's is not set, or the dataset is not planned.
    """
    preprocessed = nnunet_folder("nnUNet_preprocessed", "nnU-Net stores plans and preprocessed images there.")
    raw = Path(os.environ["nnUNet_raw"]) if os.environ.get("nnUNet_raw") else None
    # Nothing is written there; nnU-Net asks for it when it is imported, and each training gets its own.
    os.environ.setdefault("nnUNet_results", str(folder / "nnUNet_results"))
    name_trainers_folder()
    name = dataset_name(dataset)
    if not (preprocessed / name / "dataset.json").is_file():
        raise UserError(f"{preprocessed / name} is not a planned dataset. Run {planning_command(dataset)}.")
    return Dataset(name, preprocessed / name, raw / name if raw else None)


def check_arms(arms: Sequence[Arm], dataset: Dataset, epochs: int) -> None:
    """Whether the arms can be trained for so many epochs with what the dataset has.

    Raises:
        UserError: a warm start has no epoch, or self-training no images to rank.
    """
    from nnunet_ssl.benchmark.arms import stages

    for arm in arms:
        stages(arm, epochs)
        if arm.rounds and (dataset.raw is None or not (dataset.raw / "dataset.json").is_file()):
            raise UserError(
                f"-tr {arm.name}: self-training reads images, and there is no {dataset.raw or 'nnUNet_raw'}. Set "
                "nnUNet_raw to the folder that has the dataset."
            )


def choose_machine(args: argparse.Namespace) -> Machine:
    """The machine by the options of :func:`add_machine_arguments`.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    from nnunet_ssl.benchmark.schedule import find_machine

    return find_machine(device_name(args.device), args.jobs, compiled=args.compile)
