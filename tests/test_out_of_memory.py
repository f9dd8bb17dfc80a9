"""Errors that say that memory ran out, and what is left of an attempt that raised one."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from nnunet_ssl.out_of_memory import (
    allocate_momentum,
    free_memory,
    is_out_of_memory,
    random_state,
    unless_out_of_memory,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.cuda.OutOfMemoryError(""), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.89 GB, max allowed: 9.07 GB)."), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory."), True),
        (RuntimeError("CUDA ran out of memory outside PyTorch's allocator."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("Expected all tensors to be on the same device"), False),
        (ValueError("a file named out of memory"), False),
        (KeyboardInterrupt("out of memory"), False),
    ],
    ids=str,
)
def test_which_errors_are_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize("explicitly", [True, False], ids=["cause", "context"])
def test_an_error_that_hides_another(explicitly: bool) -> None:
    def raised_from(first: Exception) -> Exception:
        try:
            try:
                raise first
            except Exception as error:
                text = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"
                raise RuntimeError(text) from (error if explicitly else None)
        except RuntimeError as error:
            return error

    assert is_out_of_memory(raised_from(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    assert not is_out_of_memory(raised_from(ValueError("a stride")))


def test_a_failed_attempt_leaves_no_tensor() -> None:
    alive: list[weakref.ref] = []

    def attempt() -> None:
        large = torch.zeros(10, requires_grad=True)
        of_it = large.exp()
        itself = [of_it]
        itself.append(itself)  # type: ignore[arg-type]
        alive.extend([weakref.ref(large), weakref.ref(of_it)])
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    assert unless_out_of_memory(attempt) is None
    free_memory(CPU, compiled=False)
    assert [one() for one in alive] == [None, None]
    assert unless_out_of_memory(lambda: 3) == 3


def test_another_error_goes_on() -> None:
    def attempt() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        unless_out_of_memory(attempt)


def test_random_numbers_begin_again() -> None:
    restore = random_state(CPU)
    first = torch.randn(5)
    restore()
    assert torch.equal(torch.randn(5), first)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_of_zeros_changes_no_step(nesterov: bool) -> None:
    def after_steps(*, allocated: bool) -> tuple[list[torch.Tensor], list[int]]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        network[2].bias.requires_grad_(False)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.99, weight_decay=3e-5, nesterov=nesterov)
        counts = []
        for _ in range(3):
            if allocated:
                allocate_momentum(optimizer)
            counts.append(len(optimizer.state))
            optimizer.zero_grad()
            network(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
        return [parameter.detach() for parameter in network.parameters()], counts

    expected, lazily = after_steps(allocated=False)
    found, at_once = after_steps(allocated=True)
    assert (lazily[0], at_once) == (0, [3, 3, 3])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_momentum_of_other_optimizers_stays_theirs() -> None:
    parameter = nn.Parameter(torch.ones(2))
    for optimizer in (
        torch.optim.AdamW([parameter]),
        torch.optim.SGD([parameter], 0.1),
        torch.optim.SGD([parameter], 0.1, momentum=0.9, dampening=0.5),
    ):
        allocate_momentum(optimizer)
        assert not optimizer.state
