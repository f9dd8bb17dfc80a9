"""``nnunet-ssl overlay``: pictures of predictions and reference where they disagree most."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from nnunet_ssl.cli.lookup import dataset_folder
from nnunet_ssl.cli.prediction_arguments import (
    add_label_options,
    add_processes_option,
    make_folder,
    named_folders,
    processes,
    segmentations_of,
)
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import some_of

HELP = "pictures of predictions against the reference, in the slice where they disagree most"

_EXPLANATION = """\
Example:

  nnunet-ssl overlay -d 901 -o pictures nnU-Net=predictions/a UniMatch=predictions/b

Draws a PNG per case: the image, the reference, and each prediction with the reference dotted; the slice, along the
image's first axis, is the one with most voxels in which predictions and reference differ.

Exit code 1 if a case could not be drawn.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl overlay``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER", help="predictions")
    parser.add_argument(
        "-g",
        type=Path,
        metavar="REFERENCES",
        help="reference segmentations (default: labelsTr or labelsTs of -d, where the cases are)",
    )
    parser.add_argument(
        "-i", type=Path, metavar="IMAGES", help="images (default: imagesTr or imagesTs of -d, where the cases are)"
    )
    parser.add_argument("-ch", type=int, default=0, metavar="CHANNEL", help="channel to draw (default: 0)")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="folder for the pictures")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--cases", nargs="+", metavar="CASE", help="draw these cases")
    chosen.add_argument(
        "--worst", type=int, default=5, metavar="N", help="draw the N cases with the lowest Dice (default: 5)"
    )
    add_processes_option(parser)
    add_label_options(parser)


def run(args: argparse.Namespace) -> int:
    """Draw and print what was drawn."""
    from nnunet_ssl.data.image_checks import BadImageError
    from nnunet_ssl.evaluation.folders import evaluate_folder, hardest_cases
    from nnunet_ssl.evaluation.pictures import draw_cases

    folders = _one_folder_each(args.folders)
    if args.worst < 1:
        raise UserError(f"--worst is {args.worst}; give 1 or more.")
    segmentations = segmentations_of(args, list(folders.values()))
    if not args.d and not (args.g and args.i):
        raise UserError("Give the folders of references and images with -g and -i, or the dataset with -d.")
    held = [set(segmentations.cases(folder)) for folder in folders.values()]
    common = set.intersection(*held)
    references = args.g or _folder_with(common, segmentations.file_ending, args.d, "labelsTr", "-g")
    images = args.i or _folder_with(common, f"_0000{segmentations.file_ending}", args.d, "imagesTr", "-i")

    workers = processes(args.np, len(common) * len(folders))
    make_folder(args.o)
    others = set.union(*held) - common
    if others and common and not args.cases:
        print(f"Left out, because not all folders have them: {some_of(sorted(others))}")
    problems: dict[str, str] = {}
    if args.cases:
        cases = list(dict.fromkeys(args.cases))
    else:
        results = [evaluate_folder(one, references, segmentations, num_processes=workers) for one in folders.values()]
        for result in results:
            problems.update(result.failed)
        cases = [case for case in hardest_cases(results) if case in common and case not in problems][: args.worst]
    for case in cases:
        if case not in common:
            problems[case] = f"not every folder has {case}{segmentations.file_ending}"
            continue
        picture = args.o / f"{case}.png"
        try:
            draw_cases(picture, {case: case}, images, references, folders, segmentations, channel=args.ch)
        except BadImageError as error:
            problems[case] = str(error)
        else:
            print(picture)
    for case, reason in problems.items():
        print(f"{case} was not drawn: {reason}")
    if not common:
        raise UserError(f"There is no case that all of {', '.join(map(str, folders.values()))} have.")
    return 1 if problems else 0


def _folder_with(cases: Collection[str], ending: str, dataset: str, name: str, option: str) -> Path:
    """A folder of a dataset for training cases, or its like for test cases, whichever has files of more cases.

    Args:
        cases: that were predicted.
        ending: of their files there.
        dataset: its number or name.
        name: of the folder for training cases, such as labelsTr.
        option: names a folder instead.

    Raises:
        UserError: neither has a file of any case.
    """
    train = dataset_folder(dataset, name) / name
    folders = {train: 0, train.with_name(f"{name.removesuffix('Tr')}Ts"): 0}
    for folder in folders:
        folders[folder] = sum((folder / f"{case}{ending}").is_file() for case in cases)
    if cases and not any(folders.values()):
        wanted = f"{min(cases)}{ending}"
        raise UserError(f"There is no {wanted} in {' or '.join(map(str, folders))}. Name the folder with {option}.")
    return max(folders, key=lambda folder: folders[folder])


def _one_folder_each(arguments: Sequence[str]) -> dict[str, Path]:
    named = named_folders(arguments, "NAME=FOLDER")
    twice = [name for name, paths in named.items() if len(paths) > 1]
    if twice:
        raise UserError(f"{', '.join(twice)} has several folders; each picture shows one prediction of a name.")
    return {name: paths[0] for name, paths in named.items()}
