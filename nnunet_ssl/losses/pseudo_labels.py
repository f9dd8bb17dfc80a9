"""Predictions of the network taken as labels, without gradient.

Two kinds of labels, as in nnU-Net: classes that exclude each other (softmax) and regions that may overlap (sigmoid).
Functions that depend on the kind take ``regions``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_ssl.compiled import fused
from nnunet_ssl.losses.probabilities import check_shape, one_resolution


class PseudoLabel(NamedTuple):
    """What a stream predicts, as a target for other streams. Neither tensor carries a gradient.

    Attributes:
        target: for classes (B, 1, *spatial), uint8 or int16, the class, 0 for the background; for regions (B, K,
            *spatial), bool.
        confidence: (B, 1, *spatial) for classes, (B, K, *spatial) for regions, float32 in [0, 1].

    >>> label = PseudoLabel(torch.tensor([[[0, 2]]]), torch.tensor([[[0.6, 0.9]]]))
    >>> label.confidence >= 0.85  # where to learn from it
    tensor([[[False,  True]]])
    """

    target: Tensor
    confidence: Tensor


def pseudo_label(logits: Tensor, *, regions: bool) -> PseudoLabel:
    """Argmax and its probability; for regions p > 0.5 and max(p, 1 - p), channel by channel.

    Args:
        logits: (B, C, *spatial).

    >>> label = pseudo_label(torch.tensor([[[0.0, 0.0], [0.0, 9.0], [1.0, 0.0]]]), regions=False)
    >>> label.target, label.confidence
    (tensor([[[2, 1]]], dtype=torch.uint8), tensor([[[0.5761, 0.9998]]]))
    """
    # Detached first: compiled, streams with gradient and streams without share a graph.
    return _pseudo_label(one_resolution(logits).detach(), regions=regions)


@fused
def _pseudo_label(logits: Tensor, *, regions: bool) -> PseudoLabel:
    logits = logits.float()
    if regions:
        probability = torch.sigmoid(logits)
        return PseudoLabel(probability > 0.5, torch.maximum(probability, 1 - probability))
    confidence, winner = torch.softmax(logits, 1).max(1, keepdim=True)
    # Kept for other streams: of many classes, one channel for each would be many times an image's memory.
    return PseudoLabel(winner.to(torch.uint8 if logits.shape[1] <= 256 else torch.int16), confidence)


def check_label(name: str, label: Tensor, like: Tensor) -> None:
    """Whether a label has the form of :class:`PseudoLabel` for logits or probabilities (B, K, *spatial).

    Raises:
        ValueError: it has another shape, which PyTorch would broadcast.
    """
    channels = like.shape[1] if label.dtype == torch.bool else 1
    check_shape(name, label, (like.shape[0], channels, *like.shape[2:]))


def members(target: Tensor, structures: int) -> Tensor:
    """Which voxels belong to each foreground class or region: (B, K, *spatial), bool, K = ``structures``.

    Args:
        target: of a :class:`PseudoLabel`, or another label of that form.

    >>> members(torch.tensor([[[0, 2, 1]]]), 2)
    tensor([[[False, False,  True],
             [False,  True, False]]])
    """
    if target.dtype == torch.bool:
        return target
    # The types are equal: a comparison of two types would convert them to the larger one.
    foreground = torch.arange(1, structures + 1, device=target.device, dtype=target.dtype)
    return target == foreground.view(1, -1, *[1] * (target.ndim - 2))


def coverage(label: PseudoLabel, threshold: float | Tensor, *, structures: int) -> tuple[Tensor, Tensor]:
    """How much of a pseudo-label is confident enough to be learned from.

    Args:
        label: a pseudo-label.
        threshold: the least confidence; one for all voxels, or one for each.
        structures: K, foreground classes or regions.

    Returns:
        Two int64 tensors of counts, (K + 1,): confident voxels, and voxels. The first entry counts all voxels (for
        regions: of all channels), entry k those that are predicted as foreground class or region k.

    >>> label = PseudoLabel(torch.tensor([[[0, 2, 2]]]), torch.tensor([[[0.6, 0.9, 0.8]]]))
    >>> coverage(label, 0.85, structures=2)  # all voxels, class 1, class 2
    (tensor([1, 0, 1]), tensor([3, 0, 2]))
    """
    # The comparison is no part of what is compiled: a threshold may change from step to step.
    return _coverage(label.target, label.confidence >= threshold, structures)


@fused
def _coverage(target: Tensor, confident: Tensor, structures: int) -> tuple[Tensor, Tensor]:
    axes = [0, *range(2, target.ndim)]
    predicted = members(target, structures)
    count = torch.cat((confident.sum()[None], (predicted & confident).sum(axes)))
    # Filled on the device: a tensor made of a Python number would be copied there, and the copy waited for.
    total = torch.cat((count.new_full((1,), confident.numel()), predicted.sum(axes)))
    return count, total
