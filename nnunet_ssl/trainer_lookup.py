"""Trainers: the folder that ``nnUNet_extTrainer`` has to name, and what nnU-Net finds there."""

from __future__ import annotations

import ast
import contextlib
import io
import os
from pathlib import Path
from typing import Any

import nnunet_ssl
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import did_you_mean, unwrap

RECOMMENDED = "UniMatchTrainer"
"""What README says to try first: commands use it unless told otherwise, and name it in what they print."""

EXPORT = 'export nnUNet_extTrainer="$(nnunet-ssl trainers)"'


def trainers_folder() -> Path:
    """The folder that ``nnUNet_extTrainer`` has to name.

    A wheel carries it inside the package; in an editable install and in a plain checkout it lies next to the package.

    Raises:
        UserError: neither place holds the trainers.
    """
    package = Path(nnunet_ssl.__file__).resolve().parent
    candidates = (package / "trainers", package.parent / "trainers")
    for folder in candidates:
        # Not just any folder called trainers: what lies next to an installed package belongs to other packages.
        if (folder / "CrossMatchTrainer.py").is_file():
            return folder
    raise UserError(
        f"no folder with the trainers; looked for {' and '.join(map(str, candidates))}. The installation is not "
        "complete: install nnunet-ssl again."
    )


def name_trainers_folder() -> None:
    """Name this package's folder in this process's ``nnUNet_extTrainer``, after those that are named there."""
    ours = str(trainers_folder())
    folders = [one for one in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if one.strip()]
    os.environ["nnUNet_extTrainer"] = os.pathsep.join([*folders, *([] if ours in folders else [ours])])


def model_name(trainer: str, plans: str, configuration: str) -> str:
    """The folder of a trained model within its dataset's, as nnU-Net names it."""
    return f"{trainer}__{plans}__{configuration}"


def trainer_descriptions(folder: Path) -> dict[str, str]:
    """Trainer names with the first line of their modules' docstrings, read without importing anything."""
    descriptions = {}
    for module in sorted(folder.glob("[!_]*.py"), key=lambda file: file.stem):
        docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        descriptions[module.stem] = docstring.partition("\n")[0]
    return descriptions


def find_trainer(name: str) -> type[Any]:
    """The trainer's class, looked up by nnU-Net.

    Raises:
        UserError: nnU-Net does not find it; the text lists this package's trainers and says what to do.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except Exception as error:
        # This is how nnU-Net says that there is none, in many words; anything else is a reason to show.
        reason = "" if str(error).startswith("Could not find") else f" ({unwrap(f'{type(error).__name__}: {error}')})"
        raise UserError(f"nnU-Net does not find the trainer {name}{reason}.{_what_to_do(name)}") from error


def _what_to_do(name: str) -> str:
    ours = trainers_folder()
    names = [*trainer_descriptions(ours)]
    folders = [Path(part) for part in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if part.strip()]
    if not any(folder.resolve() == ours for folder in folders):
        return (
            f" nnUNet_extTrainer does not name this package's folder of trainers: {EXPORT}. The trainers there: "
            f"{', '.join(names)}."
        )
    return (
        f"{did_you_mean([name], names)} This package has {', '.join(names)}, each also with a length such as "
        "_250epochs. nnUNet_extTrainer names the folders of others."
    )
