"""What benchmarks/gpu.py measures, each in a process that it starts: one arm in, rows out, on a GPU or on a CPU."""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import statistics
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from common import (
    FEATURES,
    WITHOUT_DATASET,
    give_unlabeled_batches,
    in_largest_stage,
    labeled_batch,
    make_trainer,
    now,
    plans_without_dataset,
    resident_peak,
    write_plans_without_dataset,
)
from gpu_rows import LARGE_PLAN, SMALL_PLAN, SUPERVISED, Arm, Row, read_rows, turn, write_row
from passes import bare_passes
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_ssl.trainer.live_bytes import LiveBytes
from nnunet_ssl.trainer.memory import step_bytes

_EDGES = {SMALL_PLAN: 64, LARGE_PLAN: 128}


@dataclass(frozen=True)
class Effort:
    """How much is done.

    Attributes:
        warm: steps before those that are measured.
        timed: steps that are measured.
        scaled: steps in which the gradient scaler is watched.
        edge: voxels along each side of the patches of the plans without a dataset, instead of their own.
        features: per stage.
        backend: of torch.compile.
    """

    warm: int = 2
    timed: int = 3
    scaled: int = 100
    edge: int | None = None
    features: tuple[int, ...] = FEATURES
    backend: str = "inductor"


DRY = Effort(warm=1, timed=2, scaled=3, edge=16, features=(4, 6, 8), backend="aot_eager")


def measure(args: argparse.Namespace, arms: list[Arm]) -> None:
    """Measure arms one after the other; rows are written as soon as they are known, and one that fails says why."""
    effort = DRY if args.dry_run else Effort()
    if args.device == "cuda":
        torch.set_num_threads(1)  # as nnUNetv2_train does
    torch.compile = partial(torch.compile, backend=effort.backend)  # type: ignore[assignment]
    for arm in arms:
        if arm.compiled:
            torch._dynamo.reset()
            setattr(import_module("torch._inductor.config"), "force_layout_optimization", arm.layout)  # noqa: B010
        try:
            for row in _MEASUREMENTS[arm.question](args, effort, arm):
                write_row(args.output, arm, row)
        except Exception as error:
            traceback.print_exc()
            write_row(args.output, arm, {"note": "failed: " + " ".join(f"{type(error).__name__}: {error}".split())})
        _free()


@contextmanager
def _trainer(
    args: argparse.Namespace, effort: Effort, arm: Arm, *, name: str = "", device: str = "", **settings: Any
) -> Iterator[Any]:
    """A trainer of the arm's plan, in folders of its own."""
    options = argparse.Namespace(d=args.d, c=args.c, p=args.p, device=device or args.device)
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        if arm.plan in _EDGES:
            edge = effort.edge or _EDGES[arm.plan]
            write_plans_without_dataset(Path(folder), plans_without_dataset([edge] * 3, features=effort.features))
            os.environ["nnUNet_preprocessed"] = folder
            options.d, options.c, options.p = WITHOUT_DATASET, "3d_fullres", "nnUNetPlans"
        try:
            yield make_trainer(
                options, name or arm.trainer, Path(folder) / "results", compiled=arm.compiled, **settings
            )
        finally:
            os.environ.clear()
            os.environ.update(before)


def _settings(arm: Arm) -> dict[str, Any]:
    if arm.trainer == SUPERVISED:
        return {}
    return {"memory_mode": "split" if arm.mode.startswith("bare ") else arm.mode}


def _step(trainer: Any, batches: int = 1) -> Callable[[], dict]:
    """A call of it is a training step on random images."""
    labeled = itertools.cycle([labeled_batch(trainer) for _ in range(batches)])
    if hasattr(trainer, "unlabeled_views"):
        give_unlabeled_batches(in_largest_stage(trainer), batches)
    return lambda: trainer.train_step(next(labeled))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cuda(args: argparse.Namespace) -> bool:
    return bool(args.device == "cuda")


# ---- a, b, f: step time and memory ----------------------------------------------------------------------------------


