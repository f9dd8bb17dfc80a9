"""A teacher: a copy of the student that follows it as a moving average."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nnunet_ssl.networks.branch import Branch


class Teacher(Branch):
    """A copy of the student that no optimizer moves.

    Args:
        network: the student, as nnU-Net built it.
        head: the student's head, if it has one.

    Attributes:
        updates: how often it was moved. On the host, since its moves depend on it.
    """

    def __init__(self, network: nn.Module, head: nn.Module | None) -> None:
        super().__init__(copy.deepcopy(network), head=copy.deepcopy(head))
        self.requires_grad_(False)
        self.updates = 0

    @torch.no_grad()
    def follow(self, student: Branch, max_decay: float) -> None:
        """Move towards the student: θ' ← d θ' + (1 - d) θ, d = min(``max_decay``, 1 - 1/(step + 1)).

        Source: Tarvainen and Valpola, Mean teachers are better role models, NIPS 2017, section 2. Step counts from 0,
        so that the first update copies the student.

        Raises:
            ValueError: the decay is not in 0 to 1.
        """
        if not 0 <= max_decay <= 1:
            raise ValueError(f"max_decay is {max_decay!r}; it is a share, from 0 to 1.")
        keep = min(max_decay, 1 - 1 / (self.updates + 1))
        pairs = self._pairs(student)
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        # All in a few kernels, where each tensor would have its own.
        torch._foreach_lerp_([mine for mine, _ in moved], [students for _, students in moved], 1 - keep)
        for mine, students in pairs:
            if not mine.is_floating_point():
                mine.copy_(students)
        self.updates += 1

    @torch.no_grad()
    def copy_from(self, student: Branch) -> None:
        """Copy the student's weights; the counter stays."""
        for mine, students in self._pairs(student):
            mine.copy_(students)

    def _pairs(self, student: Branch) -> list[tuple[Tensor, Tensor]]:
        students = dict([*student.named_parameters(), *student.named_buffers()])
        return [(tensor, students[name]) for name, tensor in [*self.named_parameters(), *self.named_buffers()]]
