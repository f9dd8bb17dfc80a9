"""The two batches of a training step, as the loaders make them and as a method sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor
from torch.nn import functional

from nnunet_ssl.data.cutmix import CutMix, paste
from nnunet_ssl.data.predicted_foreground import Aim
from nnunet_ssl.errors import MethodError
from nnunet_ssl.trainer.method_checks import check_target


class LabeledBatch(NamedTuple):
    """A batch of nnU-Net's own loader, on the training device.

    Attributes:
        image: (B, C, *patch size).
        target: (B, 1, *patch size), or with deep supervision a list, full resolution first; regions as in nnU-Net.
        keys: the B cases.
        extra: by name, what the method's :meth:`~nnunet_ssl.trainer.base.SemiSupervisedTrainer.labeled_targets` make:
            tensors or tuples of them.
        weak: the images before their intensities were changed, where :class:`Views` ask for it; else None.

    >>> target = [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4)]  # with deep supervision
    >>> LabeledBatch(torch.zeros(2, 1, 8, 8), target, ["case_1", "case_2"]).full_resolution.shape
    torch.Size([2, 1, 8, 8])
    """

    image: Tensor
    target: Any
    keys: list[str]
    extra: Mapping[str, Any] = MappingProxyType({})
    weak: Tensor | None = None

    @property
    def full_resolution(self) -> Tensor:
        """The target with deep supervision or without."""
        return self.target[0] if isinstance(self.target, list) else self.target

    def pasted(self, mask: Tensor, partner: Tensor) -> LabeledBatch:
        """The batch with another sample's voxels within a mask: of the images, their weak view and all targets.

        ``extra`` stays as it is: what a method has made of the labels cannot be pasted in general.

        Args:
            mask: (B, 1, *patch size), bool, as :func:`~nnunet_ssl.data.cutmix.box_mask` makes it.
            partner: (B,), the index of the sample to fill the mask from.

        >>> batch = LabeledBatch(torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]]), torch.zeros(2, 1, 1, 2), ["a", "b"])
        >>> batch.pasted(torch.tensor([[[[True, False]]], [[[False, False]]]]), torch.tensor([1, 0])).image.tolist()
        [[[[3.0, 2.0]]], [[[3.0, 4.0]]]]
        """

        def of(tensor: Tensor) -> Tensor:
            inside = functional.interpolate(mask.float(), size=tensor.shape[2:], mode="nearest").bool()
            return paste(tensor, inside, partner)

        target = [of(level) for level in self.target] if isinstance(self.target, list) else of(self.target)
        return self._replace(image=of(self.image), target=target, weak=None if self.weak is None else of(self.weak))

    @classmethod
    def from_loader(
        cls, batch: Mapping[str, Any], device: torch.device, *, deep_supervision: bool, weak: bool = False
    ) -> LabeledBatch:
        """Move a batch to the device.

        Args:
            batch: ``data``, ``target`` and ``keys``, as nnU-Net's loader yields them, and ``extra`` where the method
                has targets of its own.
            device: that trains.
            deep_supervision: whether nnU-Net's own targets are a list.
            weak: whether the weak view is appended to the targets.
        """
        for name, made in batch.get("extra", {}).items():
            check_target(made, f"The labeled target {name!r} returns")
        target, weak_view = batch["target"], None
        if weak:
            *target, weak_view = target
            target = target if deep_supervision else target[0]
        return cls(
            image=_moved(batch["data"], device),
            target=_moved(target, device),
            keys=list(batch["keys"]),
            extra={name: _moved(one, device) for name, one in batch.get("extra", {}).items()},
            weak=None if weak_view is None else _moved(weak_view, device),
        )


class UnlabeledBatch(NamedTuple):
    """A batch of :class:`~nnunet_ssl.data.loader.UnlabeledDataLoader`, on the training device.

    Attributes:
        weak: (U, C, *patch size).
        strong: strong views of the same spatial samples, each like ``weak``.
        boxes: per strong view (U, dim, 2), a CutMix box for each sample, empty where it has none.
        augmented: like ``weak``, with nnU-Net's own changes of intensity, where :class:`Views` ask for it; else None.
        partner: (U,), the index of the sample to fill the box from.
        keys: the U cases.
        aims: what each patch was centered on; empty where all were cropped at random.
        coordinates: subsampled coordinates of the voxels in their case, on the host, where ``aims`` has entries.

    >>> u, boxes = torch.zeros(2, 1, 8, 8), torch.tensor([[[0, 4], [0, 4]], [[0, 0], [0, 0]]])  # one is empty
    >>> batch = UnlabeledBatch(u, strong=[u], boxes=[boxes], partner=torch.tensor([1, 0]), keys=["case_3", "case_4"])
    >>> len(batch.strong), batch.augmented
    (1, None)
    """

    weak: Tensor
    strong: list[Tensor]
    boxes: list[Tensor]
    partner: Tensor
    keys: list[str]
    augmented: Tensor | None = None
    aims: Sequence[Aim] = ()
    coordinates: Tensor | None = None

    @classmethod
    def from_loader(cls, batch: Mapping[str, Any], device: torch.device) -> UnlabeledBatch:
        """Move a batch to the device; the coordinates stay on the host, where they are read."""
        return cls(
            weak=_moved(batch["weak"], device),
            strong=[_moved(view, device) for view in batch["strong"]],
            boxes=[_moved(boxes, device) for boxes in batch["boxes"]],
            partner=_moved(batch["partner"], device),
            keys=list(batch["keys"]),
            augmented=None if batch.get("augmented") is None else _moved(batch["augmented"], device),
            # batchgenerators makes plain tuples of them when it pins memory.
            aims=[Aim(*aim) for aim in batch.get("aims", [])],
            coordinates=batch.get("coordinates"),
        )


@dataclass(frozen=True)
class Views:
    """Which views of a patch a method asks for, in addition to the weak one of unlabeled patches.

    Attributes:
        strong: number of strong views of unlabeled patches.
        cutmix: how the boxes of strong views are drawn.
        augmented: whether there is a view of unlabeled patches with nnU-Net's own complete augmentation, as labeled
            images have it. Mix labeled images with this one: both parts are then augmented alike.
        weak_labeled: whether labeled patches have a weak view too.

    >>> Views(strong=2, cutmix=CutMix(probability=0.5)).augmented
    False
    >>> Views(cutmix=CutMix())
    Traceback (most recent call last):
    ValueError: Views(cutmix=...) draws boxes of strong views: ask for some with strong=1 or more.
    """

    strong: int = 0
    cutmix: CutMix | None = None
    augmented: bool = False
    weak_labeled: bool = False

    def __post_init__(self) -> None:
        if type(self.strong) is not int or self.strong < 0:
            raise ValueError(f"strong is {self.strong!r}; it is a number of views, 0 or more.")
        for name in ("augmented", "weak_labeled"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is True or False.")
        if not (self.cutmix is None or isinstance(self.cutmix, CutMix)):
            raise ValueError(f"cutmix is {self.cutmix!r}; give a CutMix, such as CutMix(probability=0.5).")
        if self.cutmix is not None and self.strong == 0:
            raise ValueError("Views(cutmix=...) draws boxes of strong views: ask for some with strong=1 or more.")


def label_of(target: Tensor, labels: LabelManager) -> Tensor:
    """The label as losses and pseudo-labels have it, with background where it is the ignore label.

    Args:
        target: nnU-Net's, of full resolution; with regions, its last channel is the ignore label, if there is one.
        labels: nnU-Net's label manager.

    Returns:
        Classes (B, 1, *patch size), integer, or regions (B, R, *patch size), bool.
    """
    if labels.has_regions:
        return target[:, : labels.num_segmentation_heads] > 0
    return target.masked_fill(target == labels.ignore_label, 0) if labels.has_ignore_label else target


def known_voxels(target: Tensor, labels: LabelManager) -> Tensor | None:
    """Where the label is not the ignore label: (B, 1, *patch size), bool; None for a dataset without one.

    Arguments as for :func:`label_of`.
    """
    if not labels.has_ignore_label:
        return None
    return target[:, -1:] == 0 if labels.has_regions else target != labels.ignore_label


def of_equal_resolutions(output: Any, target: Any, loss: Any) -> tuple[Any, Any]:
    """Output and target of nnU-Net's loss as they are, if both are of one size, and of one resolution or of several.

    Args:
        output: one tensor or a list.
        target: one tensor or a list.
        loss: nnU-Net's; that of deep supervision wants lists.

    Raises:
        MethodError: only one is a list; or none is, but the loss wants lists; or their sizes differ.
    """
    several = isinstance(getattr(loss, "own", loss), DeepSupervisionWrapper)
    lists = {"output": isinstance(output, (list, tuple)), "target": isinstance(target, (list, tuple))}
    advice = (
        "Ask for the stream with deep_supervision=self.enable_deep_supervision, and give output.logits and "
        "labeled.target."
    )
    if len(set(lists.values())) > 1 or (several and not all(lists.values())):
        kinds = [f"{'a list of resolutions' if one else 'one tensor'} as {name}" for name, one in lists.items()]
        raise MethodError(f"supervised_loss() gets {' and '.join(kinds)}. {advice}")
    sizes = [tuple((one[0] if isinstance(one, (list, tuple)) else one).shape[2:]) for one in (output, target)]
    if len(set(sizes)) > 1:
        raise MethodError(f"supervised_loss() gets an output of {sizes[0]} voxels and a target of {sizes[1]}. {advice}")
    return output, target


def _moved(tensors: Any, device: torch.device) -> Any:
    """A tensor, or a list or tuple of tensors, on the device."""
    if isinstance(tensors, (list, tuple)):
        # Of a named tuple, batchgenerators makes a plain one when it pins memory; so does this.
        kind = list if isinstance(tensors, list) else tuple
        return kind(_moved(tensor, device) for tensor in tensors)
    return tensors.to(device, non_blocking=True)
