"""Linear interpolation to twice the size, of operations whose gradient a GPU adds up without atomics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LinearUpsample(nn.Upsample):
    """``nn.Upsample`` of mode linear, bilinear or trilinear; of factors 1 and 2 by slices, but on a CPU.

    Compiled, the gradient of PyTorch's interpolation becomes atomic additions to its input, eight for each voxel in 3D.
    Sums of slices become one kernel without any. On a CPU, PyTorch's own is the faster one. The results differ by
    rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Interpolate (N, C, *spatial)."""
        assert isinstance(self.scale_factor, tuple)
        if input.device.type == "cpu" or any(factor not in (1, 2) for factor in self.scale_factor):
            return super().forward(input)
        return linear_by_slices(input, self.scale_factor)


def linear_by_slices(features: Tensor, factors: Sequence[float]) -> Tensor:
    """Linear interpolation by 1 or 2 along each axis, corners not aligned.

    Along an axis, the two voxels that voxel x_i becomes are ¾ x_i + ¼ x_i-1 and ¾ x_i + ¼ x_i+1; beyond the border lies
    the border's own value.

    Args:
        features: (N, C, *spatial).
        factors: for each spatial axis.
    """
    for axis, factor in enumerate(factors, start=2):
        if factor == 2:
            last = features.shape[axis] - 1
            before = torch.cat((features.narrow(axis, 0, 1), features.narrow(axis, 0, last)), axis)
            after = torch.cat((features.narrow(axis, 1, last), features.narrow(axis, last, 1)), axis)
            pair = torch.lerp(features, before, 0.25), torch.lerp(features, after, 0.25)
            features = torch.stack(pair, axis + 1).flatten(axis, axis + 1)
    return features
