"""What a command names, looked up: nnU-Net's folders and commands, datasets, plans and trainers.

Imports nothing heavy, so that every command can import it at its top.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import re
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.data.nnunet_files import read_plans as plans_of_file
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import did_you_mean, planning_command
from nnunet_ssl.trainer_lookup import RECOMMENDED as RECOMMENDED
from nnunet_ssl.trainer_lookup import find_trainer as find_trainer
from nnunet_ssl.trainer_lookup import model_name as model_name
from nnunet_ssl.trainer_lookup import trainer_descriptions as trainer_descriptions
from nnunet_ssl.trainer_lookup import trainers_folder as trainers_folder

if TYPE_CHECKING:
    from nnunet_ssl.data.accepting import DatasetFolders

# Folders and datasets


def nnunet_folder(variable: str, purpose: str) -> Path:
    """One of nnU-Net's folders, which has to be there; ``purpose`` says what for."""
    value = os.environ.get(variable)
    if not value:
        raise UserError(f"The environment variable {variable} is not set. {purpose}")
    if not Path(value).is_dir():
        raise UserError(f"{variable} is {value}, which is no folder. {purpose}")
    return Path(value)


def dataset_name(dataset: str) -> str:
    """The full name of a dataset that the user named by number or name."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None


def dataset_folder(dataset: str, *needed: str) -> Path:
    """The folder of a dataset in nnUNet_raw or nnUNet_preprocessed that holds what is needed.

    Args:
        dataset: number or name.
        needed: files or folders, all of which must be there.

    Raises:
        UserError: neither folder has them.
    """
    roots = [Path(os.environ[name]) for name in ("nnUNet_raw", "nnUNet_preprocessed") if os.environ.get(name)]
    if not roots:
        raise UserError("Neither nnUNet_raw nor nnUNet_preprocessed is set; nnU-Net keeps its datasets there.")
    name = dataset_name(dataset)
    for root in roots:
        if all((root / name / one).exists() for one in needed):
            return root / name
    raise UserError(f"Nowhere in {' and '.join(map(str, roots))} is there {name} with {' and '.join(needed)}.")


def dataset_folders(dataset: str, *, otherwise: str) -> DatasetFolders:
    """The folders of a dataset in nnU-Net's three; the one in nnUNet_results need not be there.

    Args:
        dataset: number or name.
        otherwise: what to do where it has no folder in nnUNet_raw or nnUNet_preprocessed.

    Raises:
        UserError: there is none.
    """
    raw = nnunet_folder("nnUNet_raw", "nnU-Net reads images and labels there.")
    preprocessed = nnunet_folder("nnUNet_preprocessed", "nnU-Net stores plans and preprocessed images there.")
    results = os.environ.get("nnUNet_results")
    name = dataset_name(dataset)

    from nnunet_ssl.data.accepting import DatasetFolders

    for folder in (raw / name, preprocessed / name):
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}. {otherwise}")
    return DatasetFolders(raw / name, preprocessed / name, Path(results) / name if results else None)


@contextlib.contextmanager
def held_dataset(preprocessed: Path) -> Iterator[None]:
    """Hold a dataset's cases and folds for this command alone.

    Args:
        preprocessed: its folder in nnUNet_preprocessed.

    Raises:
        UserError: another command holds them.
    """
    from nnunet_ssl.data.splits import lock_file
    from nnunet_ssl.files import lock

    with lock(lock_file(preprocessed), wait=False) as held:
        if not held:
            raise UserError(
                f"Another command is changing {preprocessed.name} right now (its cases or its folds). Wait until it "
                "has ended, then run this again."
            )
        yield


# Values of options


def check_fold_name(fold: str) -> None:
    """Refuse what is not a fold's name."""
    if not re.fullmatch(r"all|\d+", fold):
        raise UserError(f"-f is {fold!r}; a fold must be a number or 'all'.")


