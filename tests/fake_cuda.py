"""Tensors that PyTorch takes for a GPU's, without one: sizes and devices alone, in PyTorch's FakeTensorMode.

FakeTensorMode refuses an operation whose tensors are on different devices, as a GPU would.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default)
_INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._unsafe_index.Tensor,
)


class Waits(TorchDispatchMode):
    """Within a FakeTensorMode: where the host waits for the GPU, as the host has to when a kernel's result or a copy
    is needed at once.

    What comes back from the GPU is a real tensor of zeros, so that what the host does with it is run as it is. Of a
    number that is read, a count or a comparison is 1, all else 0.

    Attributes:
        found: the operations, each with the line of code that made it wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of the GPU without content, one of the host really."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        target = torch.device(kwargs.get("device") or "cpu").type
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors) and target == "cpu":
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            if on_gpu:
                self._waits(func)
            return 0.0 if args[0].dtype.is_floating_point else 1
        if func in _COPIES:
            return self._copy(func, args, kwargs, tensors)
        if on_gpu and self._data_dependent(func, args):
            self._waits(func)
            if func is torch.ops.aten.nonzero.default:
                return torch.zeros(1, args[0].ndim, dtype=torch.int64, device=CUDA)
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        blocking = not (kwargs.get("non_blocking") or (args[2:] and args[2]))
        result = func(*args, **kwargs)
        devices = {leaf.device.type for leaf in (*tensors, *tree_leaves(result)) if isinstance(leaf, Tensor)}
        if len(devices) > 1 and blocking:
            self._waits(func)
        if isinstance(result, Tensor) and result.device.type == "cpu" and len(devices) > 1:
            with _disable_current_modes():
                return torch.zeros(result.shape, dtype=result.dtype)
        return result

    def _data_dependent(self, func: Any, args: Any) -> bool:
        """Whether a result, or its size, depends on content that the host has to see."""
        if func in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            return any(index.device.type == "cpu" or index.dtype in (torch.bool, torch.uint8) for index in indices)
        return bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags))

    def _waits(self, func: Any) -> None:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename) != Path(__file__)]
        ours = [one for one in frames if {"nnunetv2", "nnunet_ssl"} & set(Path(one.filename).parts)] or frames
        self.found.append(f"{func} in {Path(ours[-1].filename).name}:{ours[-1].lineno}: {ours[-1].line}")


@contextmanager
def _device_guard() -> Iterator[None]:
    """Let PyTorch's own code ask which GPU is the current one, where PyTorch is built without CUDA.

    It has no one to ask there, and ends the process; with CUDA, FakeTensorMode takes care of it. The meta device has
    someone whose answers mean nothing.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    library = next((Path(torch.__file__).parent / "lib").glob("*c10.*"))
    cuda, meta = 1, 14  # c10::DeviceType
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(
        ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE"
    )
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = None


@contextmanager
def fake_cuda() -> Iterator[Waits]:
    """Within, device ``cuda`` can be computed on, with or without a GPU and whatever PyTorch was built for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.autograd, "backward", backward)
        # A GPU's state of random numbers is kept on the host: reading it is no wait.
        patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
        with _device_guard(), FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
            yield waits


def move_to_fake_cuda(network: nn.Module) -> None:
    """Replace parameters and buffers by fake ones, called within :func:`fake_cuda`."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA), False)
            module.register_parameter(name, fake.requires_grad_(parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA))


@torch.no_grad()
def backward(tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
    """``torch.autograd.backward``, node by node: PyTorch's engine asks the CUDA driver for its devices."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    grad_tensors = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
    gradients: dict[Any, dict[int, Tensor]] = {}
    roots = []
    for tensor, gradient in zip(tensors, grad_tensors, strict=True):
        edge = torch.autograd.graph.get_gradient_edge(tensor)
        _add(gradients, edge.node, edge.output_nr, torch.ones_like(tensor) if gradient is None else gradient)
        roots.append(edge.node)
    users = dict.fromkeys(roots, 0)
    to_visit = list(users)
    while to_visit:
        for node, _nr in to_visit.pop().next_functions:
            if node is not None:
                if node not in users:
                    to_visit.append(node)
                users[node] = users.get(node, 0) + 1
    ready = [node for node in users if users[node] == 0]
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        if hasattr(node, "variable"):
            variable, gradient = node.variable, given.get(0)
            if gradient is not None:
                variable.grad = gradient if variable.grad is None else variable.grad + gradient
            continue
        returned: Any = [None] * len(node.next_functions)
        if given:
            # A node that has several outputs wants a gradient of each.
            inputs = [given[nr] if nr in given else _zeros(like) for nr, like in enumerate(node._input_metadata)]
            returned = node(*inputs)
            returned = returned if isinstance(returned, tuple) else (returned,)
        for (following, nr), gradient in zip(node.next_functions, returned, strict=True):
            if following is None:
                continue
            if gradient is not None:
                _add(gradients, following, nr, gradient)
            users[following] -= 1
            if users[following] == 0:
                ready.append(following)


def _add(gradients: dict[Any, dict[int, Tensor]], node: Any, nr: int, gradient: Tensor) -> None:
    # As the engine does before a node gets it.
    metadata = node._input_metadata[nr]
    assert gradient.device == metadata.device, (node, gradient.device, metadata.device)
    gradient = gradient.sum_to_size(metadata.shape).to(metadata.dtype)
    known = gradients.setdefault(node, {})
    known[nr] = known[nr] + gradient if nr in known else gradient


def _zeros(metadata: Any) -> Tensor:
    return torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device)
