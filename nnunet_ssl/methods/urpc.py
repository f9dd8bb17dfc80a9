"""URPC: one decoder's predictions at several resolutions should agree; uncertain voxels count less.

Source: Luo, Wang, Liao, Chen, Song, Chen, Zhang, Metaxas, Zhang, Semi-supervised medical image segmentation via
uncertainty rectified pyramid consistency, Medical Image Analysis 80, 2022, 102517, doi 10.1016/j.media.2022.102517;
Luo et al., MICCAI 2021, arXiv 2012.07042.

The pyramid is that of nnU-Net's deep supervision: its highest resolutions, on unlabeled images too. The network that
predicts is nnU-Net's own, and the one that is trained has nothing in addition.

Where this differs from the paper, **[choice]** says so; docs/explanation/urpc.md lists the differences from the
authors' released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ssl.api import (
    LabeledBatch,
    Outputs,
    SemiSupervisedSettings,
    SemiSupervisedTrainer,
    Stream,
    TrainingNetwork,
    UNet,
    UnlabeledBatch,
    UserError,
    fused,
    gaussian_ramp_up,
    mean_over_ranks,
    ramp_length_setting,
    setting,
)

_LINEAR = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class URPCSettings(SemiSupervisedSettings):
    """The paper's values; the weight rises over the whole training."""

    ramp_length: float = ramp_length_setting(1.0)
    consistency_weight: float = setting(0.1, "λ: weight of the pyramid's consistency, after the ramp", minimum=0.0)
    scales: int = setting(
        4,
        "S: largest number of resolutions in the pyramid, from the full one down; fewer if nnU-Net's deep "
        "supervision uses fewer",
        minimum=2,
        integer=True,
    )


class URPCTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network with URPC on labeled and unlabeled scans."""

    settings_class = URPCSettings
    settings: URPCSettings

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """nnU-Net's network.

        Raises:
            UserError: it has one resolution only, so there is no pyramid.
        """
        if len(network.decoder.seg_layers) < 2:
            raise UserError(
                f"{type(self).__name__} needs a network that predicts at several resolutions. The one of the "
                f"configuration {self.configuration_name} in the plans predicts at only one, because its encoder has "
                f"two stages. Choose a configuration with more stages (n_stages in its architecture), or another "
                "trainer."
            )
        return TrainingNetwork(network)

    def streams(self) -> dict[str, Stream]:
        """All resolutions of labeled and of unlabeled images."""
        return {"x": Stream("x", deep_supervision=True), "u": Stream("u", deep_supervision=True)}

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        """Labeled images with nnU-Net's augmentation, unlabeled ones in their weak view."""
        return {"x": labeled.image, "u": unlabeled.weak}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup on the labeled batch, L_u on the unlabeled one."""
        yield {"supervised": self._supervised(outputs["x"].logits, labeled.target)}
        logits = outputs["u"].logits
        self.record_prediction(logits)
        yield {"pyramid": pyramid_consistency(self._pyramid(logits), regions=self.label_manager.has_regions)}

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = L_sup + λ(t) L_u."""
        s = self.settings
        return {"supervised": 1.0, "pyramid": s.consistency_weight * gaussian_ramp_up(progress, length=s.ramp_length)}

    def _supervised(self, logits: Sequence[Tensor], target: Any) -> Tensor:
        """nnU-Net's loss with deep supervision. Without it, the paper's: the mean of the whole pyramid's losses."""
        if self.enable_deep_supervision:
            return self.supervised_loss(logits, target)
        return torch.stack([self.supervised_loss(z, target) for z in self._pyramid(logits)]).mean()

    def _pyramid(self, logits: Sequence[Tensor]) -> Tensor:
        # nnU-Net's loss leaves out the lowest resolution. Where there are two, the lower one learns to agree, no more.
        return upsampled(logits[: min(self.settings.scales, max(2, len(logits) - 1))])


def upsampled(logits: Sequence[Tensor]) -> Tensor:
    """Interpolate logits (B, C, *spatial) of lower resolutions to the size of the first: (S, B, C, *spatial), float32.

    **[choice]** Corners are not aligned, so that a voxel's center keeps its place.
    """
    first, *lower = [z.float() for z in logits]
    size = first.shape[2:]
    mode = _LINEAR[len(size)]
    return torch.stack([first, *(functional.interpolate(z, size=size, mode=mode, align_corners=False) for z in lower)])


@fused
def pyramid_consistency(logits: Tensor, *, regions: bool) -> Tensor:
    """L_u = (1/S) Σ_s [ Σ (p_s - p̄)² exp(-D_s) / Σ exp(-D_s) + mean D_s ], with p̄ the mean of the p_s.

    D_s = Σ_k p̄_k log(p̄_k / p_s,k), voxel by voxel, is how uncertain scale s is. The squares are averaged over classes.

    Args:
        logits: (S, B, C, *spatial), of S scales.
        regions: D_s is that of each region and its complement, channel by channel.

    Returns:
        A scalar, float32; 0 where all scales agree.
    """
    if regions:
        p = torch.sigmoid(logits)
        # The logit of p̄. With it D_s needs no channel for the complement.
        of_mean = torch.logsumexp(functional.logsigmoid(logits), 0) - torch.logsumexp(functional.logsigmoid(-logits), 0)
        mean = torch.sigmoid(of_mean)
        uncertainty = mean * (of_mean - logits) + functional.softplus(logits) - functional.softplus(of_mean)
    else:
        log_p = torch.log_softmax(logits, 2)
        log_mean = torch.logsumexp(log_p, 0) - math.log(len(log_p))
        p, mean = log_p.exp(), log_mean.exp()
        uncertainty = (mean * (log_mean - log_p)).sum(2, keepdim=True)
    certainty = torch.exp(-uncertainty)
    voxels = tuple(range(1, logits.ndim))
    error = ((p - mean).square() * certainty).mean(voxels)
    # Each of several processes has a part of the batch, and the mean over them is the loss.
    weight = mean_over_ranks(certainty.mean(voxels))
    return (error / (weight + 1e-8) + uncertainty.mean(voxels)).mean()
