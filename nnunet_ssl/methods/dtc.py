"""DTC: the network also predicts signed distance maps, which should agree with its segmentation.

Source: Luo, Chen, Song, Wang, Semi-supervised medical image segmentation through dual-task consistency, AAAI 2021,
arXiv 2009.04448.

A head on the decoder's last features regresses signed distances; a steep sigmoid makes a segmentation of them. Both
tasks see labeled and unlabeled images. The head is needed in training only: nnU-Net's network predicts.

Where this differs from the paper, **[choice]** says so; docs/explanation/dtc.md lists the differences from the authors'
released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.api import (
    LabeledBatch,
    Outputs,
    PlainHead,
    SemiSupervisedSettings,
    SemiSupervisedTrainer,
    SignedDistanceMaps,
    Stream,
    TrainingNetwork,
    UNet,
    UnlabeledBatch,
    consistency_mse,
    foreground_probabilities,
    fused,
    gaussian_ramp_up,
    of_all_structures,
    ramp_length_setting,
    setting,
)


@dataclass(frozen=True)
class DTCSettings(SemiSupervisedSettings):
    """The paper's values; the weight of the consistency rises over the whole training."""

    ramp_length: float = ramp_length_setting(1.0)
    distance_weight: float = setting(0.3, "β: weight of the signed distance maps' error", minimum=0.0)
    consistency_weight: float = setting(1.0, "λ: weight of the tasks' consistency, after the ramp", minimum=0.0)
    steepness: float = setting(
        1500.0, "k: how steeply distances, scaled to [-1, 1], become probabilities", minimum=1.0, maximum=10000.0
    )


class DTCTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network with DTC on labeled and unlabeled scans."""

    settings_class = DTCSettings
    settings: DTCSettings

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """nnU-Net's network with a head of one distance map for each foreground class or region."""
        head = PlainHead(
            features=network.encoder.output_channels[0],
            channels=self.num_structures,
            dim=len(self.configuration_manager.patch_size),
            name="distance",
            activation=torch.tanh,
        )
        return TrainingNetwork(network, head=head)

    def labeled_targets(self) -> dict[str, SignedDistanceMaps]:
        """Signed distance maps, made by the workers that augment."""
        return {"distance": SignedDistanceMaps.of_dataset(self.label_manager, self.configuration_manager.spacing)}

    def streams(self) -> dict[str, Stream]:
        """Both tasks on labeled and on unlabeled images."""
        return {
            "x": Stream("x", deep_supervision=self.enable_deep_supervision, head=True),
            "u": Stream("u", head=True),
        }

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        """Labeled images with nnU-Net's augmentation, unlabeled ones in their weak view."""
        return {"x": labeled.image, "u": unlabeled.weak}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup and the distance maps' error on the labeled batch, L_dtc on both.

        The mean over labeled and unlabeled images is that of one over the labeled and one over the unlabeled ones,
        weighted by their number, so that in memory mode split the graph of one of them suffices.
        """
        samples = {"x": len(labeled.image), "u": len(unlabeled.weak)}
        for image, count in samples.items():
            output = outputs[image]
            assert output.head is not None
            distance = output.head["distance"]
            share = count / sum(samples.values())
            terms = {"tasks": share * self._dual_task(output.full_resolution, distance)}
            if image == "x":
                target = of_all_structures(distance, *labeled.extra["distance"])
                terms["supervised"] = self.supervised_loss(output.logits, labeled.target)
                # **[choice]** Voxels with the ignore label do not count.
                terms["distance"] = consistency_mse(distance, target, self.known_voxels(labeled))
                del target
            else:
                self.record_prediction(output.logits)
            yield terms
            del output, distance, terms  # the next pass needs their memory

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = L_sup + β MSE(sdm, target) + λ(t) L_dtc."""
        s = self.settings
        ramp = gaussian_ramp_up(progress, length=s.ramp_length)
        return {"supervised": 1.0, "distance": s.distance_weight, "tasks": s.consistency_weight * ramp}

    def _dual_task(self, logits: Tensor, distance: Tensor) -> Tensor:
        regions = self.label_manager.has_regions
        return dual_task_consistency(logits, distance, steepness=self.settings.steepness, regions=regions)


@fused
def dual_task_consistency(logits: Tensor, distance: Tensor, *, steepness: float, regions: bool) -> Tensor:
    """L_dtc = MSE(σ(-k sdm), p): distances are negative inside. Both tasks get its gradient.

    Args:
        logits: (B, C, *spatial).
        distance: sdm, (B, K, *spatial), in (-1, 1), of the foreground classes or regions.
        steepness: k. The gradient to the distances lives where they are within a few 1/k of 0.
        regions: whether the logits are of regions.

    Returns:
        A scalar, float32.
    """
    inside = torch.sigmoid(-steepness * distance.float())
    return (inside - foreground_probabilities(logits, regions=regions)).square().mean()