def _time_and_memory(args: argparse.Namespace, effort: Effort, arm: Arm) -> Iterator[Row]:
    bare = arm.mode.startswith("bare ")
    before = _used(args)
    row: Row = {}
    run: Callable[[], object]
    with ExitStack() as stack:
        with turn(args.output, alone=False):
            trainer = stack.enter_context(_trainer(args, effort, arm, **_settings(arm)))
            row["patch"] = list(trainer.configuration_manager.patch_size)
            if bare:
                give_unlabeled_batches(in_largest_stage(trainer))
                row["passes"], run = bare_passes(trainer, labeled_batch(trainer), stacked=arm.mode == "bare stacked")
            else:
                run = _step(trainer)
            if arm.compiled:
                # All compile at once. What cuDNN finds the fastest meanwhile would depend on the others. The memory may
                # not suffice for all: then this one compiles again when it is alone.
                torch._dynamo.utils.counters.clear()
                with _cudnn_benchmark(False), suppress(RuntimeError):
                    row["first"] = _seconds(trainer.device, run, 2)
                _free()
        if not bare and not arm.compiled:
            row["computed"] = _computed(args, effort, arm, trainer)
        with turn(args.output, alone=True):
            first = _seconds(trainer.device, run, effort.warm)
            row.setdefault("first", first)
            row["seconds"] = statistics.median(_seconds(trainer.device, run, 1) for _ in range(effort.timed))
            row["allocated"], row["reserved"] = (peak - held for peak, held in zip(_peaks(args), before, strict=True))
            _free()
        if arm.compiled:
            counters = torch._dynamo.utils.counters
            row["graphs"] = counters["stats"]["unique_graphs"]
            row["breaks"] = sum(counters["graph_break"].values())
        if trainer.grad_scaler is not None and not bare:
            row["scale"] = trainer.grad_scaler.get_scale()
        yield row


def _seconds(device: torch.device, run: Callable[[], object], times: int) -> float:
    start = now(device)
    for _ in range(times):
        run()
    return now(device) - start


@contextmanager
def _cudnn_benchmark(on: bool) -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _used(args: argparse.Namespace) -> tuple[int, int]:
    """Bytes that are allocated and reserved now; from here on the peaks count. On a CPU, the peak so far."""
    if not _cuda(args):
        return resident_peak(), resident_peak()
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def _peaks(args: argparse.Namespace) -> tuple[int, int]:
    """Most bytes that were allocated and reserved at once; on a CPU, that this process ever had resident."""
    if _cuda(args):
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return resident_peak(), resident_peak()


def _computed(args: argparse.Namespace, effort: Effort, arm: Arm, trainer: Any) -> int:
    """What is computed for the step beforehand, in bytes: weights, optimizer and batches among them."""
    if arm.trainer != SUPERVISED:
        mode: Any = arm.mode
        return step_bytes(trainer, mode, mixed_precision=_cuda(args)).peak
    with _trainer(args, effort, arm, name="CrossMatchTrainer", device="cpu") as method:
        return step_bytes(method, "supervised", mixed_precision=_cuda(args)).peak


# ---- c: the fall-back from stacked to split -------------------------------------------------------------------------


def _fall_back(args: argparse.Namespace, effort: Effort, arm: Arm) -> Iterator[Row]:
    assert arm.limit is not None
    with turn(args.output, alone=True), _trainer(args, effort, arm, memory_mode="auto") as trainer:
        step = _step(trainer)
        least, most = (_needed(args, arm, trainer, mode) for mode in ("split", "stacked"))
        limit = int(least + arm.limit * (most - least))
        # On a CPU "auto" begins in split.
        trainer.step_gradients.memory_mode = "stacked"
        modes, finite = [], True
        with _limited_memory(args, limit):
            for _ in range(3):
                finite = finite and math.isfinite(step()["loss/total"])
                modes.append(trainer.step_gradients.memory_mode)
        yield {"bytes": limit, "split": least, "stacked": most, "modes": modes, "finite": finite}


def _needed(args: argparse.Namespace, arm: Arm, trainer: Any, mode: Any) -> int:
    """Bytes of a step: measured in this run, or computed; on a CPU without what is there before the step."""
    if not _cuda(args):
        found = step_bytes(trainer, mode, mixed_precision=False)
        return found.peak - found.before
    return measured(read_rows(args.output), arm, mode) or step_bytes(trainer, mode, mixed_precision=True).peak


def measured(rows: list[Row], arm: Arm, mode: str) -> int | None:
    """Bytes that were reserved for the step of an arm's trainer in a memory mode, if that is known."""
    wanted = {"question": "a", "trainer": arm.trainer, "plan": arm.plan, "compiled": arm.compiled, "mode": mode}
    found = [row["reserved"] for row in rows if "reserved" in row and wanted.items() <= row.items()]
    return found[0] if found else None


