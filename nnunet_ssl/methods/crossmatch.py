"""CrossMatch: self-training with image and feature perturbations of different strength.

Source: Zhao, Wang, Ding, CrossMatch: Enhance Semi-Supervised Medical Image Segmentation with Perturbation Strategies
and Knowledge Distillation, IEEE JBHI 2024, doi 10.1109/JBHI.2024.3463711, arXiv 2405.00354.

The paper's two encoders are one encoder on weakly and on strongly changed images; its three decoders are one decoder
on features with no, weak and strong dropout. Dropout has no parameters, so the trained network is nnU-Net's own.

Where this differs from the paper, **[choice]** says so; docs/explanation/crossmatch.md lists the differences from the
authors' released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from nnunet_ssl.api import (
    CutMix,
    LabeledBatch,
    Outputs,
    PseudoLabel,
    SemiSupervisedSettings,
    SemiSupervisedTrainer,
    Stream,
    UnlabeledBatch,
    UserError,
    Views,
    box_mask,
    coverage,
    foreground_probabilities,
    fused,
    gaussian_ramp_up,
    masked_dice_loss,
    paste,
    pseudo_label,
    setting,
)


@dataclass(frozen=True)
class CrossMatchSettings(SemiSupervisedSettings):
    """The paper's values. ``ramp_length`` is a **[choice]**: 0 is the paper's constant weight."""

    confidence_threshold: float = setting(
        0.85, "τ: the least confidence of a pseudo-label that is learned from", minimum=0.0, maximum=1.0
    )
    self_distillation: float = setting(
        0.3,
        "η: share of the distillation that goes within a decoder instead of from the teacher",
        minimum=0.0,
        maximum=1.0,
    )
    weak_dropout: float = setting(0.25, "channel dropout of the weakly perturbed decoder", minimum=0.0, maximum=0.95)
    strong_dropout: float = setting(0.75, "channel dropout of the strongly perturbed one", minimum=0.0, maximum=0.95)
    cutmix_probability: float = setting(0.5, "share of strong views that get a CutMix box", minimum=0.0, maximum=1.0)
    cutmix_min_volume: float = setting(0.02, "smallest share of the patch in a box", minimum=0.001, maximum=0.9)
    cutmix_max_volume: float = setting(0.4, "largest share of the patch in a box", minimum=0.001, maximum=0.9)
    cutmix_aspect_ratio: float = setting(0.3, "smallest ratio between two sides of a box", minimum=0.05, maximum=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutmix_min_volume > self.cutmix_max_volume:
            raise UserError(
                f"The setting 'cutmix_min_volume' in the plans' 'semi_supervised' is {self.cutmix_min_volume!r}; it "
                f"must not be above 'cutmix_max_volume', which is {self.cutmix_max_volume!r}."
            )


class CrossMatchTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network with CrossMatch on labeled and unlabeled scans."""

    settings_class = CrossMatchSettings
    settings: CrossMatchSettings

    def unlabeled_views(self) -> Views:
        """A weak view u and two strong views s1 and s2, each with its own CutMix box."""
        s = self.settings
        cutmix = CutMix(s.cutmix_probability, (s.cutmix_min_volume, s.cutmix_max_volume), s.cutmix_aspect_ratio)
        return Views(strong=2, cutmix=cutmix)

    def streams(self) -> dict[str, Stream]:
        """Image → decoder, as the paper's figure 2: dn has no feature dropout, dw weak and ds strong one."""
        weak, strong = self.settings.weak_dropout, self.settings.strong_dropout
        return {
            "x_dn": Stream("x", deep_supervision=self.enable_deep_supervision),
            "u_dn": Stream("u", gradient=False),
            "u_dw": Stream("u", dropout=weak),
            "u_ds": Stream("u", dropout=strong),
            "s1_dn": Stream("s1"),
            "s2_dn": Stream("s2"),
            "s2_dw": Stream("s2", dropout=weak),
            "s2_ds": Stream("s2", dropout=strong),
        }

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> tuple[Tensor, ...]:
        """mix1 and mix2: where the boxes of the strong views are, (U, 1, *patch size), bool."""
        return tuple(box_mask(boxes, unlabeled.weak.shape[2:]) for boxes in unlabeled.boxes)

    def images(
        self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """The strong views with their boxes filled from another sample of the batch.

        **[choice]** The authors fill them from a second unlabeled batch, and run the network on it once more.
        """
        s1, s2 = (paste(view, mask, unlabeled.partner) for view, mask in zip(unlabeled.strong, prepared, strict=True))
        return {"x": labeled.image, "u": unlabeled.weak, "s1": s1, "s2": s2}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: tuple[Tensor, ...]
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup, L_ip, L_tkd and L_dkd, stream by stream.

        L_ip  = ½ [D(s1→dn, mix1 ŷ) + D(s2→dn, mix2 ŷ)]                              (image perturbation)
        L_tkd = ¼ [D(u→dw, ŷ) + D(u→ds, ŷ) + D(s2→dw, mix2 ŷ) + D(s2→ds, mix2 ŷ)]   (distillation from the teacher)
        L_dkd = ½ [D(s2→dw, mix2 ŷw) + D(s2→ds, mix2 ŷs)]                            (distillation within a decoder)
        """
        mix1, mix2 = prepared

        yield {"supervised": self.supervised_loss(outputs["x_dn"].logits, labeled.target)}

        self.record_prediction(outputs["u_dn"].logits)
        teacher = self._pseudo_label(outputs["u_dn"].logits)
        self.record("coverage", *coverage(teacher, self.settings.confidence_threshold, structures=self.num_structures))

        weak = self._pseudo_label(outputs["u_dw"].logits)
        yield {"tkd": self._dice(outputs["u_dw"].logits, teacher) / 4}
        strong = self._pseudo_label(outputs["u_ds"].logits)
        yield {"tkd": self._dice(outputs["u_ds"].logits, teacher) / 4}

        yield {"ip": self._dice(outputs["s1_dn"].logits, self._mix(teacher, mix1, unlabeled)) / 2}

        teacher = self._mix(teacher, mix2, unlabeled)
        yield {"ip": self._dice(outputs["s2_dn"].logits, teacher) / 2}
        for decoder, own in (("s2_dw", weak), ("s2_ds", strong)):
            yield {
                "tkd": self._dice(outputs[decoder].logits, teacher) / 4,
                "dkd": self._dice(outputs[decoder].logits, self._mix(own, mix2, unlabeled)) / 2,
            }

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = L_sup + w(t) [L_ip + (1 - η) L_tkd + η L_dkd].

        **[choice]** The paper has w = 1. nnU-Net starts from scratch and with a larger step, and confident labels
        without any foreground would come first; so w is a Gaussian ramp-up.
        """
        w, eta = gaussian_ramp_up(progress, length=self.settings.ramp_length), self.settings.self_distillation
        return {"supervised": 1.0, "ip": w, "tkd": w * (1 - eta), "dkd": w * eta}

    def _pseudo_label(self, logits: Tensor) -> PseudoLabel:
        return pseudo_label(logits, regions=self.label_manager.has_regions)

    def _mix(self, label: PseudoLabel, mask: Tensor, unlabeled: UnlabeledBatch) -> PseudoLabel:
        # The confidence is mixed as the label is, so that a voxel keeps the confidence of the label it got.
        return PseudoLabel(*(paste(tensor, mask, unlabeled.partner) for tensor in label))

    def _dice(self, logits: Tensor, label: PseudoLabel) -> Tensor:
        confident = label.confidence >= self.settings.confidence_threshold
        return dice(logits, label.target, confident, regions=self.label_manager.has_regions)


@fused
def dice(logits: Tensor, target: Tensor, confident: Tensor, *, regions: bool) -> Tensor:
    """D: soft Dice over the confident voxels, averaged over foreground classes or regions.

    Args:
        logits: (B, C, *spatial).
        target: of a pseudo-label.
        confident: bool, of the shape of its confidence.
    """
    return masked_dice_loss(foreground_probabilities(logits, regions=regions), target, confident)
