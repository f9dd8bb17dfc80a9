"""What the processes of benchmarks/gpu.py share: what is to be measured, the rows that are known, and the GPU."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SUPERVISED = "nnUNetTrainer"
SMALL_PLAN, LARGE_PLAN = "64³", "128³"

Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One thing to measure.

    Attributes:
        question: its letter.
        trainer: its name.
        plan: SMALL_PLAN or LARGE_PLAN, which need no dataset, or "dataset": the one that the command names.
        mode: the memory mode, for nnUNetTrainer none; "bare stacked" and "bare separate" are the passes alone.
        compiled: whether with torch.compile.
        layout: whether with the inductor's force_layout_optimization.
        limit: where between what split and what stacked need the memory ends, in [0, 1].
    """

    question: str
    trainer: str
    plan: str
    mode: str = ""
    compiled: bool = False
    layout: bool = False
    limit: float | None = None


def write_row(folder: Path, arm: Arm, row: Row) -> None:
    """Append a row; processes that do so at once do not cut each other's lines."""
    with (folder / "gpu.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(arm), **row}) + "\n")


def read_rows(folder: Path) -> list[Row]:
    """All rows so far; the last line may be in the making."""
    file = folder / "gpu.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Within, no other process measures; or, if not ``alone``, none that has to be alone does."""
    with (folder / "gate.lock").open("w") as gate, (folder / "device.lock").open("w") as lock:
        # Who waits to be alone keeps the gate, so that nobody overtakes.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield
