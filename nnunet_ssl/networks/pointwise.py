"""Convolutions of kernel size 1, which a CPU is slow at when they have few channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pointwise(convolution: nn.Module, features: Tensor) -> Tensor:
    """``convolution(features)``; on a CPU as a matrix product if its kernel size is 1.

    A network's last layer, from 8 or 16 channels to a few classes, takes two to twenty times as long in oneDNN's
    convolutions as in its matrix products, and a training step here has many of them. The results differ by rounding.

    Args:
        convolution: such as a decoder's ``seg_layers``.
        features: (N, C, *spatial).

    Returns:
        (N, K, *spatial).
    """
    if (
        features.device.type != "cpu"
        or not isinstance(convolution, (nn.Conv2d, nn.Conv3d))
        or convolution.bias is None
        or convolution.groups != 1
        or any(size != 1 for size in (*convolution.kernel_size, *convolution.stride))
        or any(convolution.padding)
    ):
        return convolution(features)
    weight = convolution.weight.flatten(1).expand(len(features), -1, -1)
    flat = torch.baddbmm(convolution.bias[None, :, None], weight, features.flatten(2))
    return flat.unflatten(2, features.shape[2:])
