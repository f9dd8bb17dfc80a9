"""Soft Dice between probabilities and a pseudo-label, over the voxels of a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_ssl.compiled import fused
from nnunet_ssl.distributed import check_mask, sum_over_ranks
from nnunet_ssl.losses.probabilities import one_resolution
from nnunet_ssl.losses.pseudo_labels import check_label, members


@fused
def masked_dice_loss(probabilities: Tensor, target: Tensor, mask: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Soft Dice loss over the masked voxels, averaged over channels.

    D_k = 1 - (2 Σ m p_k y_k + ε) / (Σ m p_k² + Σ m y_k² + ε), sums over batch and space; the batch is that of all
    ranks where several processes train, as in nnU-Net's batch Dice.

    With everything masked out the loss is 0 and has no gradient: there is nothing to learn from.

    Args:
        probabilities: (B, K, *spatial), float.
        target: of classes (B, 1, *spatial), integer, or (B, K, *spatial), bool, as in a
            :class:`~nnunet_ssl.losses.pseudo_labels.PseudoLabel`.
        mask: (B, 1, *spatial) or (B, K, *spatial), bool.

    Returns:
        A scalar in [0, 1], float32.

    Raises:
        ValueError: target or mask has another shape, or the mask is not bool.

    >>> p = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    >>> label, everywhere = torch.tensor([[[1, 0, 0, 0]]]), torch.ones(1, 1, 4, dtype=torch.bool)
    >>> masked_dice_loss(p, label, everywhere)
    tensor(0.3333)
    >>> masked_dice_loss(p, label, torch.tensor([[[True, False, True, True]]]))
    tensor(0.)
    """
    # Under autocast a half-precision sum over a batch of volumes overflows at 65504.
    probabilities = one_resolution(probabilities).float()
    check_label("target", target, probabilities)
    check_mask(mask, probabilities)
    axes = [0, *range(2, probabilities.ndim)]
    # A class where it counts, and the background elsewhere: one channel, not K.
    masked_target = members(target & mask if target.dtype == torch.bool else target * mask, probabilities.shape[1])
    size = (probabilities.square() * mask).sum(axes) + masked_target.sum(axes)
    # The target is zero wherever the mask is, so the product needs no mask of its own.
    overlap = (probabilities * masked_target).sum(axes)
    overlap, size = sum_over_ranks(torch.stack((overlap, size)))
    return torch.mean(1 - (2 * overlap + epsilon) / (size + epsilon))
