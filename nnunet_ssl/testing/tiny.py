"""Trainers and batches without a data set."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.data.labeled_targets import AddTargets
from nnunet_ssl.processes import environment
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch

CONFIGURATION = "tiny"
"""The configuration of :func:`tiny_plans`."""

LABELS: dict[str, dict[str, Any]] = {
    "classes": {"labels": {"background": 0, "first": 1, "second": 2}},
    "regions": {"labels": {"background": 0, "both": [1, 2], "second": 2}, "regions_class_order": [1, 2]},
    "classes and ignore": {"labels": {"background": 0, "first": 1, "second": 2, "ignore": 3}},
    "regions and ignore": {
        "labels": {"background": 0, "both": [1, 2], "second": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    },
}
"""The kinds of labels that nnU-Net has, as entries of a ``dataset.json``."""

_PATCH = {2: [24, 24], 3: [12, 16, 20]}
Make = Callable[[], SemiSupervisedTrainer]
"""Makes an initialized trainer, each time with the same weights."""


def tiny_plans(*, dim: int, labels: str = "classes", **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans with a configuration ``tiny`` of a U-Net of three levels, and a ``dataset.json``.

    Args:
        dim: 2 or 3.
        labels: one of :data:`LABELS`.
        settings: of the plans' ``semi_supervised``.
    """
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "batch_dice": True,
        "patch_size": _PATCH[dim],
        "median_image_size_in_voxels": _PATCH[dim],
        "spacing": [1.0] * dim,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": unet([4, 6, 8], dim=dim, n_conv_per_stage=[1, 1, 1]),
        "semi_supervised": settings,
    }
    intensities = {"percentile_00_5": -2.0, "percentile_99_5": 2.0, "mean": 0.0, "std": 1.0, "min": -4.0, "max": 4.0}
    plans = {
        "dataset_name": "Dataset001_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {CONFIGURATION: configuration},
    }
    dataset_json = {"channel_names": {"0": "noise"}, "numTraining": 2, "file_ending": ".nii.gz", **LABELS[labels]}
    return plans, dataset_json


def unet(features: list[int], *, dim: int = 3, name: str = "PlainConvUNet", **arguments: Any) -> dict[str, Any]:
    """The plans' entry for a U-Net with one convolution per stage of the decoder; ``arguments`` are the rest."""
    stages = len(features)
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": features,
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": [[3] * dim] * stages,
            "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
            **arguments,
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


@contextmanager
def tiny_trainers(
    trainer_class: type[SemiSupervisedTrainer], *, dim: int, labels: str = "classes", **settings: Any
) -> Iterator[Make]:
    """Gives a function that makes trainers of :func:`tiny_plans`; their folders are gone afterwards.

    Args:
        trainer_class: the method.
        dim: 2 or 3.
        labels: one of :data:`LABELS`.
        settings: of the plans' ``semi_supervised``.
    """

    def make() -> SemiSupervisedTrainer:
        plans, dataset_json = tiny_plans(dim=dim, labels=labels, **settings)
        return initialized(trainer_class, plans, CONFIGURATION, dataset_json)

    with tempfile.TemporaryDirectory() as folder:
        # nnU-Net looks how the preprocessed cases are stored.
        cases = Path(folder) / "preprocessed" / "Dataset001_Tiny" / f"nnUNetPlans_{CONFIGURATION}"
        cases.mkdir(parents=True)
        (cases / "none.b2nd").touch()
        folders = {f"nnUNet_{name}": str(Path(folder) / name) for name in ("raw", "preprocessed", "results")}
        with environment(**folders, nnUNet_wandb_enabled="0"):
            yield make


def initialized(
    trainer_class: type[SemiSupervisedTrainer],
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
) -> SemiSupervisedTrainer:
    """A trainer on the CPU with its network, in training mode; the same weights each time. Its folders have to be set.

    Args:
        trainer_class: the method.
        plans: as in the plans file.
        configuration: one of theirs.
        dataset_json: as in the file.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        made = trainer_class({**plans, "continue_training": False}, configuration, 0, dataset_json, torch.device("cpu"))
        torch.manual_seed(0)
        made.initialize()
    made.network.train()
    return made


def make_batches(
    trainer: SemiSupervisedTrainer, u: int = 3, seed: int = 0
) -> tuple[LabeledBatch, UnlabeledBatch, dict[str, Any]]:
    """A labeled batch of two samples and an unlabeled one, of noise; ``train_step`` gets the latter in every step.

    Args:
        trainer: an initialized one; what its method asks for of views and targets is there.
        u: U, unlabeled samples.
        seed: of the noise.

    Returns:
        Both batches as the method gets them, and the labeled one as nnU-Net's loader gives it to ``train_step``.
    """
    generator = torch.Generator().manual_seed(seed)
    np.random.seed(seed)
    patch = tuple(trainer.configuration_manager.patch_size)
    views, deep_supervision = trainer.unlabeled_views(), trainer.enable_deep_supervision
    channels = trainer.num_input_channels
    targets = _targets(trainer, generator)
    image = torch.randn(2, channels, *patch, generator=generator)
    batch = AddTargets(trainer.extra_targets)(data=image, target=targets, keys=["l0", "l1"])

    def views_of_noise() -> Tensor:
        return torch.randn(u, channels, *patch, generator=generator)

    boxes = [views.cutmix.draw(u, patch) for _ in range(views.strong)] if views.cutmix is not None else []
    unlabeled = {
        "weak": views_of_noise(),
        "strong": [views_of_noise() for _ in range(views.strong)],
        "boxes": [torch.from_numpy(one) for one in boxes],
        "partner": (torch.arange(u) + 1) % u,
        "keys": [f"u{i}" for i in range(u)],
    }
    if views.augmented:
        unlabeled["augmented"] = views_of_noise()
    if views.weak_labeled:
        batch["target"] = [*targets, torch.randn(2, channels, *patch, generator=generator)]
    trainer.dataloader_unlabeled = itertools.repeat(unlabeled)
    given = {**batch, "target": batch["target"] if deep_supervision or views.weak_labeled else targets[0]}
    labeled = LabeledBatch.from_loader(
        given, trainer.device, deep_supervision=deep_supervision, weak=views.weak_labeled
    )
    return labeled, UnlabeledBatch.from_loader(unlabeled, trainer.device), given


def _targets(trainer: SemiSupervisedTrainer, generator: torch.Generator) -> list[Tensor]:
    """The labels of all resolutions, in blocks of four voxels."""
    patch, labels = tuple(trainer.configuration_manager.patch_size), trainer.label_manager
    highest = 3 + labels.has_ignore_label
    target = torch.randint(0, highest, (2, 1, *[n // 4 for n in patch]), generator=generator).float()
    target = torch.nn.functional.interpolate(target, size=patch, mode="nearest")
    if labels.has_regions:
        channels = [(target == 1) | (target == 2), target == 2]
        target = torch.cat(channels + ([target == 3] if labels.has_ignore_label else []), 1).float()
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
    return [torch.nn.functional.interpolate(target, scale_factor=list(map(float, scale))) for scale in scales]
