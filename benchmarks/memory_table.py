"""Memory of a training step of every method on a large plan, computed from the sizes of its tensors, on any machine.

    python benchmarks/memory_table.py

The plan: patches of 128x128x128, batches of 2 labeled and 2 unlabeled ones, the plain U-Net of 6 stages with 32 to 320
features, 2 structures. Nothing is allocated or measured.
"""

from __future__ import annotations

from time import process_time

from common import BATCH, DATASET_JSON, FEATURES, PATCH, method_names, plans_without_dataset, trainer_class, where
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.trainer.memory import step_bytes, trainer_of_plans


def main() -> None:
    """Run from the command line."""
    rows: list[list[str]] = []
    supervised: dict[bool, int] = {}
    start = process_time()
    for name in method_names():
        plans = PlansManager(plans_without_dataset())
        trainer = trainer_of_plans(trainer_class(name), plans, "3d_fullres", DATASET_JSON)
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
                step = f"{name}, {mode}" + (", checkpointing" if checkpointing else "")
                rows.append([step, *_cells(peaks, supervised)])
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
