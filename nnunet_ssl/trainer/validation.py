"""A second validation next to nnU-Net's own: by the other of student and teacher."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_ssl.networks.training_network import TrainingNetwork, predicted_by_the_other


@contextmanager
def by_the_other(network: TrainingNetwork, folder: Path, *, first: bool) -> Iterator[tuple[str, str]]:
    """Within, of student and teacher the one predicts that otherwise does not.

    Args:
        network: with a teacher.
        folder: the training's output folder, which gets the results as ``validation_student`` or
            ``validation_teacher``.
        first: whether this process is the one that moves them there.

    Yields:
        its name, and the output folder for nnU-Net's validation, which always writes into a folder ``validation``.
    """
    with predicted_by_the_other(network) as other:
        results = folder / f"validation_{other}"
        aside = folder / f"{results.name}_partial"
        yield other, str(aside)
    if first:
        shutil.rmtree(results, ignore_errors=True)
        (aside / "validation").rename(results)
        aside.rmdir()
