"""What a training has done so far and what it took: time of epochs and steps, memory."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nnunet_ssl.files import write_text


@dataclass
class Progress:
    """What a training has done so far, kept next to its task, so that one that goes on later knows it.

    Attributes:
        epochs: seconds of each epoch.
        steps: median seconds of a step, per epoch.
        cpu_steps: median processor seconds of a step, per epoch, of the training process alone.
        peak_memory: in MB; see :func:`peak_memory`.
        between: seconds of what self-training does between its trainings.
        references: median seconds of a step of nnUNetTrainer on this machine, per epoch; measured when the process
            began, so that what the machine did on another day does not count.
        cpu_references: median processor seconds of such a step.
    """

    epochs: list[float]
    steps: list[float]
    cpu_steps: list[float]
    peak_memory: float
    between: float = 0.0
    references: list[float] = field(default_factory=list)
    cpu_references: list[float] = field(default_factory=list)

    def forget(self, before: int) -> None:
        """Forget all epochs but the first ones."""
        for values in (self.epochs, self.steps, self.cpu_steps, self.references, self.cpu_references):
            del values[before:]
        if not before:
            self.peak_memory = self.between = 0.0

    @classmethod
    def read(cls, file: Path) -> Progress:
        """Read it; where there is none or it is broken, nothing has been measured."""
        try:
            return cls(**json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls([], [], [], 0.0)


def progress_file(task_file: Path) -> Path:
    """Where a training writes its :class:`Progress`."""
    return task_file.with_suffix(".progress")


def measure(trainer: Any, progress: Progress, file: Path, reference: tuple[float, float]) -> None:
    """Note what epochs and steps take, and write it after each epoch; ``reference``: nnUNetTrainer's step."""
    step, epoch_start, epoch_end = trainer.train_step, trainer.on_epoch_start, trainer.on_epoch_end
    walls: list[float] = []
    cpus: list[float] = []
    started = 0.0

    def begun() -> None:
        nonlocal started
        started = time.monotonic()
        epoch_start()

    def timed(batch: dict) -> dict:
        wall, cpu = time.perf_counter(), time.process_time()
        result = step(batch)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        return result

    def noted() -> None:
        epoch_end()
        progress.epochs.append(time.monotonic() - started)
        progress.steps.append(statistics.median(walls))
        progress.cpu_steps.append(statistics.median(cpus))
        progress.references.append(reference[0])
        progress.cpu_references.append(reference[1])
        progress.peak_memory = max(progress.peak_memory, peak_memory(trainer.device.type))
        walls.clear()
        cpus.clear()
        write_text(file, json.dumps(asdict(progress)) + "\n")

    trainer.train_step, trainer.on_epoch_start, trainer.on_epoch_end = timed, begun, noted


def peak_memory(device: str) -> float:
    """In MB: allocated on a GPU; else what the training process held of the machine's memory; nan where unknown."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    # In KiB, but on macOS in bytes.
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def costs(progress: Progress, epochs: Sequence[int], length: int) -> dict[str, object]:
    """The columns on time and memory; an epoch that was not measured, because a kill came, counts as the others.

    Args:
        progress: what was measured.
        epochs: of each stage; steps are medians within a stage, weighted by its length.
        length: epochs of the campaign's trainings. Self-training has several of them, and its step costs the sum.
    """
    measured = progress.epochs or [float("nan")]
    return {
        "training_seconds": round(statistics.fmean(measured) * sum(epochs) + progress.between, 1),
        "seconds_per_step": f"{_typical(progress.steps, epochs, length):.6f}",
        "cpu_seconds_per_step": f"{_typical(progress.cpu_steps, epochs, length):.6f}",
        "reference_seconds_per_step": f"{_median(progress.references):.6f}",
        "reference_cpu_seconds_per_step": f"{_median(progress.cpu_references):.6f}",
        "peak_memory_mb": round(progress.peak_memory, 1),
    }


def _typical(steps: Sequence[float], epochs: Sequence[int], length: int) -> float:
    total, begin = 0.0, 0
    for count in epochs:
        total += count * _median(steps[begin : begin + count])
        begin += count
    return total / length


def _median(values: Sequence[float]) -> float:
    return statistics.median(values or [float("nan")])
