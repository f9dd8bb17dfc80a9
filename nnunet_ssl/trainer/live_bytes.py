"""Bytes of all tensors that are alive, counted as operations make and free them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Within, bytes of all storages that are alive.

    Beside what is alive, the libraries that compute a convolution, oneDNN and cuDNN, hold copies of its largest tensors
    in a layout of their own; those count as long as the convolution runs.

    Attributes:
        now: of the storages that were made or counted within, and are alive.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def count(self, tensor: Tensor) -> None:
        """Count a tensor, if its storage does not count already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: weakref.ref) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # nnU-Net asks whether a patch holds anything but the ignore label
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.count(tensor)
        self.peak = max(self.peak, self.now + _copied_by_libraries(func, args, result))
        return result


def _copied_by_libraries(func: Any, args: Any, result: Any) -> int:
    if func is torch.ops.aten.convolution.default:
        return _bytes_of(args[0]) + _bytes_of(result)
    if func is torch.ops.aten.convolution_backward.default:
        # The gradients of input and weight one after the other: input and its gradient are of one size.
        gradient, image = args[:2]
        return _bytes_of(gradient) + _bytes_of(image)
    return 0


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