def worker_processes(asked: int | None) -> int:
    """How many worker processes -np asks for; without it, as many as nnU-Net and this machine's cores allow."""
    if asked is not None and asked < 0:
        raise UserError(f"-np is {asked}; give 0 or more.")

    from nnunet_ssl.data.worker_processes import default_workers

    return default_workers() if asked is None else asked


def device_name(asked: str | None) -> str:
    """The device that -device asks for; without it, the GPU where there is one.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    import torch

    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda: PyTorch finds no GPU. Use -device cpu.")
    return device


# Plans


def read_plans(preprocessed_dataset: Path, plans_name: str, dataset: str) -> dict[str, Any]:
    """The plans of a dataset; ``dataset`` is how the user named it."""
    file = preprocessed_dataset / f"{plans_name}.json"
    if not file.is_file():
        others = ("dataset.json", "dataset_fingerprint.json", "splits_final.json")
        found = sorted(one.stem for one in preprocessed_dataset.glob("*.json") if one.name not in others)
        raise UserError(
            f"There are no plans {file}; {listing('plans there', found)} "
            f"Choose with -p, or run {planning_command(dataset)} first."
        )
    return plans_of_file(file, otherwise=plan_again(dataset))


def plan_again(dataset: str) -> str:
    """What to do about plans or a dataset.json that are broken; ``dataset`` is how the user named it."""
    return f"Make it again with {planning_command(dataset)}."


def listing(what: str, names: list[str]) -> str:
    """What there is to choose from, for a message."""
    return f"{what}: {', '.join(names) if names else 'none'}."


# Trainers and models


def trained_model(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """The folder of a trained model.

    Raises:
        UserError: there is none; the text says which there are.
    """
    results = nnunet_folder("nnUNet_results", "nnU-Net keeps trained models there.")
    folder = results / dataset_name(dataset)
    model = folder / model_name(trainer, plans, configuration)
    if model.is_dir():
        return model
    if folder.is_dir():
        there = [one.name.split("__") for one in sorted(folder.iterdir())]
        names = [name for name in there if len(name) == 3]
        trained = [f"-tr {name[0]} -p {name[1]} -c {name[2]}" for name in names]
        meant = did_you_mean([trainer], {name[0] for name in names} - {trainer})
    else:
        trained, meant = [f"-d {one.name}" for one in sorted(results.glob("Dataset*"))], ""
    raise UserError(
        f"There is no trained model {model}.{meant} Trained are: {', '.join(trained) or 'none'}. Correct -d, -c, -p or "
        "-tr, or nnUNet_results."
    )


def import_errors(folder: Path) -> Iterator[tuple[str, str]]:
    """Modules of a folder that nnU-Net's look-up of trainers would stumble over, with the reason."""
    from nnunetv2.utilities.find_class_by_name import (
        temporarily_cleanup_imports_from_path,
        temporarily_extend_syspath,
    )

    # nnU-Net imports them too, in this way, whenever it looks for a trainer outside its own tree.
    with temporarily_extend_syspath(str(folder)), temporarily_cleanup_imports_from_path(str(folder)):
        for module in _modules([str(folder)]):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    importlib.import_module(module)
            except (Exception, SystemExit) as error:
                if not (isinstance(error, ModuleNotFoundError) and error.name == module):  # nnU-Net skips these
                    yield module, described(error)


def _modules(folders: Sequence[str], prefix: str = "") -> Iterator[str]:
    for module in pkgutil.iter_modules(folders, prefix):
        yield module.name
        if module.ispkg:
            name = module.name.removeprefix(prefix)
            yield from _modules([str(Path(folder) / name) for folder in folders], f"{module.name}.")


def described(error: BaseException) -> str:
    """An error for a message; one of ours is a message already."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


# Commands


def find_program(name: str) -> str:
    """The path of one of nnU-Net's commands.

    Raises:
        UserError: it is not there.
    """
    program = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if program is None:
        raise UserError(
            f"nnU-Net's command {name} is neither in {sysconfig.get_path('scripts')} nor on the PATH. Install nnU-Net "
            "in this environment: pip install nnunetv2"
        )
    return program
