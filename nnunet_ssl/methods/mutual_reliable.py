"""Mutual learning with reliable pseudo labels: decoders of one encoder teach each other where they are reliable.

Source: Su, Luo, Lian, Lin, Li, Mutual learning with reliable pseudo label for semi-supervised medical image
segmentation, Medical Image Analysis 94, 2024, 103111, doi 10.1016/j.media.2024.103111.

Decoder a is nnU-Net's, with transposed convolutions; decoder b has its stages, weights of its own, and interpolation.
Both see labeled and unlabeled images. Decoder a predicts, so the network that predicts is nnU-Net's own.

Where this differs from the paper, **[choice]** says so; docs/explanation/mutual_reliable.md lists the differences from
the authors' released code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

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
    Views,
    fused,
    gaussian_ramp_up,
    interpolating_decoder,
    num_processes,
    ramp_length_setting,
    setting,
    sum_over_ranks,
    voxelwise_cross_entropy,
)


@dataclass(frozen=True)
class MutualReliableSettings(SemiSupervisedSettings):
    """The paper's values; the ramp-up is 40 % of the training."""

    ramp_length: float = ramp_length_setting(0.4)
    supervised_weight: float = setting(0.5, "γ: weight of each decoder's supervised loss", minimum=0.0)
    mutual_weight: float = setting(1.0, "β: weight of the loss between the decoders, after the ramp", minimum=0.0)
    decoders: int = setting(
        2,
        "2: decoders a and b; 3: also c, which uses the interpolation that b does not use",
        choices=(2, 3),
        integer=True,
    )
    upsampling: str = setting("linear", "how decoder b interpolates", choices=("linear", "nearest"))
    certainty_weight: bool = setting(
        True, "λ_wr: learn only where the other decoder is more certain", choices=(True, False)
    )
    similarity_weight: bool = setting(
        True, "λ_hr: learn less where the other decoder's features contradict its probabilities", choices=(True, False)
    )
    student_view: str = setting(
        "weak",
        "unlabeled images on which a decoder learns; weak: those on which the others teach; strong: their strong view",
        choices=("weak", "strong"),
    )
    validate_with: str = setting(
        "decoder_a",
        "what the validation after the training evaluates; decoder_a: the decoder that predicts; mean: for "
        "comparison, the mean probability of all decoders",
        choices=("decoder_a", "mean"),
    )


# Products that one of a matrix of all voxels is divided into on a GPU: about two for each of its multiprocessors.
_PARTS = 256


class Lesson(NamedTuple):
    """What a decoder teaches the others about a batch of images. Nothing of it carries a gradient.

    One channel, K = 1, for classes that exclude each other; K = R channels for regions that may overlap.

    Attributes:
        label: pseudo-label ŷ: (B, 1, *spatial) int64, the class; or (B, R, *spatial) bool.
        entropy: H(p), (B, K, *spatial), float32, in nats.
        reliability: λ_hr, (B, K, *spatial), float32, in [0, 1].
    """

    label: Tensor
    entropy: Tensor
    reliability: Tensor


