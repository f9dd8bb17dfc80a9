"""``nnunet-ssl trainers``: the folder in which nnU-Net finds the trainers."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import nnunet_ssl
from nnunet_ssl.errors import UserError

HELP = 'print the folder of the trainers: export nnUNet_extTrainer="$(nnunet-ssl trainers)"'


def trainers_folder() -> Path:
    """The folder that ``nnUNet_extTrainer`` has to name.

    A wheel carries it inside the package; in an editable install and in a plain checkout it lies beside the package.

    Raises:
        UserError: neither place holds the trainers.
    """
    package = Path(nnunet_ssl.__file__).resolve().parent
    candidates = (package / "trainers", package.parent / "trainers")
    for folder in candidates:
        # Not just any folder called trainers: what lies beside an installed package belongs to other packages.
        if (folder / "CrossMatchTrainer.py").is_file():
            return folder
    raise UserError(
        f"no folder with the trainers; looked for {' and '.join(map(str, candidates))}. The installation is not "
        "complete: install nnunet-ssl again."
    )


def trainer_descriptions(folder: Path) -> dict[str, str]:
    """Trainer names with the first line of their modules' docstrings, read without importing anything."""
    descriptions = {}
    for module in sorted(folder.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        descriptions[module.stem] = docstring.partition("\n")[0]
    return descriptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl trainers``."""
    parser.add_argument("--list", action="store_true", help="list the trainers as well")


def run(args: argparse.Namespace) -> int:
    """Print the folder in one line and, on request, the trainers in it."""
    folder = trainers_folder()
    print(folder)
    if args.list:
        for name, description in trainer_descriptions(folder).items():
            print(f"  {name}  {description}")
    return 0
