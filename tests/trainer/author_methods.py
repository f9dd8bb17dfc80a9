"""Methods as someone else would write them: of nnunet_ssl.api alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ssl.api import (
    LabeledBatch,
    Outputs,
    PlainHead,
    SemiSupervisedTrainer,
    Stream,
    TeacherSettings,
    TrainingNetwork,
    UNet,
    UnlabeledBatch,
    Views,
    another_network,
    consistency_mse,
    entropy_of_probabilities,
    gaussian_ramp_up,
    largest_components,
    masked_cross_entropy,
    probabilities,
    pseudo_label,
    setting,
)


class Prepared(NamedTuple):
    """Noise for the student, and the teacher's mean prediction of several passes with dropout."""

    noise: Tensor
    mean: Tensor


@dataclass(frozen=True)
class MeanTeacherSettings(TeacherSettings):
    passes: int = setting(3, "passes of the teacher", minimum=1, integer=True)


class MeanTeacher(SemiSupervisedTrainer):
    """Consistency with the mean of a teacher's passes, where it is certain."""

    settings_class = MeanTeacherSettings
    settings: MeanTeacherSettings

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        return TrainingNetwork(network, teacher=True)

    def streams(self) -> dict[str, Stream]:
        return {"x": Stream("x", deep_supervision=self.enable_deep_supervision), "u": Stream("u")}

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> Prepared:
        regions = self.label_manager.has_regions
        stream = Stream("any", dropout=0.5, teacher=True, gradient=False)
        passes = [self.without_gradient(unlabeled.weak, stream) for _ in range(self.settings.passes)]
        mean = torch.stack([probabilities(one.logits, regions=regions) for one in passes]).mean(0)
        return Prepared(0.1 * torch.randn_like(unlabeled.weak), mean)

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Prepared) -> dict[str, Tensor]:
        return {"x": labeled.image, "u": unlabeled.weak + prepared.noise}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Prepared
    ) -> Iterator[dict[str, Tensor]]:
        regions = self.label_manager.has_regions
        yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}
        self.record_prediction(outputs["u"].logits)
        certain = entropy_of_probabilities(prepared.mean, regions=regions) < 0.69
        student = probabilities(outputs["u"].logits, regions=regions)
        yield {"consistency": consistency_mse(student, prepared.mean, certain)}

    def loss_weights(self, progress: float) -> dict[str, float]:
        return {"supervised": 1.0, "consistency": gaussian_ramp_up(progress, length=self.settings.ramp_length)}


class TwoNetworks(SemiSupervisedTrainer):
    """A network alone on labeled images, then two that teach each other on unlabeled ones."""

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        head = PlainHead(
            features=network.encoder.output_channels[0],
            channels=self.num_structures,
            dim=len(self.configuration_manager.patch_size),
            name="distance",
            activation=torch.tanh,
        )
        return TrainingNetwork(network, head=head, networks={"b": another_network(network)})

    def unlabeled_views(self) -> Views:
        return Views(augmented=True, weak_labeled=True)

    def stages(self) -> tuple[str, ...]:
        return ("alone", "together")

    def stage(self, progress: float) -> str:
        return "alone" if progress < 0.5 else "together"

    def streams(self) -> dict[str, Stream]:
        deep = self.enable_deep_supervision
        alone = {"x_a": Stream("x", deep_supervision=deep, head=True)}
        if self.current_stage == "alone":
            return alone
        return alone | {
            "x_b": Stream("x_weak", network="b", deep_supervision=deep, dropout=0.3),
            "u_a": Stream("u", deep_supervision=deep),
            "u_b": Stream("u", network="b", deep_supervision=deep),
        }

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        assert labeled.weak is not None and unlabeled.augmented is not None
        return {"x": labeled.image, "x_weak": labeled.weak, "u": unlabeled.augmented}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        a = outputs["x_a"]
        assert a.head is not None
        yield {
            "supervised": self.supervised_loss(a.logits, labeled.target),
            "distance": a.head["distance"].float().square().mean(),
        }
        if self.current_stage == "alone":
            return
        yield {"supervised": self.supervised_loss(outputs["x_b"].logits, labeled.target)}
        of_b = self._label(outputs.peek("u_b").full_resolution)
        of_a = self._label(outputs.peek("u_a").full_resolution)
        yield {"mutual": self._learn(outputs["u_a"].logits, of_b)}
        self.record_prediction(outputs.peek("u_b").logits)
        yield {"mutual": self._learn(outputs["u_b"].logits, of_a)}

    def loss_weights(self, progress: float) -> dict[str, float]:
        mutual = gaussian_ramp_up(progress, start=0.5, length=0.2)
        return {"supervised": 1.0, "distance": 0.1, "mutual": mutual}

    def _label(self, logits: Tensor) -> Tensor:
        return largest_components(pseudo_label(logits, regions=self.label_manager.has_regions).target)

    def _learn(self, logits: Any, label: Tensor) -> Tensor:
        """Of all resolutions."""
        levels = logits if isinstance(logits, list) else [logits]
        of_levels = [functional.interpolate(label.float(), level.shape[2:]).to(label.dtype) for level in levels]
        losses = [masked_cross_entropy(one, of) for one, of in zip(levels, of_levels, strict=True)]
        return torch.stack(losses).mean()


def changed(**changes: Any) -> type[MeanTeacher]:
    return type("Mistaken", (MeanTeacher,), changes)
