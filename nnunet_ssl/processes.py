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
class Sigterm:
    """What becomes of a SIGTERM within :func:`handled_sigterm`.

    Attributes:
        held: whether it is noted, for a loop to end at its next good moment, instead of raising SystemExit at once.
        came: whether it was noted.
        shields: whether processes that are forked now leave it to this one, as long as this one lives. A scheduler may
            send it to all of them, and a worker that dies while it holds a lock makes the others wait for ever.
    """

    held: bool = False
    came: bool = False
    shields: bool = False


@contextmanager
def handled_sigterm() -> Iterator[Sigterm]:
    """Within, SIGTERM ends this process in an orderly way: by SystemExit with code 143, at once or when it suits.

    Schedulers send it some time before they kill. Processes that are forked within end at it as ever, where they are
    not shielded. Python handles signals in its main thread alone: from another one nothing changes.
    """
    owner, state = os.getpid(), Sigterm()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != owner:
            if state.shields and os.getppid() == owner:
                return
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif state.held:
            state.came = True
        else:
            raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield state
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def killed_workers(loaders: Mapping[str, Sequence[BaseProcess]]) -> list[str]:
    """Which workers a signal ended that nobody here sends, in words.

    Args:
        loaders: each loader's worker processes, by what the loader makes.
    """
    return [
        f"worker {number} of {len(workers)} that make {name} was ended by {signal.Signals(-worker.exitcode).name}"
        for name, workers in loaders.items()
        for number, worker in enumerate(workers, start=1)
        # Loaders themselves end workers by SIGTERM.
        if worker.exitcode is not None and worker.exitcode < 0 and worker.exitcode != -signal.SIGTERM
    ]
