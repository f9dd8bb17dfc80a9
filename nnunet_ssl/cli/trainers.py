"""``nnunet-ssl trainers``: the folder in which nnU-Net finds the trainers."""

from __future__ import annotations

import argparse

from nnunet_ssl.cli.lookup import trainer_descriptions, trainers_folder

HELP = 'print the folder of the trainers: export nnUNet_extTrainer="$(nnunet-ssl trainers)"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl trainers``."""
    parser.add_argument("--list", action="store_true", help="also list the trainers in it")


def run(args: argparse.Namespace) -> int:
    """Print the folder in one line and, on request, the trainers in it."""
    folder = trainers_folder()
    print(folder)
    if args.list:
        for name, description in trainer_descriptions(folder).items():
            print(f"  {name}  {description}")
    return 0
