"""Heads on a decoder's last features, for training alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_ssl.networks.pointwise import pointwise

_CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
_NORMALIZATION = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_POOLING = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class PlainHead(nn.Module):
    """A 1×1(×1) convolution of the decoder's last features, and a function of its output.

    Args:
        features: F, channels of the decoder's last features.
        channels: K, of the output.
        dim: 2 or 3, number of spatial axes.
        name: under which the output is found in ``StreamOutput.head``.
        activation: applied to the output; ``torch.tanh`` for distances in (-1, 1).

    >>> head = PlainHead(features=4, channels=2, dim=2, name="distance", activation=torch.tanh)
    >>> head(torch.zeros(1, 1, 8, 8), torch.zeros(1, 4, 8, 8))["distance"].shape
    torch.Size([1, 2, 8, 8])
    """

    def __init__(
        self, *, features: int, channels: int, dim: int, name: str, activation: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.layer = _CONVOLUTION[dim](features, channels, 1)
        self.name = name
        self.activation = activation

    def forward(self, image: Tensor, features: Tensor) -> dict[str, Tensor]:
        """The output (N, K, *spatial) by its name; the image (N, C, *spatial) is not looked at."""
        output = pointwise(self.layer, features)
        return {self.name: output if self.activation is None else self.activation(output)}


class BoundaryHead(nn.Module):
    """SimCVD's: signed distance maps of the decoder's last features, and a projection of image and maps.

    Args:
        image_channels: C.
        features: F, channels of the decoder's last features.
        maps: K, one distance map per foreground class or region.
        projection: D, channels of the projection.
        grid: size of the coarse grid, of :func:`coarse_grid`.

    >>> head = BoundaryHead(image_channels=1, features=4, maps=2, projection=16, grid=coarse_grid((8, 8), positions=4))
    >>> {name: tuple(output.shape) for name, output in head(torch.zeros(1, 1, 8, 8), torch.zeros(1, 4, 8, 8)).items()}
    {'distance': (1, 2, 8, 8), 'projection': (1, 4, 16)}
    """

    def __init__(self, *, image_channels: int, features: int, maps: int, projection: int, grid: Sequence[int]) -> None:
        super().__init__()
        dim = len(grid)
        self.pool = _POOLING[dim](tuple(grid))
        convolution, normalization = _CONVOLUTION[dim], _NORMALIZATION[dim]
        self.distance = convolution(features, maps, 1)
        layers: list[nn.Module] = []
        for channels in (image_channels + maps, projection):
            layers += [convolution(channels, projection, 1), normalization(projection, affine=True), nn.LeakyReLU()]
        self.projector = nn.Sequential(*layers, convolution(projection, projection, 1))

    def forward(self, image: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Distance maps and projection.

        Args:
            image: (N, C, *spatial).
            features: (N, F, *spatial).

        Returns:
            ``distance``: (N, K, *spatial) in (-1, 1), negative inside; ``projection``: (N, P, D), of unit length, one
            row per position of the grid.
        """
        distance = torch.tanh(pointwise(self.distance, features))
        view = torch.cat((image.to(distance.dtype), distance), 1)
        projected = self.projector(self.pool(view)).flatten(2).transpose(1, 2)
        return {"distance": distance, "projection": unit_length(projected)}


def unit_length(vectors: Tensor) -> Tensor:
    """Vectors (..., D) divided by their length, in float32.

    **[choice]** Those shorter than 0.01 are divided by 0.01: the gradient of a unit vector is as large as the vector is
    short, and where features vanish it is beyond half precision.

    >>> unit_length(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    return functional.normalize(vectors.float(), dim=-1, eps=1e-2)


def coarse_grid(patch_size: Sequence[int], *, positions: int) -> tuple[int, ...]:
    """Size of the finest grid of one stride for all axes with at most ``positions`` positions.

    An axis that is shorter than the stride keeps one position.

    >>> coarse_grid((32, 32, 4), positions=64)
    (8, 8, 1)
    """
    for stride in range(1, max(patch_size) + 1):
        grid = tuple(max(1, size // stride) for size in patch_size)
        if math.prod(grid) <= positions:
            return grid
    raise ValueError(f"positions is {positions}, must be at least 1")
