"""The guarded step of the optimizer."""

from __future__ import annotations

import pytest
import torch

from nnunet_ssl.trainer.optimizer import GuardedOptimizer


def test_gradients_that_are_never_finite_stop_a_training_with_a_gradient_scaler_too() -> None:
    """The loss is finite and its gradient is not: the scaler skips every step, and nothing would ever move."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([parameter], 0.1), torch.GradScaler("cpu")
    guarded = GuardedOptimizer(optimizer, [parameter], scaler)

    def step() -> bool:
        optimizer.zero_grad()
        loss = (parameter * 0).abs().sqrt().sum()
        scaler.scale(loss).backward()
        norm = guarded.clip()
        moved = guarded.step_scaled()
        return guarded.check_and_step({"supervised": loss.item()}, norm.item(), cases="a, b", epoch=3) or moved

    assert not any(step() for _ in range(20))
    with pytest.raises(RuntimeError, match=r"epoch 3: not finite: the gradient\. Cases of the batch: a, b"):
        step()
    assert parameter.item() == 1


def test_an_overflow_now_and_then_stops_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([parameter], 0.1), torch.GradScaler("cpu")
    guarded = GuardedOptimizer(optimizer, [parameter], scaler)
    for number in range(60):
        optimizer.zero_grad()
        scaler.scale((parameter * (float("inf") if number % 3 else 1.0)).sum()).backward()
        norm = guarded.clip()
        assert guarded.step_scaled() == (number % 3 == 0)
        guarded.check_and_step({"supervised": 1.0}, norm.item(), cases="", epoch=0)
