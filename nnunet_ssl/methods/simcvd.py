"""SimCVD: a student learns to match its own moving average on boundary-aware features, under dropout.

Source: You, Zhou, Zhao, Staib, Duncan, SimCVD: Simple Contrastive Voxel-Wise Representation Distillation for
Semi-Supervised Medical Image Segmentation, IEEE TMI 41(9), 2022, arXiv 2108.06227.

Student and teacher are nnU-Net's network, each with a head for signed distance maps and a projector, each under
dropout of its own. Heads, projector and teacher are needed in training only: nnU-Net's network predicts.

Where this differs from the paper, **[choice]** says so; docs/explanation/simcvd.md lists the choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.api import (
    BoundaryHead,
    LabeledBatch,
    Outputs,
    SemiSupervisedTrainer,
    SignedDistanceMaps,
    Stream,
    StreamOutput,
    TeacherSettings,
    TrainingNetwork,
    UNet,
    UnlabeledBatch,
    Views,
    clipped_noise,
    coarse_grid,
    consistency,
    consistency_mse,
    fused,
    gather_over_ranks,
    gaussian_ramp_up,
    info_nce,
    of_all_structures,
    setting,
    unit_length,
)


@dataclass(frozen=True)
class SimCVDSettings(TeacherSettings):
    """The paper's values. ``ramp_length`` is that of the consistency weight."""

    distance_weight: float = setting(0.1, "α: weight of the signed distance maps' error", minimum=0.0)
    contrast_weight: float = setting(0.5, "λ: weight of the contrast of boundary-aware features", minimum=0.0)
    structure_weight: float = setting(0.1, "β: weight of the pairwise distillation of bottleneck features", minimum=0.0)
    consistency_weight: float = setting(
        0.1, "γ: weight of the consistency with the teacher, after the ramp", minimum=0.0
    )
    temperature: float = setting(0.5, "τ of the contrast", minimum=0.01)
    dropout: float = setting(
        0.5, "channel dropout on the bottleneck and on the decoder's last features", minimum=0.0, maximum=0.95
    )
    noise: float = setting(
        0.1, "standard deviation of the noise on the student's images, clipped at twice that", minimum=0.0
    )
    student_view: str = setting(
        "noise",
        "unlabeled images of the student; noise: the teacher's images with noise; strong: the strong view",
        choices=("noise", "strong"),
    )
    projection_channels: int = setting(128, "channels of the boundary-aware features", minimum=1, integer=True)
    contrast_positions: int = setting(
        512, "largest number of positions of a patch in the contrast", minimum=8, integer=True
    )
    contrast_positions_in_batch: int = setting(
        1024,
        "largest number of positions of a batch in the contrast; above it the grid becomes coarser, with at "
        "least 8 positions per patch",
        minimum=8,
        integer=True,
    )
    structure_voxels: int = setting(
        1024,
        "largest number of bottleneck voxels of a patch in the pairwise distillation, drawn in each step",
        minimum=2,
        integer=True,
    )
    ema_decay: float = setting(0.999, "largest decay of the teacher's moving average", minimum=0.0, maximum=1.0)


class SimCVDTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network with SimCVD on labeled and unlabeled scans."""

    settings_class = SimCVDSettings
    settings: SimCVDSettings

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """nnU-Net's network, with a head for distance maps and projection, and a teacher with both."""
        s = self.settings
        positions = min(s.contrast_positions, max(8, s.contrast_positions_in_batch // self.unlabeled_batch_size))
        head = BoundaryHead(
            image_channels=self.num_input_channels,
            features=network.encoder.output_channels[0],
            maps=self.num_structures,
            projection=s.projection_channels,
            grid=coarse_grid(self.configuration_manager.patch_size, positions=positions),
        )
        return TrainingNetwork(network, head=head, teacher=True)

    def unlabeled_views(self) -> Views:
        """The weak view u, and a strong one where the student is to see it."""
        return Views(strong=int(self.settings.student_view == "strong"))

    def labeled_targets(self) -> dict[str, SignedDistanceMaps]:
        """Signed distance maps, made by the workers that augment."""
        return {"distance": SignedDistanceMaps.of_dataset(self.label_manager, self.configuration_manager.spacing)}

    def streams(self) -> dict[str, Stream]:
        """The student on labeled and changed unlabeled images, the teacher on the unlabeled ones as they are."""
        p, places = self.settings.dropout, ("bottleneck", "features")
        return {
            "x": Stream("x", dropout=p, dropout_on=places, deep_supervision=self.enable_deep_supervision, head=True),
            "u_teacher": Stream(
                "u", dropout=p, dropout_on=places, head=True, bottleneck=True, gradient=False, teacher=True
            ),
            "u_student": Stream("u_student", dropout=p, dropout_on=places, head=True, bottleneck=True),
        }

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> Tensor:
        """The unlabeled images as the student sees them: with noise clip(N(0, σ²), ±2σ).

        **[choice]** As a setting, it sees their strong view: changes that do more than noise.
        """
        if self.settings.student_view == "strong":
            return unlabeled.strong[0]
        return unlabeled.weak + clipped_noise(unlabeled.weak, self.settings.noise)

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Tensor) -> dict[str, Tensor]:
        """The labeled images, and the unlabeled ones as they are and as the student sees them."""
        return {"x": labeled.image, "u": unlabeled.weak, "u_student": prepared}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup and the distance maps' error on the labeled batch; on the unlabeled one

        L_contrast = mean_j -log( exp(h_s,j·h_t,j/τ) / Σ_k exp(h_s,j·h_t,k/τ) ), j, k over all positions of all patches
        L_pd       = mean_i -log( exp(v_t,i·v_s,i) / Σ_j exp(v_t,i·v_s,j) ), i, j over the voxels of one bottleneck
        L_con      = MSE(p_s(u + noise), p_t(u))
        """
        output = outputs["x"]
        predicted = _head(output, "distance")
        target = of_all_structures(predicted, *labeled.extra["distance"])
        yield {
            "supervised": self.supervised_loss(output.logits, labeled.target),
            "distance": distance_error(predicted, target, self.known_voxels(labeled)),
        }
        del output, predicted, target  # the next pass needs their memory

        teacher, student = outputs["u_teacher"], outputs["u_student"]
        self.record_prediction(teacher.logits)
        regions = self.label_manager.has_regions
        keys, first = gather_over_ranks(_head(teacher, "projection").flatten(0, 1))
        queries = _head(student, "projection").flatten(0, 1)
        yield {
            "contrast": info_nce(queries, keys, temperature=self.settings.temperature, first=first),
            "structure": structure_distillation(student, teacher, voxels=self.settings.structure_voxels),
            "consistency": consistency(student.logits, teacher.logits, regions=regions),
        }

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = L_sup + α MSE(sdm, target) + λ L_contrast + β L_pd + γ ramp L_con."""
        s = self.settings
        return {
            "supervised": 1.0,
            "distance": s.distance_weight,
            "contrast": s.contrast_weight,
            "structure": s.structure_weight,
            "consistency": s.consistency_weight * gaussian_ramp_up(progress, length=s.ramp_length),
        }


def _head(output: StreamOutput, name: str) -> Tensor:
    assert output.head is not None
    return output.head[name]


@fused
def distance_error(predicted: Tensor, target: Tensor, known: Tensor | None) -> Tensor:
    """MSE(sdm, target), over the voxels whose label is known.

    Args:
        predicted: (B, K, *spatial), in (-1, 1).
        target: like ``predicted``.
        known: (B, 1, *spatial), bool, or None for all voxels. **[choice]** Voxels with the ignore label do not count;
            for the distances of others they lie outside of all structures.
    """
    return consistency_mse(predicted, target, known)


def structure_distillation(student: StreamOutput, teacher: StreamOutput, *, voxels: int) -> Tensor:
    """L_pd between the bottlenecks (N, G, *coarse) of student and teacher, each voxel's features of unit length.

    Args:
        student: of the images that it sees.
        teacher: of the images as they are.
        voxels: the most that are compared within a patch; where there are more, as many are drawn.
    """
    assert student.bottleneck is not None and teacher.bottleneck is not None
    v_s, v_t = (tensor.flatten(2).transpose(1, 2) for tensor in (student.bottleneck, teacher.bottleneck))
    if v_s.shape[1] > voxels:
        drawn = torch.randperm(v_s.shape[1], device=v_s.device)[:voxels]
        v_s, v_t = v_s[:, drawn], v_t[:, drawn]
    return info_nce(unit_length(v_t), unit_length(v_s), temperature=1.0)
