"""Functions in processes of their own, which can be killed, with everything that they start.

Not in forks of the process that runs the tests: PyTorch's backward passes do not work in the fork of a process that has
had some. A server that has only imported what training needs is forked instead, which takes no second import.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_commands import IMPORTS


def server() -> multiprocessing.context.ForkServerContext:
    """Which forks; it starts when the first process is wanted, not on Windows, which has none."""
    from multiprocessing.forkserver import ensure_running

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTS, "conftest", "method_steps", "previous_stage", "tiny_dataset"])
    with pytest.MonkeyPatch.context() as patched:
        # The server leaves out modules that it does not find, and up to Python 3.13.0 it looks in its own path alone.
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ensure_running()
    return context


def _begin(environment: dict[str, str], log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setpgrp()
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # As elsewhere on Linux, not as this process itself was started.
    multiprocessing.set_start_method("fork", force=True)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    function(*arguments)


@contextmanager
def started(function: Callable[..., Any], *arguments: Any, log: Path) -> Iterator[BaseProcess]:
    """A process that calls the function, in a group of its own; the group is killed at the end.

    Args:
        function: as picklable as its arguments.
        arguments: of the function.
        log: file for what it prints.
    """
    process = server().Process(target=_begin, args=(dict(os.environ), log, function, arguments))
    process.start()
    try:
        yield process
    finally:
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def exit_code(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    act: Callable[[BaseProcess], Any] | None = None,
    seconds: float = 300,
) -> tuple[int, str]:
    """Wait for its end, after ``act(process)``; returns exit code and output."""
    with started(function, *arguments, log=log) as process:
        if act:
            act(process)
        process.join(seconds)
        assert process.exitcode is not None, f"it hangs: {log.read_text()[-3000:]}"
        return process.exitcode, log.read_text()


def kill_after(
    seconds: float,
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    once: Callable[[], Any] = lambda: True,
) -> bool:
    """Kill it and its children some time after ``once()`` is true; returns whether it had ended by then.

    Counted from what it has done, kills come at different moments of its work however slow the machine is.
    """
    log.unlink(missing_ok=True)
    with started(function, *arguments, log=log) as process:
        until(lambda: process.exitcode is not None or once(), 300)
        process.join(seconds)
        ended = process.exitcode is not None
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
    return ended


def duration(function: Callable[..., Any], *arguments: Any, log: Path) -> float:
    """How long it takes undisturbed, in seconds, from when the server has forked it."""
    with started(function, *arguments, log=log) as process:
        began = time.monotonic()
        process.join(300)
        assert process.exitcode == 0, f"it hangs or fails: {log.read_text()[-3000:]}"
        return time.monotonic() - began


def until(condition: Callable[[], Any], seconds: float = 100.0) -> Any:
    """Wait for the condition and return what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    """Processes that the process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found.append(int(status.parent.name))
    return found


def shared_memory(pids: Iterable[int]) -> set[str]:
    """Shared memory and semaphores of processes; on Linux, names that PyTorch and loky make have the number in them."""
    names = {path.name for path in Path("/dev/shm").iterdir()}
    return {name for name in names if set(pids) & set(map(int, re.findall(r"\d+", name)))}
