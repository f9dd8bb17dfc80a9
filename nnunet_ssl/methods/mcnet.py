"""MC-Net+: decoders that upsample in different ways learn from each other's sharpened predictions.

Source: Wu, Ge, Zhang, Xu, Zhang, Xia, Cai, Mutual consistency learning for semi-supervised medical image segmentation,
Medical Image Analysis 81, 2022, 102530, doi 10.1016/j.media.2022.102530, arXiv 2109.09960.

Decoder a is nnU-Net's, with transposed convolutions; b interpolates linearly and c from the nearest voxel, each with
weights of its own. Where they disagree, the network is uncertain. All see labeled and unlabeled images. Decoder a
predicts, so the network that predicts is nnU-Net's own.

**[choice]** marks what differs from the paper; docs/explanation/mcnet.md compares with the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.api import (
    LabeledBatch,
    Outputs,
    SemiSupervisedSettings,
    SemiSupervisedTrainer,
    Stream,
    TrainingNetwork,
    UNet,
    UnlabeledBatch,
    fused,
    gaussian_ramp_up,
    interpolating_decoder,
    probabilities,
    ramp_length_setting,
    setting,
    sharpen,
)


@dataclass(frozen=True)
class MCNetSettings(SemiSupervisedSettings):
    """The paper's values for volumes; the ramp-up is 40 % of the training."""

    ramp_length: float = ramp_length_setting(0.4)
    supervised_weight: float = setting(0.5, "λ: weight of each decoder's supervised loss", minimum=0.0)
    mutual_weight: float = setting(1.0, "β: weight of the mutual consistency, after the ramp", minimum=0.0)
    temperature: float = setting(0.1, "T: temperature of the sharpening; 1: no sharpening", minimum=0.01, maximum=1.0)
    decoders: int = setting(3, "3: decoders a, b and c (MC-Net+); 2: a and b (MC-Net)", choices=(2, 3), integer=True)
    label_gradient: bool = setting(False, "soft labels with a gradient, as in the authors' code", choices=(True, False))


class MCNetTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network with MC-Net+ on labeled and unlabeled scans."""

    settings_class = MCNetSettings
    settings: MCNetSettings

    @property
    def decoders(self) -> tuple[str, ...]:
        """The decoders' names: a is nnU-Net's own."""
        return ("a", "b", "c")[: self.settings.decoders]

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """Decoder b interpolates linearly, decoder c from the nearest voxel."""
        ways = zip(self.decoders[1:], ("linear", "nearest"), strict=False)
        others = {name: interpolating_decoder(network.decoder, upsampling=way) for name, way in ways}
        return TrainingNetwork(network, decoders=others)

    def streams(self) -> dict[str, Stream]:
        """Every decoder on labeled and unlabeled images."""
        deep = {"x": self.enable_deep_supervision, "u": False}
        return {
            f"{image}_{name}": Stream(image, decoder=None if name == "a" else name, deep_supervision=deep[image])
            for image in deep
            for name in self.decoders
        }

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        """Labeled images with nnU-Net's augmentation, unlabeled ones in their weak view."""
        return {"x": labeled.image, "u": unlabeled.weak}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Each decoder's L_sup, and L_mc = Σ_i Σ_j≠i MSE(p_i, s_j), decoder by decoder i.

        The mean over labeled and unlabeled images is that of one over the labeled and one over the unlabeled ones,
        weighted by their number, so that in memory mode split the graphs of one decoder on one of them suffice.
        """
        samples = {"x": len(labeled.image), "u": len(unlabeled.weak)}
        for image, count in samples.items():
            share = count / sum(samples.values())
            # In memory mode split, decoders whose turn comes later first run once without gradient: they teach already.
            first, *later = reversed(self.decoders)
            logits = {j: outputs.peek(f"{image}_{j}").full_resolution for j in later}
            for i in (first, *later):
                output = outputs[f"{image}_{i}"]
                logits[i] = output.full_resolution.detach()
                others = [z for j, z in logits.items() if j != i]
                terms = {"mutual": share * self._mutual(output.full_resolution, others)}
                if image == "x":
                    terms[_supervised(i)] = self.supervised_loss(output.logits, labeled.target)
                elif i == "a":
                    self.record_prediction(output.logits)
                yield terms
                del output, terms  # the next pass needs their memory

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = λ Σ_i L_sup^i + β(t) L_mc."""
        s = self.settings
        supervised = {_supervised(name): s.supervised_weight for name in self.decoders}
        return supervised | {"mutual": s.mutual_weight * gaussian_ramp_up(progress, length=s.ramp_length)}

    def _mutual(self, logits: Tensor, others: Sequence[Tensor]) -> Tensor:
        s, regions = self.settings, self.label_manager.has_regions
        return mutual_loss(logits, others, temperature=s.temperature, regions=regions, label_gradient=s.label_gradient)


def _supervised(decoder: str) -> str:
    # The supervised term of decoder a is the one that nnU-Net's log shows next to the validation loss.
    return "supervised" if decoder == "a" else f"supervised_{decoder}"


@fused
def mutual_loss(
    logits: Tensor, others: Sequence[Tensor], *, temperature: float, regions: bool, label_gradient: bool
) -> Tensor:
    """Σ_j MSE(p, s_j) of a decoder's probabilities p and the other decoders' soft labels s_j.

    Args:
        logits: the decoder's, (B, C, *spatial).
        others: the other decoders', like ``logits``, without gradient.
        temperature: T.
        regions: sigmoid instead of softmax.
        label_gradient: whether the gradient is that of Σ_j [MSE(p, s_j) + MSE(p_j, s)], where s is the decoder's own
            soft label, to the decoder. Over all decoders these are the gradients of L_mc with nothing held fixed.

    Returns:
        A scalar, float32.
    """
    p, p_of = probabilities(logits, regions=regions), [probabilities(z, regions=regions) for z in others]
    learned = torch.stack([(p - soft_label(p_j, temperature)).square().mean() for p_j in p_of]).sum()
    if not label_gradient:
        return learned
    s = soft_label(p, temperature)
    taught = torch.stack([(p_j - s).square().mean() for p_j in p_of]).sum()
    return learned + (taught - taught.detach())


def soft_label(p: Tensor, temperature: float) -> Tensor:
    """s = p^(1/T) / (p^(1/T) + (1 - p)^(1/T)): each class or region against all else, as the paper has it for two.

    Args:
        p: probabilities, (B, C, *spatial), float32.
        temperature: T.
    """
    # That is the sigmoid of p's logit divided by T. Sharpened, what is nearer to 0 or 1 than the bound is 0 or 1.
    return sharpen(torch.logit(p, eps=1e-6), temperature=temperature, regions=True)
