"""Predictions of the network taken as labels, without gradient.

Two kinds of labels, as in nnU-Net: classes that exclude each other (softmax) and regions that may overlap (sigmoid).
Functions that depend on the kind take ``regions``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PseudoLabel(NamedTuple):
    """What a stream predicts, as a target for other streams. Neither tensor carries a gradient.

    Attributes:
        target: (B, K, *spatial), bool, one channel per foreground class or region.
        confidence: (B, 1, *spatial) for classes, (B, K, *spatial) for regions, float32 in [0, 1].
    """

    target: Tensor
    confidence: Tensor


def foreground_probabilities(logits: Tensor, *, regions: bool) -> Tensor:
    """Probabilities of what nnU-Net's Dice is averaged over: foreground classes, or all regions.

    Args:
        logits: (B, C, *spatial).

    Returns:
        (B, K, *spatial), float32: K = C - 1 classes without the background, or K = C regions.
    """
    logits = logits.float()
    return torch.sigmoid(logits) if regions else torch.softmax(logits, 1)[:, 1:]


@torch.no_grad()
def pseudo_label(logits: Tensor, *, regions: bool) -> PseudoLabel:
    """One-hot argmax and its probability; for regions p > 0.5 and max(p, 1 - p), channel by channel.

    Args:
        logits: (B, C, *spatial).
    """
    logits = logits.float()
    if regions:
        probability = torch.sigmoid(logits)
        return PseudoLabel(probability > 0.5, torch.maximum(probability, 1 - probability))
    confidence, winner = torch.softmax(logits, 1).max(1, keepdim=True)
    foreground = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
    return PseudoLabel(winner == foreground, confidence)


@torch.no_grad()
def coverage(label: PseudoLabel, threshold: float) -> tuple[Tensor, Tensor]:
    """How much of a pseudo-label is confident enough to be learned from.

    Args:
        label: a pseudo-label of K channels.
        threshold: the least confidence.

    Returns:
        Two int64 tensors of counts, (K + 1,): confident voxels, and voxels. The first entry counts all voxels (for
        regions: of all channels), entry k those that are predicted as foreground class or region k.
    """
    confident = label.confidence >= threshold
    axes = [0, *range(2, label.target.ndim)]
    count = torch.cat((confident.sum()[None], (label.target & confident).sum(axes)))
    # Filled on the device: a tensor made of a Python number would be copied there, and the copy waited for.
    total = torch.cat((count.new_full((1,), confident.numel()), label.target.sum(axes)))
    return count, total
