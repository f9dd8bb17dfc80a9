"""UA-MT: a mean teacher whose student learns only where repeated predictions of the teacher are certain.

Source: Yu, Wang, Li, Fu, Heng, Uncertainty-aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation,
MICCAI 2019, arXiv 1907.07034.

Student and teacher are nnU-Net's network under dropout. Dropout has no parameters, and the teacher is needed in
training only: nnU-Net's network predicts.

Where this differs from the paper, **[choice]** says so; docs/explanation/uamt.md lists the choices and the differences
from the authors' released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    clipped_noise,
    consistency,
    entropy_of_probabilities,
    gaussian_ramp_up,
    probabilities,
    ramp_length_setting,
    setting,
)


@dataclass(frozen=True)
class UAMTSettings(TeacherSettings):
    """The paper's values. The weight and the threshold rise until the end of the training."""

    ramp_length: float = ramp_length_setting(1.0)
    consistency_weight: float = setting(
        0.1, "λ: weight of the consistency with the teacher, after the ramp", minimum=0.0
    )
    passes: int = setting(8, "T: passes of the teacher from which its uncertainty is computed", minimum=1, integer=True)
    first_threshold: float = setting(
        0.75,
        "the student learns where the entropy is below this share of the largest entropy; the share rises to 1",
        minimum=0.0,
        maximum=1.0,
    )
    noise: float = setting(
        0.1, "σ: standard deviation of the noise on the teacher's images, clipped at twice that", minimum=0.0
    )
    dropout: float = setting(
        0.5, "channel dropout on the bottleneck and on the decoder's last features", minimum=0.0, maximum=0.95
    )


class Prepared(NamedTuple):
    """What the teacher is to predict, and where it is certain.

    Attributes:
        noise: ξ', (U, C, *patch size).
        certain: (U, 1, *patch size) for classes, (U, R, *patch size) for regions, bool.
    """

    noise: Tensor
    certain: Tensor


class UAMTTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network as an uncertainty-aware mean teacher's student on labeled and unlabeled scans."""

    settings_class = UAMTSettings
    settings: UAMTSettings

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """nnU-Net's network, and a teacher: θ' ← d θ' + (1 - d) θ after each step t, d = min(0.99, 1 - 1/(t + 1))."""
        return TrainingNetwork(network, teacher=True)

    def streams(self) -> dict[str, Stream]:
        """The student on labeled and unlabeled images, the teacher on noisy unlabeled ones; all with dropout."""
        return {
            "x": self._under_dropout("x", deep_supervision=self.enable_deep_supervision),
            "u_teacher": self._under_dropout("u_noisy", gradient=False, teacher=True),
            "u_student": self._under_dropout("u"),
        }

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> Prepared:
        """ξ', and where H(μ) < threshold: the entropy of the teacher's mean prediction μ of T passes.

        μ = 1/T Σ_t p(u + ξ_t; θ'), each pass with noise and dropout of its own
        H(μ) = -Σ_k μ_k log μ_k; of a region -μ log μ - (1 - μ) log(1 - μ)
        """
        u, sigma, regions = unlabeled.weak, self.settings.noise, self.label_manager.has_regions
        once = self._under_dropout("u", gradient=False, teacher=True)
        passes = (self.without_gradient(u + clipped_noise(u, sigma), once) for _ in range(self.settings.passes))
        total = sum((probabilities(one.logits, regions=regions) for one in passes), start=u.new_zeros(()))
        uncertainty = entropy_of_probabilities(total / self.settings.passes, regions=regions)
        return Prepared(clipped_noise(u, sigma), uncertainty < self.threshold(self.progress))

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Prepared) -> dict[str, Tensor]:
        """u for the student and u + ξ' for the teacher."""
        return {"x": labeled.image, "u": unlabeled.weak, "u_noisy": unlabeled.weak + prepared.noise}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Prepared
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup on the labeled batch; on the unlabeled one, m where the teacher is certain,

        L_con = Σ m (p(u; θ) - p(u + ξ'; θ'))² / (C Σ m)
        """
        yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}

        teacher, certain = outputs["u_teacher"].logits, prepared.certain
        self.record_prediction(teacher)
        count = certain.sum()
        self.record("certain", count, count.new_full((), certain.numel()))
        regions = self.label_manager.has_regions
        yield {"consistency": consistency(outputs["u_student"].logits, teacher, certain, regions=regions)}

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = L_sup + λ ramp(t) L_con."""
        ramp = gaussian_ramp_up(progress, length=self.settings.ramp_length)
        return {"supervised": 1.0, "consistency": self.settings.consistency_weight * ramp}

    def threshold(self, progress: float) -> float:
        """(3/4 + 1/4 ramp(t)) ln C, t over the whole training; of a region C = 2.

        ln C is the largest entropy, so at the end nearly all voxels are learned from. **[choice]** The authors write
        ln 2, for their two classes.
        """
        first = self.settings.first_threshold
        choices = 2 if self.label_manager.has_regions else self.label_manager.num_segmentation_heads
        return (first + (1 - first) * gaussian_ramp_up(progress, length=1.0)) * math.log(choices)

    def _under_dropout(self, image: str, **options: Any) -> Stream:
        return Stream(image, dropout=self.settings.dropout, dropout_on=("bottleneck", "features"), **options)
