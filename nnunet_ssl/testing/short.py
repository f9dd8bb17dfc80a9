"""Trainers of a few steps, written as a module that nnU-Net finds in a folder of ``nnUNet_extTrainer``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_MODULE = """\
import os

{imports}


class Short:
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = {epochs}, {iterations}, 2
        self.save_every = 1

    def on_epoch_end(self):
        super().on_epoch_end()
        if str(self.current_epoch) == os.environ.get("STOP_AFTER_EPOCHS"):
            raise SystemExit({stopped!r})
"""
_CLASS = """

class {name}_short(Short, {name}):
    pass
"""


def short_trainers(
    trainers: Iterable[type[Any]], *, epochs: int, iterations: int, stopped: int | str = "stopped for the test"
) -> str:
    """The text of a module with a trainer ``NAME_short`` for each trainer; it saves a checkpoint after each epoch.

    Args:
        trainers: nnU-Net's or this package's.
        epochs: of a training.
        iterations: of an epoch.
        stopped: what it exits with after as many epochs as the environment variable STOP_AFTER_EPOCHS says.

    >>> from nnunet_ssl.methods.unimatch import UniMatchTrainer
    >>> short_trainers([UniMatchTrainer], epochs=2, iterations=3).splitlines()[-2]
    'class UniMatchTrainer_short(Short, UniMatchTrainer):'
    """
    trainers = list(trainers)
    imports = "\n".join(f"from {trainer.__module__} import {trainer.__name__}" for trainer in trainers)
    module = _MODULE.format(imports=imports, epochs=epochs, iterations=iterations, stopped=stopped)
    return module + "".join(_CLASS.format(name=trainer.__name__) for trainer in trainers)
