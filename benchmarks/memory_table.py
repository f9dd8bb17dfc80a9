"""Memory of a training step of every method on a large plan, computed from the sizes of its tensors, on any machine.

    python benchmarks/memory_table.py

The plan: patches of 128x128x128, batches of 2 labeled and 2 unlabeled ones, the plain U-Net of 6 stages with 32 to 320
features, 2 structures. Nothing is allocated or measured.
"""

from __future__ import annotations

from time import process_time
from typing import Any

from common import where
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.memory import step_bytes, trainer_of_plans
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.methods.mutual_reliable import MutualReliableTrainer
from nnunet_ssl.methods.simcvd import SimCVDTrainer

PATCH, BATCH, FEATURES = [128, 128, 128], 2, [32, 64, 128, 256, 320, 320]
DATASET_JSON = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "first": 1, "second": 2}}


def plans() -> PlansManager:
    """nnU-Net's plans for such patches."""
    stages = len(FEATURES)
    architecture: dict[str, Any] = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": FEATURES,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "patch_size": PATCH,
        "batch_size": BATCH,
        "spacing": [1.0, 1.0, 1.0],
        "batch_dice": False,
        "architecture": architecture,
    }
    return PlansManager(
        {
            "dataset_name": "Dataset000_Table",
            "plans_name": "nnUNetPlans",
            "label_manager": "LabelManager",
            "configurations": {"3d_fullres": configuration},
        }
    )


def main() -> None:
    """Run from the command line."""
    rows: list[list[str]] = []
    supervised: dict[bool, int] = {}
    start = process_time()
    for method in (CrossMatchTrainer, MutualReliableTrainer, SimCVDTrainer):
        trainer = trainer_of_plans(method, plans(), "3d_fullres", DATASET_JSON)
        if not rows:
            supervised = {
                mixed: step_bytes(trainer, "supervised", mixed_precision=mixed).peak for mixed in (True, False)
            }
            rows.append(["nnUNetTrainer", *_cells(supervised, supervised)])
        for mode in ("split", "stacked"):
            for checkpointing in (False, True):
                peaks = {
                    mixed: step_bytes(trainer, mode, mixed_precision=mixed, activation_checkpointing=checkpointing).peak
                    for mixed in (True, False)
                }
                name = f"{method.__name__}, {mode}" + (", checkpointing" if checkpointing else "")
                rows.append([name, *_cells(peaks, supervised)])
    size = "x".join(map(str, PATCH))
    print(f"\n{where()}\nPatches of {size}, batches of {BATCH} + {BATCH}, features {FEATURES}")
    print(f"{process_time() - start:.0f} s of CPU time\n")
    header = ["step", "mixed precision, GB", "x nnUNetTrainer", "float32, GB", "x nnUNetTrainer"]
    print(format_table(header, rows, style="markdown"))


def _cells(peaks: dict[bool, int], supervised: dict[bool, int]) -> list[str]:
    cells = []
    for mixed in (True, False):
        cells += [f"{peaks[mixed] / 1e9:.1f}", f"{peaks[mixed] / supervised[mixed]:.2f}"]
    return cells


if __name__ == "__main__":
    main()