@contextmanager
def _limited_memory(args: argparse.Namespace, limit: int) -> Iterator[None]:
    if not _cuda(args):
        with _EndingMemory(limit):
            yield
        return
    _free()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class _EndingMemory(LiveBytes):
    """On a CPU: within, what is made anew ends at ``limit`` bytes as a GPU's memory does."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        self.peak = 0
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.peak > self.limit:
            raise torch.cuda.OutOfMemoryError(f"out of memory: {self.peak} bytes of {self.limit}")
        return result


# ---- d: kernels -----------------------------------------------------------------------------------------------------


def _kernels(args: argparse.Namespace, effort: Effort, arm: Arm) -> Iterator[Row]:
    device = "cuda" if _cuda(args) else "cpu"
    activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, device.upper())}
    with turn(args.output, alone=True), _trainer(args, effort, arm, **_settings(arm)) as trainer:
        step = _step(trainer)
        _seconds(trainer.device, step, effort.warm)
        alone = statistics.median(_seconds(trainer.device, step, 1) for _ in range(effort.timed))
        with torch.profiler.profile(activities=activities) as profile:
            _seconds(trainer.device, step, 1)
    time = f"self_{'device' if _cuda(args) else 'cpu'}_time_total"
    found = [
        event
        for event in profile.key_averages()
        if event.device_type.name.lower() == device and not getattr(event, "is_user_annotation", False)
    ]
    found.sort(key=lambda event: getattr(event, time), reverse=True)
    seconds = [getattr(event, time) / 1e6 for event in found]
    total = {"kernel": f"all {len(found)} kernels, of a step of {1000 * alone:.1f} ms", "seconds": sum(seconds)}
    yield {**total, "part": 1.0, "calls": sum(event.count for event in found)}
    for event, spent in list(zip(found, seconds, strict=True))[:10]:
        yield {"kernel": event.key, "seconds": spent, "part": spent / sum(seconds), "calls": event.count}


# ---- e: synchronizations --------------------------------------------------------------------------------------------


def _synchronizations(args: argparse.Namespace, effort: Effort, arm: Arm) -> Iterator[Row]:
    with turn(args.output, alone=False), _trainer(args, effort, arm, **_settings(arm)) as trainer:
        step = _step(trainer)
        _seconds(trainer.device, step, effort.warm)
        lines = lines_that_synchronize(trainer.device, step)
    yield {"line": "all", "times": sum(lines.values())}
    yield from ({"line": line, "times": times} for line, times in lines.most_common())


def lines_that_synchronize(device: torch.device, run: Callable[[], object]) -> Counter[str]:
    """The lines of code that wait for a GPU, or on a CPU would, and how often."""
    lines: Counter[str] = Counter()
    with warnings.catch_warnings(), _warned_of_synchronizations(device):
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: _count_line(lines, str(message))
        run()
    return lines


def _count_line(lines: Counter[str], message: str) -> None:
    if "called a synchronizing" not in message:  # PyTorch's words
        return
    # The innermost line of nnU-Net or of this package, not that of PyTorch's Python code.
    for frame in reversed(traceback.extract_stack()):
        for package in ("nnunet_ssl", "nnunetv2", "batchgenerators"):
            if f"/{package}/" in frame.filename:
                file = package + frame.filename.rpartition(f"/{package}")[2]
                lines[f"{file}:{frame.lineno} {frame.line}"] += 1
                return
    lines["elsewhere"] += 1


@contextmanager
def _warned_of_synchronizations(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        with _WarnOfTransfers():
            yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _WarnOfTransfers(TorchDispatchMode):
    """On a CPU: within, operations warn that would synchronize on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            warnings.warn(f"called a synchronizing operation, {func}", stacklevel=2)
        return func(*args, **(kwargs or {}))


# ---- g: mixed precision ---------------------------------------------------------------------------------------------


def _gradient_scaler(args: argparse.Namespace, effort: Effort, arm: Arm) -> Iterator[Row]:
    with turn(args.output, alone=False), _trainer(args, effort, arm, **_settings(arm)) as trainer:
        # On a CPU, where nnU-Net has none, it scales and watches as well.
        trainer.grad_scaler = trainer.grad_scaler or torch.amp.GradScaler(trainer.device.type)
        step = _step(trainer, batches=4)
        scales, losses = [trainer.grad_scaler.get_scale()], []
        for _ in range(effort.scaled):
            terms = step()
            losses.append(float(terms.get("loss/total", terms["loss"])))
            scales.append(trainer.grad_scaler.get_scale())
    skipped = [number for number, (before, after) in enumerate(itertools.pairwise(scales), start=1) if after < before]
    yield {
        "steps": len(losses),
        "finite": sum(map(math.isfinite, losses)),
        "skipped": skipped,
        "scale": scales[-1],
        "loss": [losses[0], losses[-1]],
    }


_MEASUREMENTS: dict[str, Callable[[argparse.Namespace, Effort, Arm], Iterator[Row]]] = {
    "a": _time_and_memory,
    "c": _fall_back,
    "d": _kernels,
    "e": _synchronizations,
    "f": _time_and_memory,
    "g": _gradient_scaler,
}
