"""Make a dataset with few labels from one with many: the tutorial on active learning starts from it.

    python benchmarks/few_labels.py nnUNet_raw/Dataset004_Hippocampus --as Dataset952_FewLabels --person person

SOURCE is task 4 of the Medical Segmentation Decathlon, as nnUNetv2_convert_MSD_dataset writes it. The new dataset, next
to it, has 4 labeled cases for training, 12 for validation, and 16 cases without labels in imagesUn. The labels of these
16 go to the folder --person: they play the person who will label them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_ssl.files import write_text

LABELED = (130, 221, 337, 359)
VALIDATION = (7, 8, 14, 20, 23, 46, 68, 88, 92, 108, 146, 149)
UNLABELED = (11, 44, 74, 97, 109, 133, 141, 171, 175, 204, 230, 251, 309, 329, 332, 356)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the dataset with many labels")
    parser.add_argument("--as", dest="name", required=True, metavar="NAME", help="name of the new dataset")
    parser.add_argument("--person", type=Path, required=True, metavar="FOLDER", help="gets the hidden labels")
    args = parser.parse_args()
    labeled, validation, unlabeled = (
        [f"hippocampus_{number:03d}" for number in numbers] for numbers in (LABELED, VALIDATION, UNLABELED)
    )
    target = args.source.parent / args.name
    make_dataset(args.source, target, {"train": labeled, "val": validation, "unlabeled": unlabeled})
    copy_files(args.source / "labelsTr", args.person, [f"{case}.nii.gz" for case in unlabeled])
    print(f"{target}: {len(labeled)} labeled, {len(validation)} for validation, {len(unlabeled)} unlabeled")
    print(f"{args.person}: the labels of the unlabeled ones")


def make_dataset(source: Path, target: Path, fold: Mapping[str, Sequence[str]], *, folds: int = 1) -> None:
    """Copy cases of one dataset into a new one, those that the fold hides without labels.

    Args:
        source: in nnUNet_raw, all cases with labels.
        target: the new folder; files that are there stay.
        fold: its cases to train on, to validate and, without labels, for imagesUn ("train", "val", "unlabeled").
        folds: how many folds with these same cases splits_final.json gets.
    """
    description = json.loads((source / "dataset.json").read_text())
    ending, labeled = description["file_ending"], [*fold["train"], *fold["val"]]
    copy_files(source / "labelsTr", target / "labelsTr", [f"{case}{ending}" for case in labeled])
    for place, cases in (("imagesTr", labeled), ("imagesUn", fold["unlabeled"])):
        copy_files(source / "imagesTr", target / place, [f"{case}_????{ending}" for case in cases])
    write_text(target / "dataset.json", json.dumps({**description, "numTraining": len(labeled)}, indent=2))
    splits = [{"train": list(fold["train"]), "val": list(fold["val"])}] * folds
    write_text(target / "splits_final.json", json.dumps(splits, indent=2))


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of these patterns, unless they are there.

    Raises:
        SystemExit: a pattern matches nothing.
    """
    target.mkdir(parents=True, exist_ok=True)
    for pattern in patterns:
        files = sorted(source.glob(pattern))
        if not files:
            raise SystemExit(f"{source / pattern} does not exist.")
        for file in files:
            if not (target / file.name).is_file():
                shutil.copyfile(file, target / file.name)


if __name__ == "__main__":
    main()
