"""How good are the pseudo-labels of a trained model, and does its method's rule pick the good ones?

    python benchmarks/pseudo_labels.py -d 901 -c 2d_small -f 1 -tr CrossMatchTrainer_5epochs

Predicts patches of the cases whose labels the fold hides (its ``unlabeled`` list) and compares with these labels: the
cases were trained on without labels, and no validation case is looked at. The first table has, for several thresholds
τ on the confidence, how much would be learned from and how much of that is wrong. The second, for mutual learning, what
λ_wr selects and whether λ_hr is larger where the teacher is right. Patches are cut at random, without augmentation.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import where
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from nnunet_ssl.data.splits import unlabeled_list
from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.methods.mutual_reliable import MutualReliableTrainer, lesson

THRESHOLDS = (0.5, 0.85, 0.95, 0.99, 0.999)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("-f", type=int, required=True, help="a fold that hides labels")
    parser.add_argument("-tr", nargs="+", required=True, help="trainers, trained in nnUNet_results")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batches", type=int, default=60)
    args = parser.parse_args()
    confidence: list[list[object]] = []
    mutual: list[list[object]] = []
    for name in args.tr:
        trainer = get_trainer_from_args(args.d, args.c, args.f, name, args.p, False, torch.device(args.device))
        assert not trainer.label_manager.has_regions, "for classes that exclude each other"
        trainer.initialize()
        trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        trainer.network.eval()
        trainer.set_deep_supervision_enabled(False)
        counts: dict[Any, float] = defaultdict(float)
        for image, truth in patches(trainer, args.batches):
            with torch.no_grad():
                count_confidence(counts, trainer.network(image), truth)
                if isinstance(trainer, MutualReliableTrainer):
                    count_mutual(counts, trainer, image, truth)
        confidence += [[name, *row] for row in confidence_rows(counts)]
        mutual += [[name, *row] for row in mutual_rows(counts)]
    print(f"\n{where()}\n{args.c}, fold {args.f}, {args.batches} batches of hidden cases\n")
    header = ["trainer", "τ", "learned from", "of the foreground", "wrong", "wrong foreground", "of all errors"]
    print(format_table([*header, "mean confidence"], confidence, style="markdown"))
    if mutual:
        header = ["trainer", "student ← teacher", "learned", "teacher wrong there", "teacher wrong elsewhere"]
        header += ["labels differ", "teacher right where they differ", "the same, learned", "λ_hr where right", "wrong"]
        print("\n" + format_table(header, mutual, style="markdown"))


def patches(trainer: Any, batches: int) -> Any:
    """Batches of the hidden cases: images (B, C, *spatial) and labels (B, *spatial), the same in each run."""
    folder = Path(trainer.preprocessed_dataset_folder_base)
    hides = unlabeled_list(folder / "splits_final.json", trainer.fold)
    truth = {path.name for path in (folder / "gt_segmentations").iterdir()}
    ending = trainer.dataset_json["file_ending"]
    hidden = [case for case in hides if f"{case}{ending}" in truth]
    assert hidden, f"fold {trainer.fold} hides no labels"
    patch = trainer.configuration_manager.patch_size
    loader = nnUNetDataLoader(
        trainer.dataset_class(trainer.preprocessed_dataset_folder, hidden),
        trainer.configuration_manager.batch_size,
        patch,
        patch,
        trainer.label_manager,
        transforms=trainer.get_validation_transforms(None),
    )
    np.random.seed(0)
    for _ in range(batches):
        batch = next(loader)
        yield batch["data"].to(trainer.device), batch["target"][:, 0].long().to(trainer.device)


def count_confidence(counts: dict[Any, float], logits: Tensor, truth: Tensor) -> None:
    """Add what is learned from at each threshold, and what of it is wrong."""
    confidence, label = torch.softmax(logits.float(), 1).max(1)
    wrong, foreground = label != truth, label > 0
    counts["voxels"] += label.numel()
    counts["foreground"] += float(foreground.sum())
    counts["errors"] += float(wrong.sum())
    for threshold in THRESHOLDS:
        kept = confidence >= threshold
        counts["kept", threshold] += float(kept.sum())
        counts["kept foreground", threshold] += float((kept & foreground).sum())
        counts["wrong", threshold] += float((kept & wrong).sum())
        counts["wrong foreground", threshold] += float((kept & wrong & foreground).sum())
        counts["confidence", threshold] += float(confidence[kept].double().sum())


def confidence_rows(counts: dict[Any, float]) -> list[list[object]]:
    """The first table's rows of one trainer."""
    rows: list[list[object]] = []
    for threshold in THRESHOLDS:
        kept = counts["kept", threshold]
        shares = [
            kept / counts["voxels"],
            counts["kept foreground", threshold] / max(counts["foreground"], 1),
            counts["wrong", threshold] / max(kept, 1),
            counts["wrong foreground", threshold] / max(counts["kept foreground", threshold], 1),
            counts["wrong", threshold] / max(counts["errors"], 1),
        ]
        mean = counts["confidence", threshold] / max(kept, 1)
        rows.append([threshold, *(f"{100 * share:.1f} %" for share in shares), f"{mean:.3f}"])
    return rows


def count_mutual(counts: dict[Any, float], trainer: MutualReliableTrainer, image: Tensor, truth: Tensor) -> None:
    """Add what each decoder would learn from the other."""
    streams = {name.removeprefix("u_"): one for name, one in trainer.streams().items() if name.startswith("u_")}
    outputs = trainer.training_network({"u": image}, streams, {})
    lessons = {}
    for name, output in outputs.items():
        assert output.features is not None
        lessons[name] = lesson(output.full_resolution, output.features, regions=False)
    for student, teacher in ((i, j) for i in lessons for j in lessons if i != j):
        learner, one = lessons[student], lessons[teacher]
        certain = (learner.entropy > one.entropy)[:, 0]
        label, reliable = one.label[:, 0], one.reliability[:, 0].double()
        right, differ = label == truth, label != learner.label[:, 0]
        for key, value in {
            "learned": certain,
            "learned wrong": certain & ~right,
            "voxels": torch.ones_like(certain),
            "wrong": ~right,
            "differ": differ,
            "differ right": differ & right,
            "learned differ": certain & differ,
            "learned differ right": certain & differ & right,
            "learned right": certain & right,
            "reliability right": reliable[certain & right],
            "reliability wrong": reliable[certain & ~right],
        }.items():
            counts[f"{student} ← {teacher}", key] += float(value.sum())


def mutual_rows(counts: dict[Any, float]) -> list[list[object]]:
    """The second table's rows of one trainer."""
    rows: list[list[object]] = []
    for pair in dict.fromkeys(key[0] for key in counts if isinstance(key, tuple) and "←" in str(key[0])):
        one = {key[1]: value for key, value in counts.items() if key[0] == pair}
        shares = [
            one["learned"] / one["voxels"],
            one["learned wrong"] / max(one["learned"], 1),
            (one["wrong"] - one["learned wrong"]) / max(one["voxels"] - one["learned"], 1),
            one["differ"] / one["voxels"],
            one["differ right"] / max(one["differ"], 1),
            one["learned differ right"] / max(one["learned differ"], 1),
        ]
        reliable = [one[f"reliability {which}"] / max(one[f"learned {which}"], 1) for which in ("right", "wrong")]
        rows.append([pair, *(f"{100 * share:.2f} %" for share in shares), *(f"{value:.3f}" for value in reliable)])
    return rows


if __name__ == "__main__":
    main()
