"""Mean teacher: a student learns to agree with its own moving average, under different noise.

Source: Tarvainen, Valpola, Mean teachers are better role models: Weight-averaged consistency targets improve
semi-supervised deep learning results, NIPS 2017, arXiv 1703.01780; for segmentation Cui et al., Semi-supervised Brain
Lesion Segmentation with an Adapted Mean Teacher Model, IPMI 2019, arXiv 1903.01248.

The teacher is a copy of nnU-Net's network that no optimizer moves. It is needed in training only: nnU-Net's network
predicts, with the student's weights or, as a setting, with the teacher's.

Where this differs from the papers, **[choice]** says so; docs/explanation/mean_teacher.md lists the choices and the
differences from the released codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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
    clipped_noise,
    consistency,
    gaussian_ramp_up,
    ramp_length_setting,
    setting,
)


@dataclass(frozen=True)
class MeanTeacherSettings(TeacherSettings):
    """The values of the method's codes for medical images, whose weight rises until the end of the training."""

    ramp_length: float = ramp_length_setting(1.0)
    consistency_weight: float = setting(
        0.1, "w: weight of the consistency with the teacher, after the ramp", minimum=0.0
    )
    noise: float = setting(0.1, "σ: standard deviation of the noise on images, clipped at twice that", minimum=0.0)
    student_view: str = setting(
        "noise",
        "unlabeled images of the student; noise: the teacher's images with different noise; strong: the strong view",
        choices=("noise", "strong"),
    )


class Noise(NamedTuple):
    """ξ of the student, None where it sees the strong view, and ξ' of the teacher: (U, C, *patch size), drawn apart."""

    student: Tensor | None
    teacher: Tensor


class MeanTeacherTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network as a mean teacher's student on labeled and unlabeled scans."""

    settings_class = MeanTeacherSettings
    settings: MeanTeacherSettings

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """nnU-Net's network, and a teacher: θ' ← d θ' + (1 - d) θ after each step t, d = min(0.99, 1 - 1/(t + 1))."""
        return TrainingNetwork(network, teacher=True)

    def unlabeled_views(self) -> Views:
        """The weak view u, and a strong one where the student is to see it."""
        return Views(strong=int(self.settings.student_view == "strong"))

    def streams(self) -> dict[str, Stream]:
        """The student on labeled and unlabeled images, the teacher on unlabeled ones."""
        return {
            "x": Stream("x", deep_supervision=self.enable_deep_supervision),
            "u_teacher": Stream("u_teacher", gradient=False, teacher=True),
            "u_student": Stream("u_student"),
        }

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> Noise:
        """ξ and ξ' = clip(N(0, σ²), ±2σ)."""
        sigma, strong = self.settings.noise, self.settings.student_view == "strong"
        student = None if strong else clipped_noise(unlabeled.weak, sigma)
        return Noise(student, clipped_noise(unlabeled.weak, sigma))

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Noise) -> dict[str, Tensor]:
        """u + ξ for the student and u + ξ' for the teacher.

        **[choice]** As a setting, the student sees a strong view: changes that do more than noise.
        """
        return {
            "x": labeled.image,
            "u_teacher": unlabeled.weak + prepared.teacher,
            "u_student": unlabeled.strong[0] if prepared.student is None else unlabeled.weak + prepared.student,
        }

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Noise
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup on the labeled batch; on the unlabeled one L_con = MSE(p(u + ξ; θ), p(u + ξ'; θ'))."""
        yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}

        teacher = outputs["u_teacher"].logits
        self.record_prediction(teacher)
        regions = self.label_manager.has_regions
        yield {"consistency": consistency(outputs["u_student"].logits, teacher, regions=regions)}

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = L_sup + w ramp(t) L_con."""
        ramp = gaussian_ramp_up(progress, length=self.settings.ramp_length)
        return {"supervised": 1.0, "consistency": self.settings.consistency_weight * ramp}
