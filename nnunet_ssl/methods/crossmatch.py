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
    CutMixSettings,
    LabeledBatch,
    Outputs,
    PseudoLabel,
    SemiSupervisedTrainer,
    Stream,
    UnlabeledBatch,
    Views,
    box_mask,
    coverage,
    dice_of_logits,
    gaussian_ramp_up,
    paste,
    pseudo_label,
    setting,
)


@dataclass(frozen=True)
class CrossMatchSettings(CutMixSettings):
    """The paper's values. ``ramp_length`` is a **[choice]**: 0 is the paper's constant weight."""

    confidence_threshold: float = setting(
        0.85, "τ: lowest confidence of a pseudo-label that is used", minimum=0.0, maximum=1.0
    )
    self_distillation: float = setting(
        0.3,
        "η: share of the distillation within a decoder; the rest is from the teacher",
        minimum=0.0,
        maximum=1.0,
    )
    weak_dropout: float = setting(0.25, "channel dropout of the weakly perturbed decoder", minimum=0.0, maximum=0.95)
    strong_dropout: float = setting(
        0.75, "channel dropout of the strongly perturbed decoder", minimum=0.0, maximum=0.95
    )
    perturbations: str = setting(
        "all",
        "all: each step has two strong views and both perturbed decoders, as in the paper; sampled: one strong view "
        "and one perturbed decoder, weak and strong in turn",
        choices=("all", "sampled"),
    )


class CrossMatchTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network with CrossMatch on labeled and unlabeled scans."""

    settings_class = CrossMatchSettings
    settings: CrossMatchSettings

    def unlabeled_views(self) -> Views:
        """A weak view u and two strong views s1 and s2, or one, each with its own CutMix box."""
        s = self.settings
        cutmix = CutMix(s.cutmix_probability, (s.cutmix_min_volume, s.cutmix_max_volume), s.cutmix_aspect_ratio)
        return Views(strong=len(self._strong), cutmix=cutmix)

    def streams(self) -> dict[str, Stream]:
        """Image → decoder, as the paper's figure 2: dn has no feature dropout, dw weak and ds strong, d one of both."""
        perturbed, strong = self._decoders, self._strong
        return {
            "x_dn": Stream("x", deep_supervision=self.enable_deep_supervision),
            "u_dn": Stream("u", gradient=False),
            **{f"u_{decoder}": Stream("u", dropout=p) for decoder, p in perturbed.items()},
            **{f"{view}_dn": Stream(view) for view in strong},
            **{f"{strong[-1]}_{decoder}": Stream(strong[-1], dropout=p) for decoder, p in perturbed.items()},
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
        strong = (paste(view, mask, unlabeled.partner) for view, mask in zip(unlabeled.strong, prepared, strict=True))
        return {"x": labeled.image, "u": unlabeled.weak, **dict(zip(self._strong, strong, strict=True))}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: tuple[Tensor, ...]
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup, L_ip, L_tkd and L_dkd, stream by stream.

        L_ip  = ½ [D(s1→dn, mix1 ŷ) + D(s2→dn, mix2 ŷ)]                              (image perturbation)
        L_tkd = ¼ [D(u→dw, ŷ) + D(u→ds, ŷ) + D(s2→dw, mix2 ŷ) + D(s2→ds, mix2 ŷ)]   (distillation from the teacher)
        L_dkd = ½ [D(s2→dw, mix2 ŷw) + D(s2→ds, mix2 ŷs)]                            (distillation within a decoder)

        Sampled, with one strong view s and one decoder d: L_ip = D(s→dn, mix ŷ), L_tkd = ½ [D(u→d, ŷ) + D(s→d, mix ŷ)],
        L_dkd = D(s→d, mix ŷd). **[choice]** The two strong views are drawn alike, and the decoders take turns, so that
        the expected gradient is the same.
        """
        decoders, strong = self._decoders, self._strong
        yield {"supervised": self.supervised_loss(outputs["x_dn"].logits, labeled.target)}

        self.record_prediction(outputs["u_dn"].logits)
        teacher = self._pseudo_label(outputs["u_dn"].logits)
        self.record("coverage", *coverage(teacher, self.settings.confidence_threshold, structures=self.num_structures))

        own = {}
        for decoder in decoders:
            own[decoder] = self._pseudo_label(outputs[f"u_{decoder}"].logits)
            yield {"tkd": self._dice(outputs[f"u_{decoder}"].logits, teacher) / (2 * len(decoders))}

        for view, mask in zip(strong, prepared, strict=True):
            mixed = self._mix(teacher, mask, unlabeled)
            yield {"ip": self._dice(outputs[f"{view}_dn"].logits, mixed) / len(strong)}

        # The last strong view has the perturbed decoders.
        for decoder in decoders:
            name = f"{strong[-1]}_{decoder}"
            yield {
                "tkd": self._dice(outputs[name].logits, mixed) / (2 * len(decoders)),
                "dkd": self._dice(outputs[name].logits, self._mix(own[decoder], mask, unlabeled)) / len(decoders),
            }

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = L_sup + w(t) [L_ip + (1 - η) L_tkd + η L_dkd].

        **[choice]** The paper has w = 1. nnU-Net starts from scratch and with a larger step, and confident labels
        without any foreground would come first; so w is a Gaussian ramp-up.
        """
        w, eta = gaussian_ramp_up(progress, length=self.settings.ramp_length), self.settings.self_distillation
        return {"supervised": 1.0, "ip": w, "tkd": w * (1 - eta), "dkd": w * eta}

    @property
    def _strong(self) -> tuple[str, ...]:
        return ("s1", "s2") if self.settings.perturbations == "all" else ("s",)

    @property
    def _decoders(self) -> dict[str, float]:
        """The perturbed decoders of this step and their dropout."""
        s = self.settings
        if s.perturbations == "all":
            return {"dw": s.weak_dropout, "ds": s.strong_dropout}
        # Of one name, since a compiled network has a graph for each.
        step = round(self.progress * self.num_epochs * self.num_iterations_per_epoch)
        return {"d": s.strong_dropout if step % 2 else s.weak_dropout}

    def _pseudo_label(self, logits: Tensor) -> PseudoLabel:
        return pseudo_label(logits, regions=self.label_manager.has_regions)

    def _mix(self, label: PseudoLabel, mask: Tensor, unlabeled: UnlabeledBatch) -> PseudoLabel:
        # The confidence is mixed as the label is, so that a voxel keeps the confidence of the label it got.
        return PseudoLabel(*(paste(tensor, mask, unlabeled.partner) for tensor in label))

    def _dice(self, logits: Tensor, label: PseudoLabel) -> Tensor:
        """D: soft Dice over the confident voxels, averaged over foreground classes or regions."""
        return dice_of_logits(logits, label.target, label.confidence >= self.settings.confidence_threshold)
