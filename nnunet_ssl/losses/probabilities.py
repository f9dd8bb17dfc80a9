"""Probabilities of a network's logits, and what is made of them: entropy, sharpened probabilities, consistency.

Two kinds of labels, as in nnU-Net: classes that exclude each other (softmax over C channels, background first) and
regions that may overlap (sigmoid of R channels). Functions that depend on the kind take ``regions``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ssl.compiled import fused
from nnunet_ssl.distributed import masked_mean


def probabilities(logits: Tensor, *, regions: bool) -> Tensor:
    """Probabilities of all classes, background included, or of all regions.

    Args:
        logits: (B, C, *spatial).

    Returns:
        (B, C, *spatial), float32.

    >>> probabilities(torch.zeros(1, 2, 3), regions=False)
    tensor([[[0.5000, 0.5000, 0.5000],
             [0.5000, 0.5000, 0.5000]]])
    """
    logits = one_resolution(logits).float()
    return torch.sigmoid(logits) if regions else torch.softmax(logits, 1)


def foreground_probabilities(logits: Tensor, *, regions: bool) -> Tensor:
    """Probabilities of what nnU-Net's Dice is averaged over: foreground classes, or all regions.

    Args:
        logits: (B, C, *spatial).

    Returns:
        (B, K, *spatial), float32: K = C - 1 classes without the background, or K = C regions.

    >>> foreground_probabilities(torch.zeros(1, 4, 2), regions=False).shape
    torch.Size([1, 3, 2])
    """
    p = probabilities(logits, regions=regions)
    return p if regions else p[:, 1:]


@fused
def entropy(logits: Tensor, *, regions: bool) -> Tensor:
    """H = -Σ_k p_k log p_k in nats; of each region, the entropy of its Bernoulli distribution.

    Args:
        logits: (B, C, *spatial).

    Returns:
        (B, 1, *spatial) for classes, (B, R, *spatial) for regions, float32.

    >>> entropy(torch.zeros(1, 2, 1), regions=False)
    tensor([[[0.6931]]])
    """
    logits = one_resolution(logits).float()
    if regions:
        return functional.softplus(logits) - logits * torch.sigmoid(logits)
    log_p = torch.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1, keepdim=True)


@fused
def entropy_of_probabilities(p: Tensor, *, regions: bool) -> Tensor:
    """:func:`entropy` of probabilities, such as the mean of several predictions.

    Args:
        p: (B, C, *spatial), in [0, 1].

    >>> entropy_of_probabilities(torch.tensor([[[1.0], [0.0]]]), regions=False)
    tensor([[[0.]]])
    """
    if regions:
        return torch.special.entr(p) + torch.special.entr(1 - p)
    return torch.special.entr(p).sum(1, keepdim=True)


def sharpen(logits: Tensor, *, temperature: float, regions: bool) -> Tensor:
    """Sharpened probabilities p_k^(1/T) / Σ_j p_j^(1/T); of a region, against its complement.

    That is the softmax (or sigmoid) of the logits divided by T, so no power of a small number underflows.

    Args:
        logits: (B, C, *spatial).
        temperature: T; 1 changes nothing, towards 0 the largest becomes 1.

    Returns:
        (B, C, *spatial), float32.

    >>> sharpen(torch.tensor([[[1.0], [2.0]]]), temperature=0.1, regions=False)[0, :, 0]
    tensor([4.5398e-05, 9.9995e-01])
    """
    return probabilities(one_resolution(logits).float() / temperature, regions=regions)


@fused
def consistency_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of probabilities, Σ m (p_s - p_t)² / (C Σ m).

    Args:
        student: p_s, (B, C, *spatial), with gradient.
        teacher: p_t, like ``student``; gradients do not reach it.
        mask: m, (B, 1, *spatial) or (B, C, *spatial), bool; None counts all voxels.

    Returns:
        A scalar, float32; 0 where the mask is empty.

    Raises:
        ValueError: the two differ in shape.

    >>> consistency_mse(torch.ones(1, 2, 3), torch.zeros(1, 2, 3))
    tensor(1.)
    """
    student, teacher = one_resolution(student).float(), one_resolution(teacher).detach().float()
    check_shape("teacher", teacher, tuple(student.shape))
    return masked_mean((student - teacher).square(), mask)


@fused
def consistency(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, regions: bool) -> Tensor:
    """:func:`consistency_mse` of what two streams predict.

    Args:
        student: logits (B, C, *spatial), with gradient.
        teacher: logits like ``student``; gradients do not reach them.
        mask: (B, 1, *spatial) or (B, C, *spatial), bool; None counts all voxels.

    Returns:
        A scalar, float32.

    >>> consistency(torch.zeros(1, 2, 3), torch.tensor([[[9.0], [-9.0]]]).expand(1, 2, 3), regions=False)
    tensor(0.2500)
    """
    return consistency_mse(probabilities(student, regions=regions), probabilities(teacher, regions=regions), mask)


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Whether a tensor has the shape that it must have, where PyTorch would broadcast another one.

    Raises:
        ValueError: it has not.
    """
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; it must be {expected}.")


def one_resolution(logits: Tensor) -> Tensor:
    """The logits, if they are of one resolution.

    Raises:
        TypeError: they are a list, as those of a stream with deep supervision.
    """
    if isinstance(logits, (list, tuple)):
        raise TypeError(
            "These logits are a list, one tensor for each resolution, because their stream has deep_supervision=True. "
            "Take output.full_resolution, or ask for the stream without it."
        )
    return logits
