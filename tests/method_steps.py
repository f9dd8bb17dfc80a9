"""Trainers of every method on the tiny datasets, with batches made by hand."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from nnunet_ssl.data.labeled_targets import AddTargets
from nnunet_ssl.data.signed_distance import signed_distance_map
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.methods.mutual_reliable import MutualReliableTrainer
from nnunet_ssl.methods.simcvd import SimCVDTrainer
from nnunet_ssl.networks.streams import StreamOutput
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch

TRAINERS = (CrossMatchTrainer, MutualReliableTrainer, SimCVDTrainer)


def make_trainer(
    method, planned, monkeypatch, tmp_path, *, classes=2, regions=False, ignore=False, residual=False, **settings
) -> SemiSupervisedTrainer:
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(name, planned.environment[name])
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    plans = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    tiny = plans["configurations"]["tiny"]
    tiny["semi_supervised"] = settings
    if residual:
        tiny["architecture"]["network_class_name"] = (
            "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        )
        arch = tiny["architecture"]["arch_kwargs"]
        arch["n_blocks_per_stage"] = arch.pop("n_conv_per_stage")
    dataset_json = json.loads((planned.preprocessed / "dataset.json").read_text())
    if classes != 2:
        dataset_json["labels"] = {"background": 0} | {f"class {number}": number for number in range(1, classes + 1)}
    if regions:
        dataset_json["labels"] = {"background": 0, "both": [1, 2], "second": 2}
        dataset_json["regions_class_order"] = [1, 2]
    if ignore:
        dataset_json["labels"]["ignore"] = 3
    trainer = method(plans, "tiny", 0, dataset_json, torch.device("cpu"))
    torch.manual_seed(0)
    trainer.initialize()
    trainer.network.train()
    return trainer


def make_short(method, planned, folder, epochs=50, steps=4, **settings) -> SemiSupervisedTrainer:
    """A trainer of short epochs that writes a checkpoint after each, into a folder."""
    trainer = make_trainer(method, planned, pytest.MonkeyPatch(), folder, **settings)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, steps, 1
    trainer.save_every = 1
    return trainer


def make_batches(trainer, u=3, seed=0) -> tuple[LabeledBatch, UnlabeledBatch, dict]:
    """A labeled and an unlabeled batch, and the labeled one as nnU-Net's loader gives it to ``train_step``."""
    generator = torch.Generator().manual_seed(seed)
    np.random.seed(seed)
    patch = tuple(trainer.configuration_manager.patch_size)
    labels = trainer.label_manager
    highest = 3 + labels.has_ignore_label
    target = torch.randint(0, highest, (2, 1, *[n // 4 for n in patch]), generator=generator).float()
    target = torch.nn.functional.interpolate(target, size=patch, mode="nearest")
    if labels.has_regions:
        channels = [(target == 1) | (target == 2), target == 2]
        target = torch.cat(channels + ([target == 3] if labels.has_ignore_label else []), 1).float()
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
    targets = [torch.nn.functional.interpolate(target, scale_factor=list(map(float, s))) for s in scales]
    image = torch.randn(2, 1, *patch, generator=generator)
    batch = AddTargets(trainer.extra_targets)(data=image, target=targets, keys=["l0", "l1"])
    views = trainer.unlabeled_views()
    unlabeled = {
        "weak": torch.randn(u, 1, *patch, generator=generator),
        "strong": [torch.randn(u, 1, *patch, generator=generator) for _ in range(views.strong)],
        "boxes": [torch.from_numpy(views.cutmix.draw(u, patch)) for _ in range(views.strong)],
        "partner": (torch.arange(u) + 1) % u,
        "keys": [f"u{i}" for i in range(u)],
    }
    trainer.dataloader_unlabeled = itertools.repeat(unlabeled)
    labeled = LabeledBatch(
        image, targets if trainer.enable_deep_supervision else targets[0], batch["keys"], batch["extra"]
    )
    return labeled, UnlabeledBatch(**unlabeled), batch


def distance_maps(trainer, target: torch.Tensor) -> torch.Tensor:
    """Signed distance maps of all structures in segmentations (B, 1, *spatial), or regions (B, R, *spatial)."""
    labels = trainer.label_manager
    spacing = trainer.configuration_manager.spacing

    def maps(sample: torch.Tensor) -> torch.Tensor:
        masks = sample[: labels.num_segmentation_heads] > 0 if labels.has_regions else [
            sample[0] == label for label in labels.foreground_labels
        ]  # fmt: skip
        return torch.stack([torch.from_numpy(signed_distance_map(mask.numpy(), spacing)) for mask in masks])

    return torch.stack([maps(sample) for sample in target])


class Given(dict):
    """Outputs of streams that were not run, for the loss terms alone."""

    def peek(self, name: str) -> StreamOutput:
        return self[name].detach()


def summed_terms(trainer, outputs, labeled, unlabeled) -> dict[str, torch.Tensor]:
    """The terms, their parts added up."""
    terms: dict[str, torch.Tensor] = {}
    for part in trainer.loss_terms(outputs, labeled, unlabeled, trainer.prepare(labeled, unlabeled)):
        for name, value in part.items():
            terms[name] = terms.get(name, 0) + value
    return terms


def gradients_step(trainer, labeled, unlabeled, weights) -> dict[str, torch.Tensor]:
    """Fill the gradients as a step does; returns the terms."""
    return trainer.step_gradients(labeled, unlabeled, trainer.prepare(labeled, unlabeled), weights)


def images_of(trainer, labeled, unlabeled) -> dict[str, torch.Tensor]:
    return trainer.images(labeled, unlabeled, trainer.prepare(labeled, unlabeled))


def terms_of(trainer, outputs, labeled, unlabeled):
    return trainer.loss_terms(outputs, labeled, unlabeled, trainer.prepare(labeled, unlabeled))
