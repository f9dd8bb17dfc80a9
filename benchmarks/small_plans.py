"""Add small plans for two CPU cores, 3d_small and 2d_small, and a fold with few labels, to a preprocessed dataset.

    python benchmarks/small_plans.py -d 901 --labeled 2

Run it after nnUNetv2_plan_and_preprocess -c 3d_fullres 2d. The plans share the preprocessed data of the configurations
they inherit from, but for 2d_coarse, which has half their resolution: nnUNetv2_preprocess -d 901 -c 2d_coarse. Beside
them come configurations that inherit from 2d_small and leave out one part of a method. The fold is fold 0 with all but
the first N labeled cases moved to its ``unlabeled`` list; its number is printed. Running it again changes nothing.
Other configurations of these names, such as the 3d_small of nnunet-ssl plan-small, are replaced.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_ssl.data.splits import read_splits, write_splits
from nnunet_ssl.files import write_text

SMALL = {
    "3d_small": ("3d_fullres", [40, 56, 64], 2, [8, 16, 32, 64]),
    "3d_medium": ("3d_fullres", [64, 80, 80], 2, [16, 32, 64, 128]),  # for memory alone: its steps take long
    "2d_small": ("2d", [80, 96], 12, [16, 32, 64, 128, 128]),
    "2d_tiny": ("2d", [80, 96], 6, [8, 16, 32, 64, 64]),  # a step takes a fifth of 2d_small's time
    "2d_coarse": ("2d", [40, 48], 6, [16, 32, 64, 128]),  # half the resolution: a step takes a tenth of 2d_small's
}
COARSER = {"2d_coarse": 2.0}  # how many times as large the voxels are
ABLATIONS = {
    "2d_small_no_dkd": {"self_distillation": 0.0},  # CrossMatch without L_dkd
    "2d_small_no_weights": {"certainty_weight": False, "similarity_weight": False},  # mutual learning, λ_wr = λ_hr = 1
    "2d_small_no_contrast": {"contrast_weight": 0.0},  # SimCVD without L_contrast
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("--labeled", type=int, default=2, help="labeled cases of the new fold")
    args = parser.parse_args()
    folder = Path(str(nnUNet_preprocessed)) / maybe_convert_to_dataset_name(args.d)
    add_plans(folder / f"{args.p}.json")
    fold = add_fold(folder / "splits_final.json", labeled=args.labeled)
    print(f"plans {', '.join([*SMALL, *ABLATIONS])}; fold {fold} has {args.labeled} labeled cases")


def add_plans(file: Path) -> None:
    """Add the small plans and the ablations to a plans file."""
    plans = load_json(str(file))
    before = copy.deepcopy(plans)
    for name, (parent, patch_size, batch_size, features) in SMALL.items():
        if parent not in plans["configurations"]:
            continue
        architecture = copy.deepcopy(plans["configurations"][parent]["architecture"])
        stages, dim = len(features), len(patch_size)
        architecture["arch_kwargs"].update(
            n_stages=stages,
            features_per_stage=features,
            kernel_sizes=[[3] * dim] * stages,
            strides=[[1] * dim] + [[2] * dim] * (stages - 1),
            n_conv_per_stage=[2] * stages,
            n_conv_per_stage_decoder=[2] * (stages - 1),
        )
        plans["configurations"][name] = {
            "inherits_from": parent,
            "patch_size": patch_size,
            "batch_size": batch_size,
            "architecture": architecture,
        }
        if name in COARSER:
            spacing = plans["configurations"][parent]["spacing"]
            plans["configurations"][name] |= {
                "data_identifier": f"{plans['plans_name']}_{name}",
                "spacing": [COARSER[name] * size for size in spacing],
                # The patches are so small that passes are faster stacked, on a CPU too.
                "semi_supervised": {"memory_mode": "stacked"},
            }
    for name, settings in ABLATIONS.items():
        if "2d_small" in plans["configurations"]:
            plans["configurations"][name] = {"inherits_from": "2d_small", "semi_supervised": settings}
    if plans != before:
        write_text(file, json.dumps(plans, indent=4) + "\n")


def add_fold(file: Path, *, labeled: int) -> int:
    """Add fold 0 with fewer labeled cases to a splits file; its number, which is 0 where none has to be taken away."""
    splits = read_splits(file)
    train = splits[0]["train"]
    if labeled == len(train):
        return 0
    if not 0 < labeled < len(train):
        raise SystemExit(f"{labeled} labeled cases: fold 0 of {file} has {len(train)}")
    unlabeled = [*train[labeled:], *splits[0].get("unlabeled", [])]
    fold = {"train": train[:labeled], "val": splits[0]["val"], "unlabeled": unlabeled}
    if fold not in splits:
        splits.append(fold)
        write_splits(file, splits)
    return splits.index(fold)


if __name__ == "__main__":
    main()