class MutualReliableTrainer(SemiSupervisedTrainer):
    """Train nnU-Net's network by mutual learning on labeled and unlabeled scans."""

    settings_class = MutualReliableSettings
    settings: MutualReliableSettings

    @property
    def decoders(self) -> dict[str, str | None]:
        """The decoders' names in the equations and in the training network: a is nnU-Net's own."""
        return {"a": None, "b": "b", "c": "c"} if self.settings.decoders == 3 else {"a": None, "b": "b"}

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """Decoder b interpolates linearly or from the nearest voxel. **[choice]** Decoder c does the other."""
        ways = [self.settings.upsampling, "nearest" if self.settings.upsampling == "linear" else "linear"]
        others = {
            name: interpolating_decoder(network.decoder, upsampling=way)
            for name, way in zip(list(self.decoders)[1:], ways, strict=False)
        }
        return MutualNetwork(network, others, regions=self.label_manager.has_regions)

    @property
    def _strong(self) -> bool:
        return self.settings.student_view == "strong"

    def unlabeled_views(self) -> Views:
        """The weak view u, and a strong one s where decoders are to learn on it."""
        return Views(strong=int(self._strong))

    def streams(self) -> dict[str, Stream]:
        """Every decoder on labeled and unlabeled images; with strong views it learns on those, and teaches on u."""
        return {
            f"{image}_{name}": Stream(
                image,
                decoder=decoder,
                deep_supervision=image == "x" and self.enable_deep_supervision,
                features=True,
                gradient=not (image == "u" and self._strong),
            )
            for image in ("x", "u", *(("s",) if self._strong else ()))
            for name, decoder in self.decoders.items()
        }

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        """Labeled images with nnU-Net's augmentation, unlabeled ones in their weak view, and their strong one s.

        **[choice]** As a setting, decoders learn on s what the others teach on u: changes that they may disagree on.
        """
        images = {"x": labeled.image, "u": unlabeled.weak}
        return images | {"s": unlabeled.strong[0]} if self._strong else images

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Each decoder's L_sup, and L_i←j for each student i and teacher j.

        **[choice]** The paper's sums run over labeled and unlabeled voxels together. Here L_i←j is the mean of one over
        the labeled and one over the unlabeled images, weighted by their number, so that in memory mode split the
        graphs of one decoder on one of them suffice. λ_wr compares decoders on u, even if they learn on s.
        """
        samples = {"x": len(labeled.image), "u": len(unlabeled.weak)}
        for image, count in samples.items():
            share = count / sum(samples.values())
            # Decoders scheduled later first run once without gradient in memory mode split, so that they teach already.
            # Decoder a, whose pass costs least, comes last.
            first, *later = reversed(self.decoders)
            learned_on = "s" if image == "u" and self._strong else image
            lessons = {}
            for j in later if learned_on == image else (first, *later):
                teacher = outputs.peek(f"{image}_{j}")
                lessons[j] = self._lesson(teacher)
                if image == "u" and j == "a":
                    self.record_prediction(teacher.full_resolution)
                del teacher
            for i in (first, *later):
                output = outputs[f"{learned_on}_{i}"]
                if i not in lessons:
                    lessons[i] = self._lesson(output.detach())
                terms = {}
                if image == "x":
                    terms[_supervised(i)] = self.supervised_loss(output.logits, labeled.target)
                for j in self.decoders:
                    if j != i:
                        terms[f"{i}_from_{j}"] = share * self._learn(f"{i}_from_{j}", output, lessons[i], lessons[j])
                yield terms
                # The next pass needs their memory.
                del output, terms

    def loss_weights(self, progress: float) -> dict[str, float]:
        """L = γ Σ_i L_sup^i + β(t) Σ_i Σ_j≠i L_i←j / (n - 1), n decoders; the paper's for n = 2.

        **[choice]** β(t) is a Gaussian ramp-up; with three decoders, each student learns from the mean of its teachers.
        """
        beta = self.settings.mutual_weight * gaussian_ramp_up(progress, length=self.settings.ramp_length)
        names = list(self.decoders)
        weights = {_supervised(name): self.settings.supervised_weight for name in names}
        return weights | {f"{i}_from_{j}": beta / (len(names) - 1) for i in names for j in names if j != i}

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnU-Net; with the setting ``validate_with: mean``, of all decoders' mean probability."""
        network = self.training_network
        assert isinstance(network, MutualNetwork)
        network.average = self.settings.validate_with == "mean"
        if network.average:
            self.print_to_log_file(
                "Validation of the decoders' mean probability (validate_with): nnUNetv2_predict uses only decoder a."
            )
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            network.average = False

    def _lesson(self, output: StreamOutput) -> Lesson:
        assert output.features is not None
        return lesson(output.full_resolution, output.features, regions=self.label_manager.has_regions)

    def _learn(self, name: str, output: StreamOutput, student: Lesson, teacher: Lesson) -> Tensor:
        s = self.settings
        learning = learn(
            output.full_resolution,
            student,
            teacher,
            certainty_weight=s.certainty_weight,
            similarity_weight=s.similarity_weight,
        )
        learned = learning.learned
        self.record(f"learned/{name}", learned, learned.new_full((), student.entropy.numel()))
        self.record(f"reliability/{name}", learning.reliability, learned.float())
        return learning.loss


