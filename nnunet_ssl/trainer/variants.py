"""Trainers of other lengths, named as nnU-Net names its own."""

from __future__ import annotations

from typing import TypeVar

from nnunet_ssl.trainer.base import SemiSupervisedTrainer

Trainer = TypeVar("Trainer", bound=SemiSupervisedTrainer)

TRAINING_LENGTHS = (1, 5, 10, 20, 50, 100, 250, 500, 2000, 4000, 8000)


def training_length_variants(trainer: type[Trainer]) -> dict[str, type[Trainer]]:
    """A trainer and its variants of other lengths, by name: ``<Trainer>_1epoch``, ``_5epochs`` to ``_8000epochs``.

    nnU-Net finds a trainer by its name in a module, so a module in trainers/ puts these into its namespace.

    >>> variants = training_length_variants(SemiSupervisedTrainer)
    >>> variants["SemiSupervisedTrainer_5epochs"].training_epochs
    5
    """
    variants = {trainer.__name__: trainer}
    for epochs in TRAINING_LENGTHS:
        name = f"{trainer.__name__}_{epochs}epoch{'s' if epochs > 1 else ''}"
        namespace = {
            "__module__": trainer.__module__,
            "__doc__": f"{trainer.__name__} for {epochs} epochs.",
            "training_epochs": epochs,
        }
        variants[name] = type(name, (trainer,), namespace)
    return variants
