"""When a device's memory does not suffice for an attempt: recognize it, and leave nothing of the attempt behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

# In lower case. Libraries swallow PyTorch's OutOfMemoryError and raise a RuntimeError with a text of their own.
_TEXTS = (
    # PyTorch's allocators (CUDA, HIP, XPU, MPS), the CUDA driver, Triton; what compiles a graph quotes them.
    "out of memory",
    # cuDNN has tried all its ways to convolve, and had no workspace for any: "GET was ...", "FIND was ...".
    "unable to find an engine",
    # CUDNN, CUBLAS, CUSOLVER, HIPBLAS
    "_status_alloc_failed",
    # cuDNN 9
    "device_allocation_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory does not suffice, by itself or by what it was raised from.

    CUDNN_STATUS_NOT_SUPPORTED may be that and may be something else: it counts if what it was raised from says so.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, torch.cuda.OutOfMemoryError):
            return True
        if isinstance(link, RuntimeError) and any(text in str(link).lower() for text in _TEXTS):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def unless_out_of_memory(attempt: Callable[[], Result]) -> Result | None:
    """What an attempt returns, or None if memory ran out. Then nothing holds its tensors: the error held its frames."""
    try:
        return attempt()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


def free_memory(device: torch.device, *, compiled: bool) -> None:
    """Give back what PyTorch keeps of a failed attempt.

    Args:
        device: of the attempt.
        compiled: whether it was compiled; its graphs are then forgotten.
    """
    if compiled:
        torch._dynamo.reset()
    # Frames and tensors may hold each other.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def random_state(device: torch.device) -> Callable[[], None]:
    """Remember the state of PyTorch's random numbers, on the CPU and on a device; returns what goes back to it."""
    on_cpu = torch.get_rng_state()
    if device.type == "cuda":
        on_gpu = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        on_gpu = torch.mps.get_rng_state()

    def restore() -> None:
        torch.set_rng_state(on_cpu)
        if device.type == "cuda":
            torch.cuda.set_rng_state(on_gpu, device)
        elif device.type == "mps":
            torch.mps.set_rng_state(on_gpu)

    return restore


def allocate_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Make the momentum of SGD before its first step, so that the first step needs as much memory as the others.

    It is zeros, to which the first step adds the gradient; SGD itself would copy the gradient. Other optimizers stay
    as they are.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        # With dampening, SGD adds a part of a gradient to the momentum, but begins with all of it.
        if group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                if parameter.requires_grad and optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
