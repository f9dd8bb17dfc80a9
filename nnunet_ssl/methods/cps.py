"""CPS: two networks with different initial weights learn from each other's pseudo-labels.

Source: Chen, Yuan, Zeng, Wang, Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision, CVPR 2021, arXiv
2106.01226.

Network a is nnU-Net's own and predicts. Network b is another of the same kind with weights that are drawn apart; it is
needed in training only.

Where this differs from the paper, **[choice]** says so; docs/explanation/cps.md lists the differences from the released
codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnunet_ssl.api import (
    LabeledBatch,
    Outputs,
    SemiSupervisedSettings,
    SemiSupervisedTrainer,
    Stream,
    StreamOutput,
    TrainingNetwork,
    UNet,
    UnlabeledBatch,
    another_network,
    gaussian_ramp_up,
    masked_cross_entropy,
    pseudo_label,
    ramp_length_setting,
    setting,
)


@dataclass(frozen=True)
class CPSSettings(SemiSupervisedSettings):
    """**[choice]** The weight that the method has for medical images, after a ramp; the paper's is 1.5 without one."""

    ramp_length: float = ramp_length_setting(1.0)
    cps_weight: float = setting(0.1, "λ: weight of the loss between the two networks, after the ramp", minimum=0.0)


class CPSTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network by cross pseudo supervision on labeled and unlabeled scans."""

    settings_class = CPSSettings
    settings: CPSSettings

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """Network a as nnU-Net built it, and b, initialized in the same way with other random numbers."""
        return TrainingNetwork(network, networks={"b": another_network(network)})

    def streams(self) -> dict[str, Stream]:
        """Both networks on labeled and unlabeled images."""
        return {
            f"{image}_{name}": Stream(
                image, network=network, deep_supervision=image == "x" and self.enable_deep_supervision
            )
            for image in ("x", "u")
            for name, network in {"a": None, "b": "b"}.items()
        }

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        """Both networks see the same images: what differs between them is their weights alone."""
        return {"x": labeled.image, "u": unlabeled.weak}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup of each network, and L_cps = CE(z_a, ŷ_b) + CE(z_b, ŷ_a) over labeled and unlabeled voxels."""
        samples = {"x": len(labeled.image), "u": len(unlabeled.weak)}
        for image, count in samples.items():
            share = count / sum(samples.values())
            # In memory mode split, b runs once without gradient, so that a can learn from it.
            label_b = self._label(outputs.peek(f"{image}_b"))

            a = outputs[f"{image}_a"]
            label_a = self._label(a)
            if image == "u":
                self.record_prediction(a.logits)
            terms = {"supervised": self.supervised_loss(a.logits, labeled.target)} if image == "x" else {}
            yield terms | {"cps": share * masked_cross_entropy(a.full_resolution, label_b)}
            del a, terms  # the next pass needs their memory

            b = outputs[f"{image}_b"]
            terms = {"supervised_b": self.supervised_loss(b.logits, labeled.target)} if image == "x" else {}
            yield terms | {"cps": share * masked_cross_entropy(b.full_resolution, label_a)}
            del b, terms

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = L_sup^a + L_sup^b + λ ramp(t) L_cps."""
        ramp = gaussian_ramp_up(progress, length=self.settings.ramp_length)
        return {"supervised": 1.0, "supervised_b": 1.0, "cps": self.settings.cps_weight * ramp}

    def _label(self, output: StreamOutput) -> Tensor:
        """ŷ: the most probable class, or the regions with p > 0.5; without gradient."""
        return pseudo_label(output.full_resolution, regions=self.label_manager.has_regions).target
