"""UniMatch: what is predicted on a weak view is the label of strong views and of perturbed features.

Source: Yang, Qi, Feng, Zhang, Shi, Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation, CVPR
2023, arXiv 2208.09910. Settings make it FixMatch (Sohn et al., NeurIPS 2020, arXiv 2001.07685), with one strong view
and no perturbed features, or give it the threshold of FreeMatch (Wang et al., ICLR 2023, arXiv 2205.07246).

Where this differs from the paper, **[choice]** says so; docs/explanation/unimatch.md lists the differences from the
authors' released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_ssl.api import (
    CutMix,
    CutMixSettings,
    LabeledBatch,
    Outputs,
    PseudoLabel,
    SemiSupervisedTrainer,
    Stream,
    TrainingNetwork,
    UNet,
    UnlabeledBatch,
    Views,
    box_mask,
    coverage,
    dice_of_logits,
    gaussian_ramp_up,
    num_processes,
    paste,
    probabilities,
    pseudo_label,
    setting,
    sum_over_ranks,
)


@dataclass(frozen=True)
class UniMatchSettings(CutMixSettings):
    """The paper's values. ``ramp_length`` is a **[choice]**: 0 is the paper's constant weight."""

    confidence_threshold: float = setting(
        0.95, "τ: the least confidence of a pseudo-label that is learned from", minimum=0.0, maximum=1.0
    )
    strong_views: int = setting(2, "strong views of each unlabeled patch; 1 is FixMatch's", choices=(1, 2))
    feature_weight: float = setting(
        0.5,
        "μ: share of the unsupervised loss that goes to perturbed features; 0 is FixMatch's",
        minimum=0.0,
        maximum=1.0,
    )
    feature_dropout: float = setting(0.5, "channel dropout that perturbs the features", minimum=0.0, maximum=0.95)
    adaptive_threshold: bool = setting(
        False, "FreeMatch's threshold for each class, from moving averages, instead of τ", choices=(True, False)
    )
    threshold_decay: float = setting(0.999, "λ: decay of these moving averages", minimum=0.0, maximum=1.0)


class ThresholdNetwork(TrainingNetwork):
    """nnU-Net's network with FreeMatch's moving averages, which checkpoints keep.

    Args:
        network: that nnU-Net built.
        channels: C classes, background included, or R regions.
        regions: whether they are regions. **[choice]** Each is a problem of two classes: its complement and itself.

    Attributes:
        confidence: τ_t, the mean confidence; a scalar.
        frequency: p̃_t, the mean probability of each class: (1, C), or of each region's two classes: (R, 2).
    """

    confidence: Tensor
    frequency: Tensor

    def __init__(self, network: UNet, channels: int, *, regions: bool) -> None:
        super().__init__(network)
        groups, classes = (channels, 2) if regions else (1, channels)
        self.register_buffer("confidence", torch.tensor(1 / classes))
        self.register_buffer("frequency", torch.full((groups, classes), 1 / classes))

    @torch.no_grad()
    def follow(self, confidence: Tensor, frequency: Tensor, decay: float) -> None:
        """τ_t = λ τ_t-1 + (1 - λ) mean c, and p̃_t = λ p̃_t-1 + (1 - λ) mean p."""
        self.confidence.lerp_(confidence, 1 - decay)
        self.frequency.lerp_(frequency, 1 - decay)


class UniMatchTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network with UniMatch on labeled and unlabeled scans."""

    settings_class = UniMatchSettings
    settings: UniMatchSettings
    _batch_means: tuple[Tensor, Tensor]

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """nnU-Net's network, with FreeMatch's moving averages if they are wanted."""
        if not self.settings.adaptive_threshold:
            return TrainingNetwork(network)
        labels = self.label_manager
        return ThresholdNetwork(network, labels.num_segmentation_heads, regions=labels.has_regions)

    def unlabeled_views(self) -> Views:
        """A weak view u and the strong views s1 and s2, each with its own CutMix box."""
        s = self.settings
        cutmix = CutMix(s.cutmix_probability, (s.cutmix_min_volume, s.cutmix_max_volume), s.cutmix_aspect_ratio)
        return Views(strong=s.strong_views, cutmix=cutmix)

    def streams(self) -> dict[str, Stream]:
        """The labeled images, the weak view as it is and with perturbed features, the strong views."""
        streams = {"x": Stream("x", deep_supervision=self.enable_deep_supervision), "u": Stream("u", gradient=False)}
        if self.settings.feature_weight > 0:
            streams["u_dropped"] = Stream("u", dropout=self.settings.feature_dropout)
        return streams | {name: Stream(name) for name in self._strong}

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> tuple[Tensor, ...]:
        """Where the boxes of the strong views are, (U, 1, *patch size), bool."""
        return tuple(box_mask(boxes, unlabeled.weak.shape[2:]) for boxes in unlabeled.boxes)

    def images(
        self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """The strong views with their boxes filled from another sample of the batch.

        **[choice]** The authors fill them from a second unlabeled batch, and run the network on it once more.
        """
        strong = [paste(view, mask, unlabeled.partner) for view, mask in zip(unlabeled.strong, prepared, strict=True)]
        return {"x": labeled.image, "u": unlabeled.weak, **dict(zip(self._strong, strong, strict=True))}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: tuple[Tensor, ...]
    ) -> Iterator[dict[str, Tensor]]:
        """L_sup; and over the voxels whose pseudo-label ŷ is confident, its Dice loss with

        strong   = ½ [D(s1, mix1 ŷ) + D(s2, mix2 ŷ)]
        features = D(u with perturbed features, ŷ)
        """
        yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}

        weak = outputs["u"].logits
        self.record_prediction(weak)
        label = pseudo_label(weak, regions=self.label_manager.has_regions)
        threshold = self._threshold(weak, label)
        self.record("coverage", *coverage(label, threshold, structures=self.num_structures))
        target, confident = label.target, label.confidence >= threshold

        if self.settings.feature_weight > 0:
            yield {"features": dice_of_logits(outputs["u_dropped"].logits, target, confident)}
        for name, mask in zip(self._strong, prepared, strict=True):
            mixed, where = (paste(one, mask, unlabeled.partner) for one in (target, confident))
            yield {"strong": dice_of_logits(outputs[name].logits, mixed, where) / len(prepared)}

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = L_sup + w(t) [(1 - μ) strong + μ features].

        **[choice]** The paper has w = 1 relative to L_sup. nnU-Net starts from scratch and with a larger step, and
        confident labels without any foreground would come first; so w is a Gaussian ramp-up.
        """
        w, mu = gaussian_ramp_up(progress, length=self.settings.ramp_length), self.settings.feature_weight
        return {"supervised": 1.0, "strong": w * (1 - mu)} | ({"features": w * mu} if mu > 0 else {})

    def after_optimizer_step(self) -> None:
        """Move FreeMatch's averages. **[choice]** After the step: a batch is not judged by what it has itself moved."""
        network = self.training_network
        if isinstance(network, ThresholdNetwork):
            network.follow(*self._batch_means, self.settings.threshold_decay)

    @property
    def _strong(self) -> list[str]:
        return [f"s{number + 1}" for number in range(self.settings.strong_views)]

    def _threshold(self, logits: Tensor, label: PseudoLabel) -> float | Tensor:
        network = self.training_network
        if not isinstance(network, ThresholdNetwork):
            return self.settings.confidence_threshold
        self._batch_means = batch_means(logits, label.confidence, regions=self.label_manager.has_regions)
        return class_thresholds(label.target, network.confidence, network.frequency)


