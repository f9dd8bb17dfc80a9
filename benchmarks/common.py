"""What the benchmarks share: plans without a dataset, trainers without loaders, batches, versions, saved costs."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2 import paths
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

import nnunet_ssl
from nnunet_ssl.cli.lookup import trainer_descriptions, trainers_folder
from nnunet_ssl.cli.methods import COSTS, measured_costs
from nnunet_ssl.data.labeled_targets import AddTargets
from nnunet_ssl.testing.tiny import unet
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.memory import unlabeled_batch
from nnunet_ssl.trainer.step_time import filled
from nnunet_ssl.trainer_lookup import find_trainer, name_trainers_folder

# The large plan that needs no dataset: nnU-Net's own for patches of 128x128x128, and two structures.
PATCH, BATCH, FEATURES = (128, 128, 128), 2, (32, 64, 128, 256, 320, 320)
DATASET_JSON = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "first": 1, "second": 2}}
WITHOUT_DATASET = "Dataset000_Benchmark"


def method_names() -> list[str]:
    """The trainers of all methods."""
    return list(trainer_descriptions(trainers_folder()))


def trainer_class(name: str) -> type[Any]:
    """A trainer, found as nnU-Net finds it."""
    name_trainers_folder()
    return find_trainer(name)


def plans_without_dataset(
    patch: Sequence[int] = PATCH, batch: int = BATCH, features: Sequence[int] = FEATURES
) -> dict[str, Any]:
    """nnU-Net's plans, configuration 3d_fullres, for the plain U-Net with ``features`` per stage."""
    stages = len(features)
    architecture = unet(list(features), n_conv_per_stage=[2] * stages, n_conv_per_stage_decoder=[2] * (stages - 1))
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "patch_size": list(patch),
        "batch_size": batch,
        "spacing": [1.0, 1.0, 1.0],
        "batch_dice": False,
        "architecture": architecture,
    }
    return {
        "dataset_name": WITHOUT_DATASET,
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {"3d_fullres": configuration},
    }


def write_plans_without_dataset(preprocessed: Path, plans: dict[str, Any]) -> None:
    """Write them into a folder that serves as nnUNet_preprocessed, with an empty file where nnU-Net looks for cases."""
    folder = preprocessed / WITHOUT_DATASET
    cases = folder / plans["configurations"]["3d_fullres"]["data_identifier"]
    cases.mkdir(parents=True)
    (cases / "none.b2nd").touch()
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))


def add_trainer_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks of a trainer share."""
    parser.add_argument("-d", required=True, help="dataset id or name, planned and preprocessed")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("-tr", nargs="+", default=method_names(), metavar="TRAINER", help="trainers (default: all)")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda"])


def make_trainer(
    args: argparse.Namespace, name: str, results: Path, *, compiled: bool | None = None, **settings: Any
) -> nnUNetTrainer:
    """A trainer with its network and optimizer, writing to ``results``.

    Args:
        args: of :func:`add_trainer_arguments`.
        name: of the trainer.
        results: serves as nnUNet_results.
        compiled: whether to use ``torch.compile``, on a CPU too; by default as nnU-Net decides.
        settings: go into the plans.
    """
    os.environ["nnUNet_results"] = str(results)
    # As nnUNetv2_train does: a GPU's first steps try which convolutions are the fastest.
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True
    folder = Path(str(paths.nnUNet_preprocessed)) / maybe_convert_to_dataset_name(args.d)
    plans = load_json(str(folder / f"{args.p}.json"))
    plans["continue_training"] = False
    plans["configurations"][args.c].setdefault("semi_supervised", {}).update(settings)
    dataset_json = load_json(str(folder / "dataset.json"))
    trainer = trainer_class(name)(plans, args.c, 0, dataset_json, torch.device(args.device))
    if compiled is not None:
        trainer._do_i_compile = lambda: compiled
    trainer.initialize()
    trainer.network.train()
    return trainer


def labeled_batch(trainer: nnUNetTrainer) -> dict[str, Any]:
    """Random images with a blob of every class, in the shapes of nnU-Net's loader, on the trainer's device."""
    patch = trainer.configuration_manager.patch_size
    target = torch.zeros(trainer.batch_size, 1, *patch)
    for label in trainer.label_manager.foreground_labels:
        blob = (slice(None), slice(None), *(slice(label, size // 2) for size in patch))
        target[blob] = label
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
    targets = [torch.nn.functional.interpolate(target, scale_factor=list(map(float, scale))) for scale in scales]
    image = torch.randn(trainer.batch_size, trainer.num_input_channels, *patch) + target
    batch: dict[str, Any] = {"data": image, "target": targets, "keys": ["labeled"] * trainer.batch_size}
    if isinstance(trainer, SemiSupervisedTrainer):
        batch = AddTargets(trainer.labeled_targets())(**batch)
        if trainer.unlabeled_views().weak_labeled:
            batch["target"] = [*batch["target"], torch.randn_like(image)]
    return _on_device(batch, trainer.device)


def give_unlabeled_batches(trainer: SemiSupervisedTrainer, count: int = 1) -> None:
    """A few unlabeled batches for ever, on the device, in place of the loader: the step is measured alone."""
    u, patch = trainer.unlabeled_batch_size, trainer.configuration_manager.patch_size
    views = trainer.unlabeled_views()

    def batch() -> dict[str, Any]:
        boxes = [torch.from_numpy(views.cutmix.draw(u, patch)) for _ in range(views.strong)] if views.cutmix else []
        partner = (torch.arange(u) + 1) % u
        return filled(unlabeled_batch(trainer)) | {"boxes": boxes, "partner": partner, "keys": ["unlabeled"] * u}

    loader: Any = itertools.cycle([_on_device(batch(), trainer.device) for _ in range(count)])
    trainer.dataloader_unlabeled = loader


def _on_device(value: Any, device: torch.device) -> Any:
    """A batch, whose tensors may be in lists, tuples and dictionaries."""
    if isinstance(value, dict):
        return {name: _on_device(one, device) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_device(one, device) for one in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def in_largest_stage(trainer: SemiSupervisedTrainer) -> SemiSupervisedTrainer:
    """Put the trainer into the stage with the most streams, of several the last, and leave it there."""
    counts: dict[str, int] = {}
    for stage in trainer.stages():
        trainer.current_stage = stage
        counts[stage] = len(trainer.streams())
    largest = max(reversed(counts), key=lambda stage: counts[stage])
    trainer.current_stage = largest
    trainer.step_gradients.begin_stage()
    # A step would go to the stage of its time.
    trainer.stage = lambda progress: largest  # type: ignore[method-assign]
    return trainer


def save_costs(kind: str, ratios: Mapping[str, Mapping[str, float]], measured: str) -> None:
    """Write the ratios that ``nnunet-ssl methods`` shows: of one run, so that they can be compared.

    Args:
        kind: ``step`` or ``memory``.
        ratios: over nnUNetTrainer's, by trainer and memory mode.
        measured: how and when.
    """
    costs = measured_costs()
    rounded = {name: {mode: round(ratio, 2) for mode, ratio in of.items()} for name, of in sorted(ratios.items())}
    costs[kind] = {"measured": measured, "ratios": rounded}
    COSTS.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")


def now(device: torch.device) -> float:
    """Seconds, after what was begun on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def resident_peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def where() -> str:
    """Versions and hardware, for the head of a table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return (
        f"nnunet-ssl {nnunet_ssl.__version__}, nnunetv2 {version('nnunetv2')}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {device}, {torch.get_num_threads()} threads"
    )
