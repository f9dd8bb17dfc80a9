"""The three loaders of a training: nnU-Net's two, and that of unlabeled batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_ssl.data.loader import UnlabeledDataLoader, UnlabeledDataset, unlabeled_workers
from nnunet_ssl.data.predicted_foreground import PredictedForeground
from nnunet_ssl.data.views import UnlabeledViews
from nnunet_ssl.processes import derived_seed, killed_workers, seed_this_process
from nnunet_ssl.trainer.batches import Views


def unlabeled_loader(
    training: Any,
    dataset: UnlabeledDataset,
    batch_size: int,
    *,
    views: Views,
    configuration: ConfigurationManager,
    plans: PlansManager,
    foreground: PredictedForeground | None,
    foreground_share: float,
) -> UnlabeledDataLoader:
    """The loader of unlabeled batches.

    Args:
        training: nnU-Net's augmenter of labeled training batches, whose patch sizes and transforms it shares.
        dataset: the unlabeled cases.
        batch_size: unlabeled patches of this process.
        views: that the method asks for.
        configuration: that is trained.
        plans: of the configuration.
        foreground: see :class:`~nnunet_ssl.data.loader.UnlabeledDataLoader`.
        foreground_share: likewise.
    """
    labeled = loader_of(training)
    made = UnlabeledViews(
        labeled.transforms,
        strong=views.strong,
        augmented=views.augmented,
        normalization_schemes=configuration.normalization_schemes,
        intensity_properties=plans.foreground_intensity_properties_per_channel,
    )
    return UnlabeledDataLoader(
        labeled,
        dataset,
        batch_size,
        views=made,
        cutmix=views.cutmix,
        foreground=foreground,
        foreground_share=foreground_share,
    )


def loader_of(augmenter: Any) -> nnUNetDataLoader:
    """The loader that an augmenter of nnU-Net runs, in its workers or in this process."""
    loader = augmenter.data_loader if isinstance(augmenter, SingleThreadedAugmenter) else augmenter.generator
    assert isinstance(loader, nnUNetDataLoader)
    return loader


def augmented(loader: Any, *, ranks: int, pin_memory: bool) -> Iterator[Any]:
    """Batches of the unlabeled loader, from worker processes or, if nnU-Net has none, from this process.

    Args:
        loader: makes batches.
        ranks: how many processes train on this machine's cores.
        pin_memory: whether batches go to a GPU.
    """
    workers = unlabeled_workers(get_allowed_n_proc_DA(), (os.cpu_count() or 1) // ranks)
    if workers == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        loader, None, workers, num_cached=max(6, workers // 2), pin_memory=pin_memory, wait_time=0.002
    )


def restart(augmenter: Any) -> None:
    """Start the workers again, so that they see what has changed since they were started; nothing without workers."""
    if isinstance(augmenter, NonDetMultiThreadedAugmenter):
        augmenter._finish()
        next(augmenter)


@dataclass
class Loaders:
    """Loaders by what they make: ``training``, ``validation`` and ``unlabeled`` batches.

    Those without workers need nothing of this class but the seed.
    """

    augmenters: Mapping[str, Any] = field(default_factory=dict)
    _processes: dict[str, list[BaseProcess]] = field(default_factory=dict)

    @property
    def with_workers(self) -> dict[str, NonDetMultiThreadedAugmenter]:
        """Those that have worker processes."""
        return {name: one for name, one in self.augmenters.items() if isinstance(one, NonDetMultiThreadedAugmenter)}

    def seed(self, seed: int, *, rank: int, epoch: int) -> None:
        """Seed this process and the workers: unlike on each rank, and after a checkpoint unlike before it."""
        for number, loader in enumerate(self.with_workers.values(), start=1):
            running = loader.initialized
            loader._finish()
            loader.seeds = [derived_seed(seed, rank, epoch, number, worker) for worker in range(loader.num_processes)]
            if running:
                next(loader)
        seed_this_process(derived_seed(seed, rank, epoch, 0))

    def watch(self) -> None:
        """Remember the worker processes that run now: batchgenerators forgets those that have ended."""
        self._processes = {f"{name} batches": list(one._processes) for name, one in self.with_workers.items()}

    def explain(self, epoch: int) -> RuntimeError | None:
        """What to raise if watched workers were killed; None if none was."""
        killed = killed_workers(self._processes)
        if not killed:
            return None
        return RuntimeError(
            f"Training stops in epoch {epoch}: {'; '.join(killed)}. The system does that when memory runs out. Use "
            f"fewer workers (environment variable nnUNet_n_proc_DA, {get_allowed_n_proc_DA()} now) and go on with --c; "
            f"the last checkpoint is untouched."
        )

    def finish(self) -> None:
        """End all worker processes."""
        for loader in self.with_workers.values():
            loader._finish()
