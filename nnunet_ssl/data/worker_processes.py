"""Worker processes that may die, most often because memory ran out, without taking the work of the others along."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nnunetv2.configuration import default_num_processes

from nnunet_ssl.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """As many processes as nnU-Net starts by default, but no more than there are cores."""
    return min(default_num_processes, os.cpu_count() or 1)


def in_worker_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result | None]]:
    """Call a function once per item, in parallel.

    After a worker's death one worker goes on, with all memory to itself. Should it die too, that is its item's result,
    and the others are done in parallel again.

    Args:
        function: it pickles, and so do items and results.
        items: in the order in which they are begun.
        workers: number of processes, each of which has one thread; 0 works in this one.

    Returns:
        each item, as soon as it is done, with its result, or with None if its process died.

    Raises:
        UserError: processes die before they do anything.
    """
    if workers == 0:
        yield from ((item, function(item)) for item in items)
        return
    waiting = dict(enumerate(items))
    now = workers
    while waiting:
        with _pool(now) as pool:
            futures: dict[Future[Result], int] = {}
            with contextlib.suppress(BrokenProcessPool):
                futures.update((pool.submit(function, item), index) for index, item in waiting.items())
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield waiting.pop(futures[future]), future.result()
        if waiting and now == 1:
            # One worker takes them in order.
            yield waiting.pop(min(waiting)), None
        now = 1 if now > 1 else workers


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        if workers == 1:
            pool.submit(os.getpid).result()
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "Worker processes end as soon as they start, so cases cannot be processed in parallel. Check that this "
            "machine has free memory. In a Python script, put the call under if __name__ == '__main__'."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group: end without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    # For libraries that are imported later, torch among them; those that are here already are told below.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

    import SimpleITK
    from threadpoolctl import threadpool_limits

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threadpool_limits(1)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
