"""The step of the optimizer, guarded: what is not finite never reaches the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# nnU-Net's.
_LARGEST_NORM = 12.0

# With mixed precision a step may overflow; the gradient scaler then skips it and halves its scale. Its scale starts
# at 2^16, so a network that is sound needs no more than this many steps in a row.
_OVERFLOWS_IN_A_ROW = 20


class GuardedOptimizer:
    """Unscales and clips the gradients, checks them, and steps.

    Args:
        optimizer: nnU-Net's.
        parameters: of the network.
        grad_scaler: nnU-Net's, or None without mixed precision.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], grad_scaler: Any = None
    ) -> None:
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._grad_scaler = grad_scaler
        self._overflows = 0

    def clip(self) -> Tensor:
        """Unscale the gradients and clip their norm; returns the norm as it was, a scalar on the device."""
        if self._grad_scaler is not None:
            self._grad_scaler.unscale_(self._optimizer)
        return torch.nn.utils.clip_grad_norm_(self._parameters, _LARGEST_NORM)

    def step_scaled(self) -> bool:
        """With a gradient scaler, step; returns whether the weights have moved.

        The scaler skips a step whose gradients are not finite, so nothing has to be read from the device before it.
        """
        if self._grad_scaler is None:
            return False
        # The scaler does not say whether it stepped, and reading its scale would wait for the GPU once more.
        steps: list[bool] = []
        hook = self._optimizer.register_step_post_hook(lambda *_: steps.append(True))
        self._grad_scaler.step(self._optimizer)
        hook.remove()
        self._grad_scaler.update()
        return bool(steps)

    def check_and_step(self, terms: Mapping[str, float], gradient: float, *, cases: str, epoch: int) -> bool:
        """Stop at values that are not finite; without a gradient scaler, step. Returns whether the weights have moved.

        Args:
            terms: of the loss, by name.
            gradient: the norm of the gradients.
            cases: of the batch, for the message.
            epoch: the present one, for the message.

        Raises:
            RuntimeError: a value is not finite; with a gradient scaler, in many steps in a row.
        """
        scaled = self._grad_scaler is not None
        # Terms may be finite where their gradient is not.
        values = {**terms, "the gradient": gradient}
        broken = [name for name, value in values.items() if not np.isfinite(value)]
        if len(broken) > 1 and broken[-1] == "the gradient":
            broken = broken[:-1]
        self._overflows = self._overflows + 1 if broken else 0
        if self._overflows > (_OVERFLOWS_IN_A_ROW if scaled else 0):
            raise RuntimeError(
                f"Training stops in epoch {epoch}: not finite: {', '.join(broken)}. Cases of the batch: {cases}. The "
                "last checkpoint is intact. Check these images for extreme intensities, or lower the learning rate."
            )
        if not scaled:
            self._optimizer.step()
        return not scaled
