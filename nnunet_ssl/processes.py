"""What a training has to do with processes: seeds, environment, signals, workers that die."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch


def derived_seed(seed: int, *purpose: int) -> int:
    """A seed in [0, 2³²) for one purpose, unlike those for others."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0])


def seed_this_process(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Within, these environment variables are set; afterwards they are as before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass
class StopSignal:
    """What becomes of SIGTERM, or of SIGINT as Ctrl-C sends it, within :func:`handled_signals`.

    Attributes:
        held: whether it is noted, for a loop to end at its next good moment, instead of raising SystemExit at once.
        came: number of the signal that was noted; 0: none.
        shields: whether processes that are forked now leave it to this one, as long as this one lives. A scheduler or
            a terminal may send it to all of them, and a worker that dies while it holds a lock makes the others wait
            for ever.
    """

    held: bool = False
    came: int = 0
    shields: bool = False

    @property
    def wanted(self) -> bool:
        """Whether a signal was noted."""
        return self.came != 0

    @property
    def number(self) -> int:
        """Of the signal that stops the training; another process of it may have noted which."""
        return self.came or signal.SIGTERM

    @property
    def name(self) -> str:
        """As a user knows it."""
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name

    def message(self, epoch: int, steps: int, file: Path) -> str:
        """What a training that stops says: where it was, and the checkpoint that it wrote."""
        return (
            f"{self.name} in epoch {epoch}, after {steps} steps: the training stops, and its weights are in {file}. "
            "--c continues with these weights at the start of the epoch."
        )


@contextmanager
def handled_signals() -> Iterator[StopSignal]:
    """Within, SIGTERM and Ctrl-C end this process in an orderly way, at once or when it suits.

    They do so by SystemExit with code 143 and 130. Schedulers send SIGTERM some time before they kill. Processes that
    are forked within end at these signals as ever, where they are not shielded. Python handles signals in its main
    thread alone: from another one nothing changes. Ctrl-C stays ignored where it was, as in a shell's background jobs.
    """
    owner, state = os.getpid(), StopSignal()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != owner:
            if state.shields and os.getppid() == owner:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif state.held:
            state.came = state.came or number
        else:
            raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    handled = [one for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def killed_workers(loaders: Mapping[str, Sequence[BaseProcess]]) -> list[str]:
    """Which workers a signal ended that nobody here sends, in words.

    Args:
        loaders: each loader's worker processes, by what the loader makes.
    """
    return [
        f"worker {number} of {len(workers)} that make {name} was killed by {signal.Signals(-worker.exitcode).name}"
        for name, workers in loaders.items()
        for number, worker in enumerate(workers, start=1)
        # Loaders themselves end workers by SIGTERM, and a user by Ctrl-C.
        if worker.exitcode is not None
        and worker.exitcode < 0
        and -worker.exitcode not in (signal.SIGTERM, signal.SIGINT)
    ]
