"""What is predicted on unlabeled images: counted for the log, and remembered for where to crop later patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray
from torch import Tensor

from nnunet_ssl.data.predicted_foreground import PredictedForeground, draw_voxels
from nnunet_ssl.evaluation.class_shares import class_counts, mean_share
from nnunet_ssl.trainer.batches import UnlabeledBatch
from nnunet_ssl.trainer.epoch_log import EpochLog


class Predictions:
    """Of one step after the other.

    Args:
        epoch_log: where shares are recorded, and read of all epochs so far.
        labels: nnU-Net's label manager.
        log: writes a line to nnU-Net's log file.

    Attributes:
        foreground: where foreground has been predicted; None where all patches are cropped at random.
    """

    def __init__(self, epoch_log: EpochLog, labels: LabelManager, log: Callable[[str], None]) -> None:
        self.foreground: PredictedForeground | None = None
        self._share = 0.0
        self._log = log
        self._epoch_log = epoch_log
        self._structures = labels.num_segmentation_heads if labels.has_regions else len(labels.foreground_labels)
        # Of regions none: they are counted by their masks.
        self._classes = () if labels.has_regions else tuple(labels.foreground_labels)
        self._batch: UnlabeledBatch | None = None
        self._label: Tensor | None = None

    def follow_foreground(self, keys: Sequence[str], share: float, *, seeded: bool) -> PredictedForeground | None:
        """From now on, remember where foreground is predicted; None if patches are cropped anywhere.

        Args:
            keys: the unlabeled cases.
            share: of the unlabeled patches are centered on foreground, where a class is rare; 0 for none.
            seeded: whether the training has a seed. What a worker has seen of it when it crops a patch must then not
                depend on the time.
        """
        self.foreground, self._share = None, share
        if share > 0 and seeded and get_allowed_n_proc_DA() > 0:
            self._log(
                "With a seed and workers (nnUNet_n_proc_DA), foreground_crops has no effect: all unlabeled patches "
                "are cropped at random."
            )
        elif share > 0:
            self.foreground = PredictedForeground(keys, self._structures)
        self.choose_rare()
        return self.foreground

    def choose_rare(self) -> None:
        """Choose which classes are rare, by the labeled patches of all epochs so far; a change is logged."""
        history = self._epoch_log.history("patches/labeled_per_class")
        if self.foreground is not None and history and self.foreground.choose_rare(mean_share(history).tolist()):
            named = ", ".join(str(number + 1) for number in self.foreground.rare) or "none"
            self._log(
                f"Rare classes or regions (in fewer than a third of the labeled patches): {named}. "
                f"{self._share:.0%} of the unlabeled patches are centered where the network predicts one of them"
            )

    def begin(self, unlabeled: UnlabeledBatch) -> None:
        """Begin a step with its unlabeled batch."""
        self._batch, self._label = unlabeled, None

    def count_labeled(self, label: Tensor, known: Tensor | None, *, cropped_anywhere: float) -> None:
        """Count the labels of the patches that were cropped at random, as unlabeled ones are.

        Args:
            label: classes (B, 1, *spatial), integer, or regions (B, R, *spatial), bool.
            known: (B, 1, *spatial), bool: voxels whose label is known; None for all.
            cropped_anywhere: the share of these patches; nnU-Net centers the last ones of a batch on foreground.
        """
        patches = round(len(label) * cropped_anywhere)
        self._count("labeled", label[:patches], None if known is None else known[:patches, 0])

    def count(self, logits: Tensor) -> None:
        """Count what is predicted, (U, C, *spatial), and keep it for :meth:`draw`."""
        # On a CPU max is many times faster than argmax.
        label = logits.max(1, keepdim=True).indices if self._classes else logits > 0
        # Patches that are centered on foreground say nothing about its share; the loader puts them last.
        aims = self._batch.aims if self._batch is not None else ()
        self._count("unlabeled", label[: sum(aim.structure < 0 for aim in aims)] if aims else label, None)
        if self._batch is not None and self._batch.coordinates is not None:
            # It is kept for the rest of the step: a quarter of the memory.
            self._label = label if label.dtype == torch.bool else label.to(torch.int16)

    def _count(self, of: str, label: Tensor, known: Tensor | None) -> None:
        for name, (count, total) in class_counts(label, known, self._classes).items():
            self._epoch_log.add(f"{name}/{of}", count, total)

    def draw(self) -> Tensor | None:
        """For each patch and class or region a voxel that is predicted as it, or -1: (U, K), int32; None if not wanted.

        The host gets it in the step's one transfer and hands it to :meth:`remember`.
        """
        label, self._label = self._label, None
        if label is None or self.foreground is None or not self.foreground.rare:
            return None
        if label.dtype == torch.bool:
            return draw_voxels(label.flatten(0, 1).flatten(1), 2)[:, 1].view(label.shape[:2])
        return draw_voxels(label.flatten(1), self.foreground.structures + 1)[:, 1:]

    def remember(self, voxels: NDArray[np.int32] | None, patch_size: Sequence[int]) -> None:
        """Keep what :meth:`draw` drew, for later patches."""
        if voxels is None:
            return
        batch = self._batch
        assert self.foreground is not None and batch is not None and batch.coordinates is not None
        for key, aim, drawn, coordinates in zip(batch.keys, batch.aims, voxels, batch.coordinates, strict=True):
            self.foreground.update(key, aim, drawn, patch_size, coordinates)
