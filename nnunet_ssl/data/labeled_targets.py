"""What a method wants of the labels apart from nnU-Net's targets, made by the workers of nnU-Net's labeled loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class LabeledTarget(ABC):
    """Makes a target of a labeled batch: a tensor, or a tuple of tensors of any shape.

    >>> class Foreground(LabeledTarget):
    ...     def __call__(self, segmentation):
    ...         return segmentation > 0
    ...     def largest(self, batch_size, patch_size):
    ...         return torch.empty(batch_size, 1, *patch_size, dtype=torch.bool)
    >>> Foreground()(torch.tensor([[[0, 2]]]))
    tensor([[[False,  True]]])
    """

    @abstractmethod
    def __call__(self, segmentation: Tensor) -> Any:
        """The target of a batch.

        Args:
            segmentation: as nnU-Net's loss gets it, of the full resolution, on the CPU: of labels (B, 1, *spatial), or
                of regions (B, R, *spatial), the ignore label last.
        """

    @abstractmethod
    def largest(self, batch_size: int, patch_size: Sequence[int]) -> Any:
        """Tensors without content, as large as those of a batch can be; for the estimate of a step's memory."""


class AddTargets:
    """Add targets to nnU-Net's batches under ``extra``; for the workers of its loader, which calls it per batch.

    nnU-Net's own transforms see one sample, and what they return has to have one shape for all samples. A target of the
    whole batch may be as large as its samples need.
    """

    def __init__(self, targets: Mapping[str, LabeledTarget]) -> None:
        self.targets = dict(targets)

    def __call__(self, **batch: Any) -> dict[str, Any]:
        """The batch with one more entry, the targets by name."""
        target = batch["target"]
        full_resolution = target[0] if isinstance(target, list) else target
        with torch.no_grad():
            batch["extra"] = {name: make(full_resolution) for name, make in self.targets.items()}
        return batch
