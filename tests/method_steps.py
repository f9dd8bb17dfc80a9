"""Trainers of every method on the tiny datasets, with batches made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from nnunet_ssl.data.signed_distance import signed_distance_map
from nnunet_ssl.methods.bcp import BCPTrainer
from nnunet_ssl.methods.cps import CPSTrainer
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.methods.dtc import DTCTrainer
from nnunet_ssl.methods.mcnet import MCNetTrainer
from nnunet_ssl.methods.mean_teacher import MeanTeacherTrainer
from nnunet_ssl.methods.mutual_reliable import MutualReliableTrainer
from nnunet_ssl.methods.simcvd import SimCVDTrainer
from nnunet_ssl.methods.uamt import UAMTTrainer
from nnunet_ssl.methods.unimatch import UniMatchTrainer
from nnunet_ssl.methods.urpc import URPCTrainer
from nnunet_ssl.networks.streams import StreamOutput
from nnunet_ssl.testing import initialized
from nnunet_ssl.testing import make_batches as make_batches
from nnunet_ssl.trainer.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class Method:
    """A method's row in the table of what all tests of every method train.

    Attributes:
        trainer: its class.
        settings: with which every term counts on images of noise and a network without training, in the first step.
        halves: settings with which a half of a batch is trained as in the whole of it; for two processes.
        others: settings of more trainings, each another network or way to predict.
        split_graphs: how many graphs ``torch.compile`` makes of a step in memory mode split: with ``settings``, and
            with as many of ``others`` as there are further numbers. One of the encoder for each size of a batch, one of
            a teacher's encoder, and one for each kind of a decoder's pass.
        fused: how many compiled functions a step's losses are, and how many graphs they have where labeled and
            unlabeled batches are of two sizes.
        representative: its tests are all fast. Of the other methods a few are, see :func:`of_methods`.
    """

    trainer: type[SemiSupervisedTrainer]
    settings: dict[str, Any] = field(default_factory=dict)
    halves: dict[str, Any] = field(default_factory=dict)
    others: tuple[dict[str, Any], ...] = ()
    split_graphs: tuple[int, ...] = ()
    fused: tuple[int, int] = (0, 0)
    representative: bool = False

    @property
    def name(self) -> str:
        """Of its trainer."""
        return self.trainer.__name__


METHODS = (
    # Decoders: of labeled images, and of unlabeled ones without gradient, with dropout and without.
    # Fused: pseudo-labels, coverage, Dice.
    Method(
        CrossMatchTrainer,
        {"confidence_threshold": 0.4},
        others=({"perturbations": "sampled"},),
        split_graphs=(1 + 4, 1 + 4),
        fused=(3, 3),
        representative=True,
    ),
    # Decoders: of labeled and of unlabeled images. Fused: distances, tasks. The paper's steepness multiplies a rounding
    # of the distances by 1500, and two ways to compute a step then differ visibly.
    Method(DTCTrainer, {"steepness": 20.0}, split_graphs=(1 + 2,), fused=(2, 3)),
    # Decoders: as the next method's, with three and with two. Fused: what a decoder learns.
    Method(MCNetTrainer, others=({"decoders": 2},), split_graphs=(1 + 10, 1 + 6), fused=(1, 2)),
    # Each decoder of labeled and of unlabeled images, and all but the one that learns first once more without gradient.
    # Fused: lessons, what is learned.
    Method(
        MutualReliableTrainer,
        others=({"decoders": 3}, {"student_view": "strong"}),
        split_graphs=(1 + 6, 1 + 10),
        fused=(2, 4),
    ),
    # Decoders: of labeled and noisy images, and the teacher. Fused: distances, consistency.
    Method(
        SimCVDTrainer,
        halves={"noise": 0.0},
        others=({"predict_with": "teacher"}, {"student_view": "strong"}),
        split_graphs=(2 + 3,),
        fused=(2, 2),
        representative=True,
    ),
    # The same decoders. Fused: consistency.
    Method(MeanTeacherTrainer, halves={"noise": 0.0}, split_graphs=(2 + 3,), fused=(1, 1)),
    # Decoders: of labeled and of strong images, of unlabeled ones without gradient and with dropout. Fused: as those of
    # CrossMatch.
    Method(
        UniMatchTrainer,
        {"confidence_threshold": 0.4},
        others=({"strong_views": 1, "feature_weight": 0.0}, {"adaptive_threshold": True}),
        split_graphs=(1 + 4,),
        fused=(3, 3),
    ),
    # Copy-paste from the first step on, its weight ramped up as that of the others. Boxes of the patch's size are not
    # drawn, so halves have those of the whole. Decoder: of mixed images; nnU-Net's Dice has no gradient, so it is one
    # graph less. Fused: the loss; and the teacher's encoder and decoder, which run before the step's passes.
    Method(
        BCPTrainer,
        {"pretrain_fraction": 0.0, "ramp_length": 0.3},
        halves={"box_fraction": 1.0},
        others=({"pretrain_fraction": 0.2, "labeled_into_labeled": True}, {"predict_with": "teacher"}),
        split_graphs=(2 - 1,),
        fused=(3, 3),
    ),
    # Each network of labeled and of unlabeled images, and the second one's decoder once more without gradient.
    # Fused: pseudo-labels, cross-entropy.
    Method(CPSTrainer, split_graphs=(2 + 6,), fused=(2, 4)),
    # Labeled and unlabeled images are decoded alike. Fused: the pyramid's consistency.
    Method(URPCTrainer, split_graphs=(1 + 1,), fused=(1, 1)),
    # Decoders: of labeled and of unlabeled images. Fused: consistency; and the teacher's encoder and decoder, which run
    # before the step's passes too.
    Method(UAMTTrainer, {"first_threshold": 1.0}, halves={"noise": 0.0}, split_graphs=(1 + 2,), fused=(3, 3)),
)
TRAINERS = tuple(method.trainer for method in METHODS)
BY_NAME = {method.name: method for method in METHODS}
REPRESENTATIVES = tuple(method.trainer for method in METHODS if method.representative)


def of_methods(
    names: str = "method",
    cases: Iterable[tuple[Any, ...]] = ((),),
    *,
    fast: int = 0,
    of_representative: int | None = None,
    **options: Any,
) -> pytest.MarkDecorator:
    """Parametrize a test by every method's trainer and, for each, by cases.

    Every method has every case. All of a representative are fast, or as many as are asked for; of another method the
    first ones are, and the rest is slow. So a new method makes the fast tests seconds longer, and not a minute.

    Args:
        names: of the test's arguments, in one text: the trainer's, then those of a case.
        cases: the arguments of each case.
        fast: how many cases of a method that is no representative are fast.
        of_representative: how many cases of one that is are fast, if not all.
        options: of ``pytest.mark.parametrize``.
    """
    values = [*method_cases(cases, fast=fast, of_representative=of_representative)]
    return pytest.mark.parametrize(names.replace(" ", "").split(","), values, **options)


def method_cases(
    cases: Iterable[tuple[Any, ...]] = ((),), *, fast: int = 0, of_representative: int | None = None
) -> Iterable[Any]:
    """The parameters of :func:`of_methods`; of a fixture, too."""
    cases = list(cases)
    for method in METHODS:
        many = (len(cases) if of_representative is None else of_representative) if method.representative else fast
        for number, case in enumerate(cases):
            values = (method.trainer, *case)
            marks = () if number < many else pytest.mark.slow
            yield pytest.param(*values, marks=marks, id="-".join(map(_id, values)))


def _id(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def make_of_table(method, planned, monkeypatch, tmp_path, **options) -> SemiSupervisedTrainer:
    """A trainer with the settings of its row."""
    return make_trainer(method, planned, monkeypatch, tmp_path, **(BY_NAME[method.__name__].settings | options))


def make_trainer(
    method, planned, monkeypatch, tmp_path, *, classes=2, regions=False, ignore=False, residual=False, **settings
) -> SemiSupervisedTrainer:
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(name, planned.environment[name])
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    plans = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text())
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
    return initialized(method, plans, "tiny", dataset_json)


def make_short(method, planned, folder, epochs=50, steps=4, **settings) -> SemiSupervisedTrainer:
    """A trainer of short epochs that writes a checkpoint after each, into a folder."""
    trainer = make_trainer(method, planned, pytest.MonkeyPatch(), folder, **settings)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, steps, 1
    trainer.save_every = 1
    return trainer


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


def random_outputs(trainer, labeled, unlabeled, *, x: tuple[str, ...], u: tuple[str, ...]) -> Given:
    """Random logits with gradient: of streams of labeled images with deep supervision, and of unlabeled images."""
    generator = torch.Generator().manual_seed(5)

    def draw(n, spatial):
        shape = (n, trainer.label_manager.num_segmentation_heads, *spatial)
        return (4 * torch.randn(shape, generator=generator)).requires_grad_()

    of_labeled = {name: StreamOutput([draw(2, target.shape[2:]) for target in labeled.target]) for name in x}
    of_unlabeled = {name: StreamOutput(draw(len(unlabeled.weak), unlabeled.weak.shape[2:])) for name in u}
    return Given(of_labeled | of_unlabeled)


def summed_terms(trainer, outputs, labeled, unlabeled, prepared=None) -> dict[str, torch.Tensor]:
    """The terms, their parts added up; of what the images were prepared with, where that is drawn."""
    prepared = trainer.prepare(labeled, unlabeled) if prepared is None else prepared
    terms: dict[str, torch.Tensor] = {}
    for part in trainer.loss_terms(outputs, labeled, unlabeled, prepared):
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