def class_thresholds(target: Tensor, confidence: Tensor, frequency: Tensor) -> Tensor:
    """τ_t(k) = τ_t p̃_t(k) / max p̃_t for the class k that a voxel is predicted as.

    Args:
        target: of a pseudo-label: classes (U, 1, *spatial), or regions (U, R, *spatial), bool.
        confidence: τ_t, a scalar.
        frequency: p̃_t, (1, C) or (R, 2).

    Returns:
        Like ``target``, float32.
    """
    table = confidence * frequency / frequency.amax(1, keepdim=True)
    if target.dtype != torch.bool:
        return table[0][target.long()]
    of_complement, of_region = table.view(-1, 2, *[1] * (target.ndim - 2)).unbind(1)
    return torch.where(target, of_region, of_complement)


@torch.no_grad()
def batch_means(logits: Tensor, confidence: Tensor, *, regions: bool) -> tuple[Tensor, Tensor]:
    """Mean confidence, and mean probability of each class, over all voxels of the batch and all ranks.

    Args:
        logits: (U, C, *spatial).
        confidence: of their pseudo-label.

    Returns:
        A scalar, and (1, C); of regions (R, 2).
    """
    mean = probabilities(logits, regions=regions).mean([0, *range(2, logits.ndim)])
    frequency = torch.stack((1 - mean, mean), 1) if regions else mean[None]
    return sum_over_ranks(confidence.mean()) / num_processes(), sum_over_ranks(frequency) / num_processes()
