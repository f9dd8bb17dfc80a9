"""Noise on images, drawn on the training device."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_noise(image: Tensor, sigma: float) -> Tensor:
    """clip(N(0, σ²), ±2σ) for each value of an image.

    Args:
        image: (N, C, *spatial), which stays as it is.
        sigma: σ, in units of the image; 0 makes zeros.

    Returns:
        Like ``image``.

    >>> noise = clipped_noise(torch.zeros(1, 1, 100, 100), 0.1)
    >>> float(noise.max()) <= 0.2001, 0.05 < float(noise.std()) < 0.1
    (True, True)
    """
    return (torch.randn_like(image) * sigma).clamp(-2 * sigma, 2 * sigma)
