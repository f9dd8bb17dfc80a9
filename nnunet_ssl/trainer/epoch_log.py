"""What an epoch's steps add up to: means of the terms, recorded shares, waiting time; in nnU-Net's logger and log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.distributed import num_processes
from nnunet_ssl.errors import MethodError
from nnunet_ssl.evaluation.class_shares import collapse_warning, collapsed

LOG_PREFIX = "ssl/"
_TIMED_STEPS = 10
# Written by the trainer itself.
_RESERVED = ("loss/", "weight/", "share/", "patches/", "seconds/", "skipped_steps")


class EpochLog:
    """Collects while an epoch runs and writes when it ends.

    Args:
        logger: nnU-Net's, which has a list of the epochs' values for each name.
        write_line: writes a line to nnU-Net's log file.
        counts_skipped_steps: whether there is a gradient scaler, which may skip steps.

    Attributes:
        seconds_waiting: how long the epoch's steps have waited for unlabeled batches.
        skipped_steps: how many steps the gradient scaler has skipped.
    """

    def __init__(self, logger: Any, write_line: Callable[[str], None], *, counts_skipped_steps: bool) -> None:
        self._logger = logger
        self._write_line = write_line
        self._counts_skipped_steps = counts_skipped_steps
        self._timed = 0
        self.start()

    @property
    def lists(self) -> dict[str, list[Any]]:
        """What nnU-Net's logger has, by name."""
        return self._logger.local_logger.my_fantastic_logging

    def start(self) -> None:
        """Begin an epoch: all counters are zero."""
        self._steps = 0
        self.seconds_waiting = 0.0
        self.skipped_steps = 0
        self._counts: dict[str, Tensor] = {}

    def time_step(self, steps_of_epoch: int) -> None:
        """Call it after each step: the first ones of a training tell how long an epoch will take.

        The very first step, which is slower, is not counted. A terminal shows how far the epoch is.
        """
        self._steps += 1
        if sys.stdout.isatty() and num_processes() == 1:
            # The next line of the log, which is longer, takes its place.
            print(f"{self._steps} of {steps_of_epoch} steps", end="\r", flush=True)
        if self._timed == 0:
            self._timed_since = perf_counter()
        self._timed += 1
        if self._timed == _TIMED_STEPS + 1:
            seconds = (perf_counter() - self._timed_since) / _TIMED_STEPS
            self._write_line(
                f"{seconds:.2f} s per step, so about {seconds * steps_of_epoch / 60:.1f} min per epoch of "
                f"{steps_of_epoch} steps, without validation"
            )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, the training waits for an unlabeled batch."""
        start = perf_counter()
        yield
        self.seconds_waiting += perf_counter() - start

    @property
    def counts(self) -> Mapping[str, Tensor]:
        """The recorded counts so far: (2,) or (2, K + 1), count and total. Kept tensors do not change."""
        return dict(self._counts)

    def reset_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Go back to :attr:`counts` of an earlier moment, when what came after it is done again."""
        self._counts = dict(counts)

    def record(self, name: str, count: Tensor, total: Tensor) -> None:
        """Add to two counts of a method, whose ratio is logged; no transfer from the device.

        Args:
            name: logged as ``ssl/<name>``, and the entries after the first as the list ``ssl/<name>_per_class``.
            count: scalar or (K + 1,).
            total: like ``count``.

        Raises:
            MethodError: the name is one of the trainer's own, or no name; or the counts are no tensors of one shape.
        """
        if not isinstance(name, str) or not name or name.startswith(_RESERVED):
            raise MethodError(
                f"record() gets the name {name!r}. Give a text that does not begin with {', '.join(_RESERVED)}."
            )
        before = self._counts.get(name, torch.empty(2, *getattr(count, "shape", ()), device="meta"))
        tensors = isinstance(count, Tensor) and isinstance(total, Tensor)
        if not (tensors and before.shape[1:] == count.shape == total.shape and count.ndim < 2):
            found = " and ".join(
                f"a tensor {tuple(one.shape)}" if isinstance(one, Tensor) else repr(one) for one in (count, total)
            )
            raise MethodError(
                f"record() gets {found} as count and total of {name!r}. Give two tensors of one shape, the same in "
                "each step: scalars, or (K + 1,) with an entry for each of K classes after the first."
            )
        self.add(name, count, total)

    def add(self, name: str, count: Tensor, total: Tensor) -> None:
        """Add to two counts of the trainer itself; arguments as for :meth:`record`."""
        counts = torch.stack((count, total)).detach()
        # Half precision ends at 65504, and MPS has no double precision.
        counts = counts.float() if counts.is_floating_point() else counts.long()
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def finish(
        self, epoch: int, steps: Sequence[Mapping[str, float]], sum_over_ranks: Callable[[Tensor], Any] | None = None
    ) -> None:
        """Log the epoch.

        Args:
            epoch: its number.
            steps: what each step returned: values by name. A name that only some steps have is averaged over these.
            sum_over_ranks: adds up a tensor over all ranks in place, where several processes train.
        """
        values: dict[str, Any] = _means(steps)
        for name, counts in self._counts.items():
            if sum_over_ranks is not None:
                sum_over_ranks(counts)
            count, total = counts.cpu().numpy().astype(float).reshape(2, -1)
            ratio = np.divide(count, total, out=np.full_like(count, np.nan), where=total > 0).tolist()
            values[name] = ratio[0]
            if len(ratio) > 1:
                values[f"{name}_per_class"] = ratio[1:]
        values["seconds/unlabeled_wait"] = self.seconds_waiting
        if self._counts_skipped_steps:
            values["skipped_steps"] = self.skipped_steps
        warnings = self._collapse_warnings(values)
        self.write(epoch, values)
        self._write_lines(values)
        for warning in warnings:
            self._write_line(warning)

    def history(self, name: str) -> list[list[float]]:
        """The epochs' lists of a name that has one value per class; epochs without it are left out."""
        return [epoch for epoch in self.lists.get(LOG_PREFIX + name, []) if isinstance(epoch, list)]

    def _collapse_warnings(self, values: dict[str, Any]) -> list[str]:
        """Add to the epoch's values which classes have collapsed; returns a warning for each that newly has."""
        if "share/unlabeled_per_class" not in values:
            return []
        predicted, labeled = (
            [*self.history(f"share/{of}_per_class"), values[f"share/{of}_per_class"]] for of in ("unlabeled", "labeled")
        )
        now = collapsed(predicted, labeled)
        before = (self.history("share/collapsed_per_class") or [[0.0] * len(now)])[-1]
        values["share/collapsed_per_class"] = [float(one) for one in now]
        new = [index for index, (is_now, was) in enumerate(zip(now, before, strict=True)) if is_now and not was]
        return [collapse_warning(index, predicted, labeled) for index in new]

    def write(self, epoch: int, values: Mapping[str, Any]) -> None:
        """Put values into nnU-Net's logger, one per name and epoch.

        Its logger wants known names, and its picture is as long as the shortest list. A name that is new since the
        checkpoint is filled up with nan, and so is one that this epoch has no value of.
        """
        lists = self.lists
        named = {LOG_PREFIX + name: value for name, value in values.items()}
        for name in [*named, *(name for name in lists if name.startswith(LOG_PREFIX) and name not in named)]:
            known = lists.setdefault(name, [])
            known.extend([float("nan")] * (epoch - len(known)))
            self._logger.log(name, named.get(name, float("nan")), epoch)

    def _write_lines(self, values: Mapping[str, Any]) -> None:
        weights = {name[len("weight/") :]: value for name, value in values.items() if name.startswith("weight/")}
        terms = ", ".join(f"{name} {values[f'loss/{name}']:.4f} (x {weight:.3f})" for name, weight in weights.items())
        self._write_line(f"loss {values['loss/total']:.4f}: {terms}")
        for name in self._counts:
            per_class = ", ".join(f"{share:.3f}" for share in values.get(f"{name}_per_class", []))
            self._write_line(f"{name} {values[name]:.3f}" + (f", per class {per_class}" if per_class else ""))
        self._write_line(f"Waited {self.seconds_waiting:.1f} s for unlabeled batches")
        if self.skipped_steps:
            self._write_line(f"The gradient scaler skipped {self.skipped_steps} steps")


def _means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    # In the order in which the steps first name them. nnU-Net logs "loss" itself.
    names = dict.fromkeys(name for step in steps for name in step if name != "loss")
    return {name: float(np.mean([step[name] for step in steps if name in step])) for name in names}
