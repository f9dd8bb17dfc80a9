"""2,000 steps: memory, open files, threads and shared memory do not grow, steps do not become slower."""

from __future__ import annotations

import gc
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

import pytest
from method_steps import TRAINERS, make_short
from own_process import children, exit_code, shared_memory

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks for resources in /proc")]

EPOCHS, STEPS = 20, 100


def resources() -> dict[str, float]:
    """Of this process and its workers."""
    pids = [os.getpid(), *children(os.getpid())]
    # Pages that processes share are counted once: workers come to copy what they were forked with.
    memory = [re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE) for pid in pids]
    return {
        "memory in MB": sum(int(pss[1]) for pss in memory if pss) / 1024,
        "open files": sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
        "threads": sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids),
        "processes": len(pids),
        "shared memory": len(shared_memory(pids)),
    }


def train(method, planned, folder: Path) -> None:
    trainer = make_short(method, planned, folder, EPOCHS, STEPS)
    step, seconds, found = trainer.train_step, [], []

    def timed(batch):
        began = time.perf_counter()
        values = step(batch)
        seconds.append(time.perf_counter() - began)
        return values

    epoch_end = trainer.on_epoch_end

    def on_epoch_end():
        epoch_end()
        # Of the figures that nnU-Net draws each epoch 75 MB stay until Python's collector comes by, every few epochs.
        gc.collect()
        found.append({**resources(), "seconds per step": statistics.median(seconds[-STEPS:])})
        (folder / "resources.json").write_text(json.dumps(found))

    trainer.train_step, trainer.on_epoch_end = timed, on_epoch_end
    trainer.run_training()


@pytest.mark.parametrize("method", TRAINERS, ids=lambda method: method.__name__)
def test_nothing_grows(method, planned_2d, environment, tmp_path):
    code, output = exit_code(train, method, planned_2d, tmp_path, log=tmp_path / "log", seconds=1200)
    assert code == 0, output[-3000:]
    epochs = json.loads((tmp_path / "resources.json").read_text())
    assert len(epochs) == EPOCHS
    # The first epochs fill caches and queues.
    quarter = EPOCHS // 4
    early, late = epochs[quarter : 2 * quarter], epochs[-quarter:]
    table = []
    for name in epochs[0]:
        before, after = (statistics.median(epoch[name] for epoch in part) for part in (early, late))
        table.append(
            f"{name}: {before:.4g} in epochs {quarter} to {2 * quarter - 1}, {after:.4g} in the last {quarter}"
        )
        print(table[-1])
        # An allocator keeps now more, now less; time is that of a shared machine.
        slack = {"memory in MB": 1.03, "seconds per step": 1.5}.get(name, 1.0)
        assert after <= slack * before, "\n".join(table)
