"""The time of a training step, measured on a few steps with random images."""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.data.labeled_targets import AddTargets
from nnunet_ssl.trainer.memory import labeled_batch, unlabeled_batch, without_a_trace


def seconds_per_step(trainer: Any, *, steps: int = 2) -> float:
    """Mean time of a step; see :func:`step_times`."""
    return statistics.fmean(wall for wall, _ in step_times(trainer, steps=steps))


def step_times(trainer: Any, *, steps: int) -> list[tuple[float, float]]:
    """Seconds of each step, and of processor time in this process; loaders and the first step, which is slower, not.

    Args:
        trainer: of this package or nnU-Net's, as :func:`~nnunet_ssl.trainer.memory.trainer_of_plans` makes it, for the
            device that is measured. Of a method with stages, the last stage is measured.
        steps: how many are measured.
    """
    with without_a_trace():
        trainer.initialize()
    trainer.network.train()
    ours = hasattr(trainer, "unlabeled_views")
    batch = filled(labeled_batch(trainer, weak=ours and trainer.unlabeled_views().weak_labeled))
    if ours:
        batch = AddTargets(trainer.extra_targets)(**batch)
        last = trainer.stages()[-1]
        trainer.stage = lambda progress: last
        trainer.dataloader_unlabeled = itertools.repeat(filled(unlabeled_batch(trainer)))
    times = []
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in range(steps + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.train_step(batch)
            _wait(trainer.device)
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times[1:]


def filled(value: Any) -> Any:
    """A batch whose images are noise, and whose labels and boxes are zeros."""
    if isinstance(value, dict):
        return {name: filled(one) for name, one in value.items()}
    if isinstance(value, list):
        return [filled(one) for one in value]
    if not isinstance(value, Tensor):
        return value
    return torch.randn_like(value) if value.is_floating_point() else torch.zeros_like(value)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