class MutualNetwork(TrainingNetwork):
    """A network that can also predict the mean probability of all its decoders, for comparison.

    Attributes:
        average: whether it does.
    """

    def __init__(self, network: nn.Module, decoders: Mapping[str, nn.Module], *, regions: bool) -> None:
        super().__init__(network, decoders=decoders)
        self.regions = regions
        self.average = False

    def predict(self, image: Tensor) -> Tensor | list[Tensor]:
        """nnU-Net's logits; with ``average``, of the full resolution, logits of the decoders' mean probabilities."""
        if not self.average:
            return super().predict(image)
        skips = self.encoder(image)
        logits = torch.stack([decoder(skips).float() for decoder in (self.decoder, *self.training_only.values())])
        if self.regions:
            return torch.logit(torch.sigmoid(logits).mean(0), eps=1e-6)
        return torch.logsumexp(torch.log_softmax(logits, 2), 0)


def _supervised(decoder: str) -> str:
    # The supervised term of decoder a is the one that nnU-Net's log shows next to the validation loss.
    return "supervised" if decoder == "a" else f"supervised_{decoder}"


@torch.no_grad()
@fused
def lesson(logits: Tensor, features: Tensor, *, regions: bool) -> Lesson:
    """A decoder's pseudo-label ŷ, its entropy H(p) and its reliability λ_hr.

    H(p) = -Σ_k p_k log p_k; of a region -p log p - (1 - p) log(1 - p).

    λ_hr = mean_k [1 - (s_k - p_k)²], clamped to [0, 1], s_k the cosine of a voxel's features to class k's prototype.
    **[choice]** nnU-Net's features come from a LeakyReLU, so a cosine may be negative and the mean with it; hence the
    clamp. **[choice]** Regions have a λ_hr each, without the mean.

    Args:
        logits: (B, C, *spatial).
        features: (B, F, *spatial).
    """
    # A sum over a volume ends beyond half precision.
    with torch.autocast(logits.device.type, enabled=False):
        logits, features = logits.float(), features.float()
        if regions:
            p = torch.sigmoid(logits)
            label = p > 0.5
            members = label
            entropy = functional.softplus(logits) - logits * p
        else:
            log_p = torch.log_softmax(logits, 1)
            p = log_p.exp()
            label = logits.max(1, keepdim=True).indices  # on a CPU many times faster than argmax
            members = label == torch.arange(logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
            entropy = -(p * log_p).sum(1, keepdim=True)
        agreement = 1 - (cosine_to_prototypes(features, members) - p).square()
        if not regions:
            agreement = agreement.mean(1, keepdim=True)
    return Lesson(label, entropy, agreement.clamp(0, 1))


def cosine_to_prototypes(features: Tensor, members: Tensor) -> Tensor:
    """Cosine between each voxel's features and the mean features of each class's voxels, sample by sample.

    Args:
        features: (B, F, *spatial), float32.
        members: (B, K, *spatial), bool, the voxels that are predicted as class or region k.

    Returns:
        (B, K, *spatial); **[choice]** 0 for a class without voxels, whose prototype is 0.
    """
    f = features.flatten(2)
    # A prototype's length does not matter to the cosine, so the sum does for the mean.
    parts = 1 if f.device.type == "cpu" else _PARTS
    prototypes = sums_over_members(f, members.flatten(2).to(f.dtype), parts=parts)
    similarity = torch.bmm(functional.normalize(prototypes, dim=2), f)
    # Channel by channel: a norm over them is many times slower on a CPU, and their squares are as large as they are.
    squares = torch.zeros_like(f[:, 0])
    for channel in f.unbind(1):
        squares.addcmul_(channel, channel)
    return (similarity / squares.sqrt().clamp(min=1e-8)[:, None]).unflatten(2, features.shape[2:])


def sums_over_members(features: Tensor, members: Tensor, *, parts: int) -> Tensor:
    """Sum of the features of each class's voxels, sample by sample.

    As one product per sample, of few rows and columns and millions of voxels between, it would occupy two blocks of a
    GPU. As many products of a part of the voxels each, added up, it occupies all; on a CPU that is no faster.

    Args:
        features: (B, F, V).
        members: (B, K, V), of the same type, 1 where a voxel belongs to a class and 0 elsewhere.
        parts: into how many the voxels are divided; what is left over is one more.

    Returns:
        (B, K, F).
    """
    size = features.shape[2] // parts
    if parts == 1 or size == 0:
        return torch.bmm(members, features.transpose(1, 2))
    sums = []
    for f, m in zip(features, members, strict=True):
        # Views: of a sample, but not of the batch, the parts are an axis without a copy.
        divided_f, divided_m = (tensor[:, : size * parts].unflatten(1, (parts, size)) for tensor in (f, m))
        total = torch.bmm(divided_m.transpose(0, 1), divided_f.permute(1, 2, 0)).sum(0)
        sums.append(total.addmm(m[:, size * parts :], f[:, size * parts :].t()))
    return torch.stack(sums)


class Learning(NamedTuple):
    """What a student learns from a teacher.

    Attributes:
        loss: L_i←j, a scalar.
        learned: Σ λ_wr, int64: how many voxels it learns from.
        reliability: Σ λ_wr λ_hr.
    """

    loss: Tensor
    learned: Tensor
    reliability: Tensor


@fused
def learn(
    logits: Tensor, student: Lesson, teacher: Lesson, *, certainty_weight: bool, similarity_weight: bool
) -> Learning:
    """L_i←j of the student's logits z_i, (B, C, *spatial), where λ_wr = 1 if H(p_i) > H(p_j), else 0.

    Args:
        logits: z_i.
        student: what the student itself teaches.
        teacher: what the teacher teaches.
        certainty_weight: False for λ_wr = 1 everywhere.
        similarity_weight: False for λ_hr = 1 everywhere.
    """
    certain = student.entropy > teacher.entropy
    if not certainty_weight:
        certain = torch.ones_like(certain)
    reliable = teacher.reliability if similarity_weight else torch.ones_like(teacher.reliability)
    return Learning(mutual_loss(logits, teacher.label, certain, reliable), certain.sum(), (certain * reliable).sum())


def mutual_loss(logits: Tensor, label: Tensor, certain: Tensor, reliable: Tensor) -> Tensor:
    """L_i←j = Σ λ_wr λ_hr CE(z_i, ŷ_j) / (Σ λ_wr + 1e-6); of regions, binary cross-entropy channel by channel.

    Cross-entropy takes logits.

    Args:
        logits: z_i, (B, C, *spatial).
        label: ŷ_j: (B, 1, *spatial) int64, or (B, C, *spatial) bool for regions.
        certain: λ_wr, (B, 1, *spatial), or (B, C, *spatial) for regions; bool.
        reliable: λ_hr, like ``certain``; float.

    Returns:
        A scalar, float32; 0 where nothing is certain.
    """
    loss = voxelwise_cross_entropy(logits, label)
    # Each of several processes has a part of the batch, and the mean over them is the loss.
    return num_processes() * (certain * reliable * loss).sum() / (sum_over_ranks(certain.sum()) + 1e-6)
