"""Dice and cross-entropy of logits with a label on a part of the voxels, such as the two parts of a mixed image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ssl.compiled import fused
from nnunet_ssl.distributed import masked_mean
from nnunet_ssl.losses.dice import masked_dice_loss
from nnunet_ssl.losses.probabilities import foreground_probabilities, one_resolution
from nnunet_ssl.losses.pseudo_labels import check_label


def voxelwise_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of every voxel; of regions, binary cross-entropy of every voxel and region.

    Args:
        logits: (B, C, *spatial).
        label: classes (B, 1, *spatial), integer, or regions (B, C, *spatial), bool.

    Returns:
        (B, 1, *spatial), or (B, C, *spatial) for regions; float32.

    Raises:
        ValueError: the label has another shape.

    >>> voxelwise_cross_entropy(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3, dtype=torch.int64))
    tensor([[[0.6931, 0.6931, 0.6931]]])
    """
    logits = one_resolution(logits).float()
    check_label("label", label, logits)
    if label.dtype == torch.bool:
        return functional.binary_cross_entropy_with_logits(logits, label.float(), reduction="none")
    return functional.cross_entropy(logits, label[:, 0].long(), reduction="none")[:, None]


@fused
def masked_cross_entropy(logits: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the masked voxels; of regions, binary cross-entropy channel by channel.

    Args:
        logits: (B, C, *spatial).
        label: classes (B, 1, *spatial), integer, or regions (B, C, *spatial), bool.
        mask: (B, 1, *spatial), or (B, C, *spatial) for regions, bool; None counts all voxels.

    Returns:
        A scalar, float32; 0 where the mask is empty.

    >>> masked_cross_entropy(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3, dtype=torch.int64))
    tensor(0.6931)
    """
    return masked_mean(voxelwise_cross_entropy(logits, label), mask)


@fused
def dice_of_logits(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """D over the masked voxels: :func:`masked_dice_loss` of foreground classes or regions.

    Args:
        logits: (B, C, *spatial).
        label: classes (B, 1, *spatial), integer, or regions (B, C, *spatial), bool.
        mask: (B, 1, *spatial), or (B, C, *spatial) for regions, bool.

    Returns:
        A scalar in [0, 1], float32.

    >>> sure = torch.tensor([[[-9.0, 9.0], [9.0, -9.0]]])
    >>> dice_of_logits(sure, torch.tensor([[[1, 1]]]), torch.tensor([[[True, False]]]))
    tensor(0.)
    """
    p = foreground_probabilities(logits, regions=label.dtype == torch.bool)
    return masked_dice_loss(p, label, mask)


@fused
def dice_and_cross_entropy(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """(D + CE) / 2 over the masked voxels: :func:`dice_of_logits` and :func:`masked_cross_entropy`.

    Args:
        logits: (B, C, *spatial).
        label: classes (B, 1, *spatial), integer, or regions (B, C, *spatial), bool.
        mask: (B, 1, *spatial), bool.

    Returns:
        A scalar, float32.

    >>> sure = torch.tensor([[[-9.0, 9.0], [9.0, -9.0]]])
    >>> float(dice_and_cross_entropy(sure, torch.tensor([[[1, 0]]]), torch.ones(1, 1, 2, dtype=torch.bool))) < 1e-3
    True
    """
    return (dice_of_logits(logits, label, mask) + masked_cross_entropy(logits, label, mask)) / 2
