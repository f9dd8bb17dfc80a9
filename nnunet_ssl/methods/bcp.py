"""BCP: labeled patches are pasted into unlabeled ones and the other way round; the network learns from the mix.

Source: Bai, Chen, Li, Shen, Wang, Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation, CVPR 2023,
arXiv 2305.00673.

The unlabeled part of a mixed image has the label that a teacher, the student's moving average, predicts. Labeled and
unlabeled voxels are then learned in one image, by one network, with one loss.

**[choice]** marks what differs from the paper; docs/explanation/bcp.md compares with the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_ssl.api import (
    LabeledBatch,
    Outputs,
    SemiSupervisedTrainer,
    Stream,
    TeacherSettings,
    TrainingNetwork,
    UNet,
    UnlabeledBatch,
    Views,
    box_mask,
    dice_and_cross_entropy,
    gaussian_ramp_up,
    largest_components,
    pseudo_label,
    ramp_length_setting,
    random_boxes,
    setting,
)

PRETRAINING, COPY_PASTE = "pretraining", "copy-paste"


@dataclass(frozen=True)
class BCPSettings(TeacherSettings):
    """The paper's values. The length of the pretraining is a **[choice]**."""

    unlabeled_weight: float = setting(0.5, "α: weight of the unlabeled part of a mixed image", minimum=0.0)
    box_fraction: float = setting(2 / 3, "β: side of the box, as a share of the patch's", minimum=0.05, maximum=1.0)
    pretrain_fraction: float = setting(0.2, "share of the training with labeled images only", minimum=0.0, maximum=1.0)
    labeled_into_labeled: bool = setting(False, "pretrain on labeled images pasted together", choices=(True, False))
    largest_component: bool = setting(True, "pseudo-labels keep each class's largest component", choices=(True, False))
    ramp_length: float = ramp_length_setting(0.0)


class Pairs(NamedTuple):
    """N pairs of a labeled and an unlabeled patch, each of which is mixed in both directions.

    Attributes:
        box: M, (N, 1, *patch size), bool.
        labeled, unlabeled: (N,), the indices of the two patches in their batches.
        pseudo: ŷ, the teacher's label of the unlabeled batch: classes (U, 1, *patch size), or regions, bool.
    """

    box: Tensor
    labeled: Tensor
    unlabeled: Tensor
    pseudo: Tensor


class BCPTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network with bidirectional copy-paste on labeled and unlabeled scans."""

    settings_class = BCPSettings
    settings: BCPSettings

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """nnU-Net's network and its moving average."""
        return TrainingNetwork(network, teacher=True)

    def unlabeled_views(self) -> Views:
        """Augmented as labeled images are, so that a mixed image has one look."""
        return Views(augmented=True)

    def stages(self) -> tuple[str, ...]:
        """Pretraining on labeled images, if there is one, then copy-paste."""
        return (PRETRAINING, COPY_PASTE) if self.settings.pretrain_fraction > 0 else (COPY_PASTE,)

    def stage(self, progress: float) -> str:
        """**[choice]** A share of the planned training; the authors pretrain for 12 % to 25 % of all iterations."""
        return PRETRAINING if progress < self.settings.pretrain_fraction else COPY_PASTE

    def streams(self) -> dict[str, Stream]:
        """The labeled images; later both directions of the mixed ones, at full resolution alone **[choice]**."""
        if self.current_stage == PRETRAINING:
            return {"x": Stream("x", deep_supervision=self.enable_deep_supervision)}
        return {"in": Stream("in"), "out": Stream("out")}

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> LabeledBatch | Pairs:
        """The boxes, who is paired with whom, and the teacher's labels; in the pretraining the labeled batch.

        **[choice]** Each pair has its own box and is mixed in both directions; the paper has one box for all, and other
        pairs for each direction. Where the batches differ in size, patches of the smaller one are in several pairs.
        """
        if self.current_stage == PRETRAINING:
            if not self.settings.labeled_into_labeled:
                return labeled
            # As in the paper: outside of its box, each labeled image is the next one.
            outside = ~self._boxes(len(labeled.image), labeled)
            return labeled.pasted(outside, torch.arange(len(outside), device=outside.device).roll(-1))
        assert unlabeled.augmented is not None
        teacher = self.without_gradient(unlabeled.augmented, Stream("u", teacher=True, gradient=False)).logits
        self.record_prediction(teacher)
        pseudo = pseudo_label(teacher, regions=self.label_manager.has_regions).target
        if self.settings.largest_component:
            pseudo = largest_components(pseudo)
        b, u = len(labeled.image), len(unlabeled.augmented)
        pair = torch.arange(max(b, u), device=pseudo.device)
        return Pairs(self._boxes(len(pair), labeled), pair * b // len(pair), pair * u // len(pair), pseudo)

    def images(
        self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: LabeledBatch | Pairs
    ) -> dict[str, Tensor]:
        """X_in = M x + (1 - M) u and X_out = M u + (1 - M) x."""
        if not isinstance(prepared, Pairs):
            return {"x": prepared.image}
        assert unlabeled.augmented is not None
        x, u = labeled.image[prepared.labeled], unlabeled.augmented[prepared.unlabeled]
        return {"in": torch.where(prepared.box, x, u), "out": torch.where(prepared.box, u, x)}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: LabeledBatch | Pairs
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup in the pretraining; then, with L = [D + CE] / 2 over a part of the voxels,

        supervised   = L(z_in, y, M) + L(z_out, y, 1 - M)        (the labeled parts)
        pseudo_label = L(z_in, ŷ, 1 - M) + L(z_out, ŷ, M)        (the unlabeled parts)
        """
        if not isinstance(prepared, Pairs):
            yield {"supervised": self.supervised_loss(outputs["x"].logits, prepared.target)}
            return
        label, known = self.label_of(labeled)[prepared.labeled], self.known_voxels(labeled)
        pseudo = prepared.pseudo[prepared.unlabeled].to(label.dtype)  # for one compiled loss of both
        for direction, of_labeled in (("in", prepared.box), ("out", ~prepared.box)):
            logits = outputs[direction].logits
            learned = of_labeled if known is None else of_labeled & known[prepared.labeled]
            yield {
                "supervised": dice_and_cross_entropy(logits, label, learned),
                "pseudo_label": dice_and_cross_entropy(logits, pseudo, ~of_labeled),
            }
            del logits  # the next pass needs its memory

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = supervised + α pseudo_label; a ramp after the pretraining is a setting, off as in the paper."""
        ramp = gaussian_ramp_up(progress, start=self.settings.pretrain_fraction, length=self.settings.ramp_length)
        return {"supervised": 1.0, "pseudo_label": self.settings.unlabeled_weight * ramp}

    def _boxes(self, count: int, labeled: LabeledBatch) -> Tensor:
        size, device = labeled.image.shape[2:], labeled.image.device
        return box_mask(random_boxes(count, size, fraction=self.settings.box_fraction, device=device), size)
