"""Dice and HD95 of finished trainings on their fold's validation cases.

    python benchmarks/validation_table.py -d 901 -f 1 nnUNetTrainer_5epochs/2d_small CrossMatchTrainer_5epochs/2d_small

Each training is TRAINER/CONFIGURATION. The predictions are those that nnU-Net's validation wrote for the final
checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_ssl.evaluation.metrics import evaluate_folder
from nnunet_ssl.evaluation.tables import format_table


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument("trainings", nargs="+", metavar="TRAINER/CONFIGURATION")
    args = parser.parse_args()
    dataset = maybe_convert_to_dataset_name(args.d)
    preprocessed = Path(str(nnUNet_preprocessed)) / dataset
    description = load_json(str(preprocessed / "dataset.json"))
    labels = {name: value for name, value in description["labels"].items() if name not in ("background", "ignore")}
    rows = []
    for training in args.trainings:
        trainer, configuration = training.split("/")
        results = Path(str(nnUNet_results)) / dataset / f"{trainer}__{args.p}__{configuration}" / f"fold_{args.f}"
        cases = evaluate_folder(
            results / "validation",
            preprocessed / "gt_segmentations",
            labels=labels,
            file_ending=description["file_ending"],
            ignore_label=description["labels"].get("ignore"),
        )
        for structure in labels:
            dice = [case.metrics[structure].dice for case in cases]
            hd95 = [case.metrics[structure].hd95 for case in cases]
            found = [distance for distance in hd95 if distance == distance]
            row = [training, structure, statistics.fmean(dice), statistics.median(dice), min(dice)]
            row += [f"{statistics.fmean(found):.2f}", f"{statistics.median(found):.2f}"] if found else ["-", "-"]
            rows.append([*row, len(hd95) - len(found)])
    header = ["training", "structure", "Dice, mean", "median", "worst case", "HD95 (mm), mean", "median", "missing"]
    print(format_table(header, rows, markdown=True))


if __name__ == "__main__":
    main()
