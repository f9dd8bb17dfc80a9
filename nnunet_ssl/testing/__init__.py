"""Checks that hold for every method: for the tests of a method in this package or in another one.

:func:`check_method` is all that a method's tests need of this module; it takes a minute on a CPU, needs no data set and
runs no command of nnU-Net. The checks that it makes are also there one by one, for trainers that were made elsewhere.

>>> from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
>>> check_method(CrossMatchTrainer, confidence_threshold=0.4)  # doctest: +SKIP
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nnunet_ssl.testing.checks import (
    check_autocast,
    check_compiled,
    check_gradients,
    check_memory,
    check_resume,
    check_split,
    check_steps,
    check_stock_network,
    gradients_of,
    stages_of,
)
from nnunet_ssl.testing.tiny import CONFIGURATION, LABELS, Make, initialized, make_batches, tiny_plans, tiny_trainers
from nnunet_ssl.trainer.base import SemiSupervisedTrainer

__all__ = [
    "CONFIGURATION",
    "LABELS",
    "Make",
    "NotConforming",
    "check_autocast",
    "check_compiled",
    "check_gradients",
    "check_memory",
    "check_method",
    "check_resume",
    "check_split",
    "check_steps",
    "check_stock_network",
    "gradients_of",
    "initialized",
    "make_batches",
    "stages_of",
    "tiny_plans",
    "tiny_trainers",
]


class NotConforming(AssertionError):
    """A method fails checks; the text names every one of them."""


def check_method(trainer_class: type[SemiSupervisedTrainer], **settings: Any) -> None:
    """Make all checks of this module, in 2D and in 3D.

    Args:
        trainer_class: the method.
        settings: of the plans' ``semi_supervised``, instead of the defaults. Choose them such that every term counts
            on images of noise and a network without training: a threshold of 0.4 instead of 0.95.

    Raises:
        NotConforming: checks have failed; the text names them.
    """
    failed: dict[str, list[str]] = {}
    first: Exception | None = None
    for name, check in _checks(trainer_class, settings):
        try:
            check()
        except Exception as error:
            failed.setdefault(f"{type(error).__name__}: {error}", []).append(name)
            first = first or error
    if failed:
        listed = "\n".join(f"- {'; '.join(names)}: {text}" for text, names in failed.items())
        count = sum(map(len, failed.values()))
        raise NotConforming(f"{trainer_class.__name__} fails {count} checks:\n{listed}") from first


def _checks(trainer_class: type[SemiSupervisedTrainer], settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    def of_trainer(dim: int, labels: str, check: Callable[[SemiSupervisedTrainer], None]) -> Callable[[], None]:
        def run() -> None:
            with tiny_trainers(trainer_class, dim=dim, labels=labels, **settings) as make:
                check(make())

        return run

    def of_trainers(dim: int, check: Callable[[Make, Path], None]) -> Callable[[], None]:
        def run() -> None:
            with (
                tiny_trainers(trainer_class, dim=dim, **settings) as make,
                tempfile.TemporaryDirectory() as folder,
            ):
                check(make, Path(folder))

        return run

    for dim in (2, 3):
        yield f"{dim}D, gradients", of_trainer(dim, "classes", check_gradients)
        yield f"{dim}D, a step of every stage", of_trainer(dim, "classes", check_steps)
        yield f"{dim}D, the checkpoint", of_trainers(dim, check_resume)
        yield f"{dim}D, nnU-Net's own network", of_trainers(dim, check_stock_network)
        for labels in LABELS:
            yield f"{dim}D, {labels}, split as stacked", of_trainer(dim, labels, check_split)
            yield f"{dim}D, {labels}, memory estimate", of_trainer(dim, labels, check_memory)
        yield f"{dim}D, bfloat16", of_trainer(dim, "classes", check_autocast)
        yield f"{dim}D, torch.compile", of_trainer(dim, "classes", check_compiled)
