"""Where trainings of a campaign are wrong: what they miss, what they find where nothing is, and in how many pieces.

    python benchmarks/false_positives.py -o FOLDER -f 1

FOLDER is one of ``nnunet-ssl benchmark -o``, and -f the fold among its results. For each arm and class, means over
trainings: Dice as predicted, and where of each class only the largest component of a case is kept, as nnU-Net's
postprocessing may; the share of the reference's voxels that are found; the background's voxels that are taken for the
class, as a multiple of the reference's voxels. Nothing is chosen by it: every arm is treated alike.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.paths import nnUNet_preprocessed
from numpy.typing import NDArray

from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.losses.components import largest_components

HEAD = ["arm", "trainings", "class", "Dice", "of the largest component", "found", "false positives in background"]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="folder", type=Path, required=True, help="folder of a campaign")
    parser.add_argument("-f", dest="fold", required=True, help="fold in its results")
    args = parser.parse_args()
    found: dict[tuple[str, int], list[list[float]]] = defaultdict(list)
    for validation in sorted(args.folder.glob(f"nnUNet_results/seed_*/*/*__*__*/fold_{args.fold}/validation")):
        model = validation.parents[1]
        references = Path(str(nnUNet_preprocessed)) / model.parent.name / "gt_segmentations"
        for label, values in of_training(validation, references).items():
            found[model.name.split("__")[0], label].append(values)
    if not found:
        raise SystemExit(f"{args.folder} has no validation of fold {args.fold}")
    lines = [
        [arm, len(rows), label, *(f"{value:.3f}" for value in np.mean(rows, axis=0))]
        for (arm, label), rows in found.items()
    ]
    print(format_table(HEAD, lines, style="markdown"))


def of_training(validation: Path, references: Path) -> dict[int, list[float]]:
    """Of each class: both Dice, means over cases; the share that is found and the false positives, of all voxels."""
    dice: dict[int, list[tuple[float, float]]] = defaultdict(list)
    voxels: dict[int, NDArray[np.int64]] = defaultdict(lambda: np.zeros(3, np.int64))
    for file in sorted(validation.glob("*.nii.gz")):
        predicted, reference = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (file, references / file.name)
        )
        largest = largest_components(torch.from_numpy(predicted)[None, None])[0, 0].numpy()
        for label in np.unique(reference[reference > 0]).tolist():
            here, there = predicted == label, reference == label
            dice[label].append((dice_of(here, there), dice_of(largest == label, there)))
            voxels[label] += [there.sum(), (here & there).sum(), (here & (reference == 0)).sum()]
    return {
        label: [*np.mean(pairs, axis=0), *(voxels[label][1:] / voxels[label][0])]
        for label, pairs in sorted(dice.items())
    }


def dice_of(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Of one structure that the reference has; without surface distances, which take long."""
    return float(2 * (prediction & reference).sum() / (prediction.sum() + reference.sum()))


if __name__ == "__main__":
    main()
