"""What the benchmarks share: trainers without loaders, batches of the right shapes, where they ran."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2 import paths
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import nnunet_ssl
from nnunet_ssl.cli.trainers import trainers_folder
from nnunet_ssl.data.labeled_targets import AddTargets


def add_trainer_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks of a trainer share."""
    parser.add_argument("-d", required=True, help="dataset id or name, planned and preprocessed")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("-tr", default="CrossMatchTrainer", help="trainer")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda"])


def make_trainer(args: argparse.Namespace, name: str, results: Path, **settings: Any) -> nnUNetTrainer:
    """A trainer with its network and optimizer, writing to ``results``; ``settings`` go into the plans."""
    os.environ["nnUNet_results"] = str(results)
    os.environ["nnUNet_extTrainer"] = str(trainers_folder())
    # As nnUNetv2_train does: a GPU's first steps try which convolutions are the fastest.
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True
    folder = Path(str(paths.nnUNet_preprocessed)) / maybe_convert_to_dataset_name(args.d)
    plans = load_json(str(folder / f"{args.p}.json"))
    plans["continue_training"] = False
    plans["configurations"][args.c].setdefault("semi_supervised", {}).update(settings)
    dataset_json = load_json(str(folder / "dataset.json"))
    trainer = recursive_find_trainer_class_by_name(name)(plans, args.c, 0, dataset_json, torch.device(args.device))
    trainer.initialize()
    trainer.network.train()
    return trainer


def labeled_batch(trainer: nnUNetTrainer) -> dict[str, Any]:
    """Random images with a blob of every class, in the shapes of nnU-Net's loader."""
    patch = trainer.configuration_manager.patch_size
    target = torch.zeros(trainer.batch_size, 1, *patch)
    for label in trainer.label_manager.foreground_labels:
        blob = (slice(None), slice(None), *(slice(label, size // 2) for size in patch))
        target[blob] = label
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
    targets = [torch.nn.functional.interpolate(target, scale_factor=list(map(float, scale))) for scale in scales]
    image = torch.randn(trainer.batch_size, trainer.num_input_channels, *patch) + target
    batch: dict[str, Any] = {"data": image, "target": targets, "keys": ["labeled"] * trainer.batch_size}
    return AddTargets(getattr(trainer, "_labeled_targets", {}))(**batch)


def give_unlabeled_batches(trainer: Any) -> None:
    """One unlabeled batch for ever, in place of the loader: the step is measured alone."""
    u, patch = trainer.unlabeled_batch_size, trainer.configuration_manager.patch_size
    views = trainer.unlabeled_views()
    shape = (u, trainer.num_input_channels, *patch)
    batch = {
        "weak": torch.randn(shape),
        "strong": [torch.randn(shape) for _ in range(views.strong)],
        "boxes": [torch.from_numpy(views.cutmix.draw(u, patch)) for _ in range(views.strong)] if views.cutmix else [],
        "partner": (torch.arange(u) + 1) % u,
        "keys": ["unlabeled"] * u,
    }
    trainer.dataloader_unlabeled = itertools.repeat(batch)


def where() -> str:
    """Versions and hardware, for the head of a table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return (
        f"nnunet-ssl {nnunet_ssl.__version__}, nnunetv2 {version('nnunetv2')}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {device}, {torch.get_num_threads()} threads"
    )
