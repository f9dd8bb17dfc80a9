"""``torch.compile`` as this project uses it: for the passes of a network, and for the losses of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.torch_version import TorchVersion

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_MOST_GRAPHS = 64

# nnU-Net: PyTorch 2.2.2 crashes when it compiles a cross-entropy.
_CAN_FUSE = TorchVersion(torch.__version__) >= "2.4"

_fusing = False


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled for each size that it meets; one for each function, whoever asks."""
    # PyTorch stops at 8 graphs of a function, and goes on without compiling. Three decoders have 10 kinds of passes:
    # of labeled and of unlabeled images, with gradient and, of two of them, without.
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _MOST_GRAPHS)
    # Sizes are constants: a training has two, that of labeled and that of unlabeled batches. By default, PyTorch would
    # take the second one for the start of many and make slower code for any size.
    return torch.compile(function, dynamic=False)


@contextmanager
def compiling_with(backend: str) -> Iterator[None]:
    """Within, ``torch.compile`` has another default backend, for losses too: for tests, which count graphs."""
    before = torch.compile
    compiled.cache_clear()
    torch._dynamo.reset()
    torch.compile = partial(before, backend=backend)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before  # type: ignore[assignment]
        compiled.cache_clear()
        torch._dynamo.reset()


@contextmanager
def fusing(on: bool) -> Iterator[None]:
    """Within, functions with :func:`fused` are compiled, if ``on``."""
    global _fusing
    before, _fusing = _fusing, on and _CAN_FUSE
    try:
        yield
    finally:
        _fusing = before


def fused(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Compile a function of tensors when the network is compiled.

    A loss of a volume takes tens of operations, and each of them reads and writes the volume. Compiled, they become a
    few kernels. The trainer compiles within ``loss_terms``, where nnU-Net compiles the network (on a GPU) and one
    process trains: several exchange sums within a loss. Everywhere else the function runs as it is.

    The function returns tensors that depend on its arguments alone: it draws no random numbers, since compiled ones
    would be others, and it never asks for a value of a tensor. PyTorch makes a graph for each value of a Python number
    or string among its arguments, so none of them may change from step to step. A threshold that does is compared
    outside, or given as a tensor.

    >>> @fused
    ... def squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ...     return (a - b).square().mean()
    >>> squared_error(torch.zeros(2), torch.ones(2))
    tensor(1.)
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # One that is called by another becomes a part of its graph.
        if _fusing and not torch.compiler.is_compiling():
            return compiled(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
