"""What several processes of one training tell each other; in a training of one process, nothing.

After each backward pass the gradients of all ranks are averaged. So that this is the gradient of the joined batch, the
mean of a loss over the ranks has to be the loss on the joined batch: a mean over samples is that by itself, a ratio of
sums over the batch needs the sums of all ranks.

PyTorch's DistributedDataParallel is not used. It has to see every backward pass, and wants to know before it which
parameters get a gradient; here encoder and decoders run apart in memory mode split, and a step's streams may leave out
a network, a decoder or the heads of lower resolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from nnunet_ssl.errors import UserError

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process does not talk to the others: losses are those of its own batch."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def num_processes() -> int:
    """How many processes train together; 1 within :func:`alone`.

    >>> num_processes()
    1
    """
    if _alone or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, with gradient.

    The gradient reaches each rank's own tensor as if it were of one loss for all ranks, times their number, which the
    averaging of gradients takes back.

    >>> sum_over_ranks(torch.tensor([1.0, 2.0]))  # with one process, the tensor itself
    tensor([1., 2.])
    """
    if num_processes() == 1:
        return tensor
    if not tensor.requires_grad:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(tensor)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, with gradient as :func:`sum_over_ranks`.

    >>> mean_over_ranks(torch.tensor([1.0, 2.0]))  # with one process, the tensor itself
    tensor([1., 2.])
    """
    return sum_over_ranks(tensor) / num_processes()


def check_mask(mask: Tensor, values: Tensor) -> None:
    """Whether a mask is of voxels, or of voxels and channels, of values (B, C, *spatial).

    Raises:
        ValueError: it is not bool, or has another shape, which PyTorch might broadcast.
    """
    shapes = dict.fromkeys(((len(values), 1, *values.shape[2:]), tuple(values.shape)))
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"mask has the shape {tuple(mask.shape)} and is of {mask.dtype}; it must be {wanted}, bool.")


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the masked values, of which each rank has a part of the batch; the mean over ranks is the loss.

    Args:
        values: (B, C, *spatial).
        mask: (B, 1, *spatial) or (B, C, *spatial), bool; None counts all values.

    Returns:
        A scalar; 0 where the mask is empty on all ranks.

    Raises:
        ValueError: the mask is not bool, or has another shape.

    >>> masked_mean(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[False, True]]]))
    tensor(3.)
    """
    if mask is None:
        return values.mean()
    check_mask(mask, values)
    counted = mask.expand_as(values)
    return num_processes() * (values * counted).sum() / sum_over_ranks(counted.sum()).clamp(min=1)


def gather_over_ranks(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensors of all ranks along the first axis, without gradient, and the index at which this rank's begins.

    Args:
        tensor: (N, ...), of the same shape on all ranks.

    >>> gather_over_ranks(torch.tensor([[1.0], [2.0]]))
    (tensor([[1.],
            [2.]]), 0)
    """
    if num_processes() == 1:
        return tensor.detach(), 0
    parts = [torch.empty_like(tensor) for _ in range(num_processes())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts), dist.get_rank() * len(tensor)


def joined(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with the weights of the first rank on all; on GPUs, batch normalization then sees all ranks.

    Args:
        network: on the device.
        device: that trains.
    """
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network) if device.type == "cuda" else network
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor, 0)
    return network


class LossOfRanks:
    """nnU-Net's loss where several processes train, with terms that are sums over all ranks.

    Args:
        together: of the joined batch.
        own: of this process's batch, within :func:`alone`.
    """

    def __init__(self, *, together: Callable[[Any, Any], Tensor], own: Callable[[Any, Any], Tensor]) -> None:
        self.together = together
        self.own = own

    def __call__(self, output: Any, target: Any) -> Tensor:
        """As nnU-Net's loss."""
        return (self.own if num_processes() == 1 else self.together)(output, target)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their means over all ranks; nothing with one process, or within :func:`alone`.

    A parameter without a gradient stays without. The same ones have a gradient on all ranks, since all run the same
    streams.
    """
    if num_processes() == 1:
        return
    learned = [parameter for parameter in parameters if parameter.grad is not None]
    # One collective for all: each costs time of its own.
    means = torch.cat([parameter.grad.flatten() for parameter in learned if parameter.grad is not None])
    dist.all_reduce(means)
    means /= num_processes()
    for parameter, mean in zip(learned, means.split([parameter.numel() for parameter in learned]), strict=True):
        parameter.grad = mean.view_as(parameter)


def on_all_ranks(here: bool, device: torch.device) -> bool:
    """Whether something holds on every rank."""
    if num_processes() == 1:
        return here
    holds = torch.tensor(int(here), device=device)
    dist.all_reduce(holds, op=dist.ReduceOp.MIN)
    return bool(holds.item())


def device_of_this_process(device: torch.device) -> torch.device:
    """The device that this process trains on: of several GPUs in a machine, the one of its number there.

    What starts the processes, :mod:`nnunet_ssl.torchrun` or ``nnUNetv2_train -num_gpus``, has made it the current one.
    """
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def check_device(device: torch.device) -> None:
    """Whether PyTorch can use the device; nnU-Net trains on a GPU unless it is told otherwise.

    Raises:
        UserError: it cannot.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this PyTorch is built without CUDA" if built is None else f"it is built for CUDA {built}"
        raise UserError(
            f"PyTorch finds no GPU ({why}). Add -device cpu to train on the CPU; with a GPU in this machine, install "
            "its driver and a PyTorch that fits it."
        )


@dataclass(frozen=True)
class Ranks:
    """This process among those of one training; alone by default.

    Attributes:
        rank: its number.
        count: how many there are.
        long_timeout_group: a group to wait in for hours. The ordinary one gives up after minutes, which is as long as a
            collective may take.
    """

    rank: int = 0
    count: int = 1
    long_timeout_group: Any = None

    @classmethod
    def of_this_training(cls) -> Ranks:
        """All ranks have to call this, in the same order as other collectives."""
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def first(self) -> bool:
        """Whether this is the one that does what is to be done once."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all ranks have called it."""
        if self.count > 1:
            dist.barrier(group=self.long_timeout_group)
