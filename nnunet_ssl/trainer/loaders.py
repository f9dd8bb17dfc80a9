"""The three loaders of a training: nnU-Net's two, and that of unlabeled batches."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_ssl.data.labeled_targets import AddTargets, LabeledTarget
from nnunet_ssl.data.loader import UnlabeledDataLoader, UnlabeledDataset, unlabeled_workers
from nnunet_ssl.data.predicted_foreground import PredictedForeground
from nnunet_ssl.data.views import UnlabeledViews, WithWeakView, flat
from nnunet_ssl.processes import derived_seed, killed_workers, seed_this_process
from nnunet_ssl.trainer.batches import Views

SECONDS_TO_END = 25
"""After which workers are ended by force. batchgenerators gives them 10 seconds of its own, twice."""


def unlabeled_loader(
    training: Any,
    dataset: UnlabeledDataset,
    batch_size: int,
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


@dataclass
class Loaders:
    """Loaders by what they make: ``training``, ``validation`` and ``unlabeled`` batches.

    Those without workers need nothing of this class but the seed.
    """

    augmenters: dict[str, Any] = field(default_factory=dict)
    _processes: dict[str, list[BaseProcess]] = field(default_factory=dict)

    @property
    def with_workers(self) -> dict[str, NonDetMultiThreadedAugmenter]:
        """Those that have worker processes."""
        return {name: one for name, one in self.augmenters.items() if isinstance(one, NonDetMultiThreadedAugmenter)}

    def extend_training(self, targets: Mapping[str, LabeledTarget], *, weak: bool) -> None:
        """Let the loader of labeled training batches make more than nnU-Net's; nothing where nothing is wanted.

        Args:
            targets: by name.
            weak: whether it makes the weak view.
        """
        train = self.augmenters["training"]
        if weak:
            loader_of(train).transforms = WithWeakView(flat(loader_of(train).transforms))
        if targets:
            train.transform = AddTargets(targets)
        # nnU-Net has started the workers without.
        if (weak or targets) and isinstance(train, NonDetMultiThreadedAugmenter):
            train._finish()
            next(train)

    def add_unlabeled(self, loader: UnlabeledDataLoader, *, ranks: int, device: torch.device) -> Iterator[Any]:
        """Batches of the unlabeled loader, from worker processes or, if nnU-Net has none, from this process.

        Args:
            loader: makes batches.
            ranks: how many processes train on this machine's cores.
            device: that batches go to.
        """
        workers = unlabeled_workers(get_allowed_n_proc_DA(), (os.cpu_count() or 1) // ranks)
        unlabeled: Any = SingleThreadedAugmenter(loader, None)
        if workers > 0:
            cached, pinned = max(6, workers // 2), device.type == "cuda"
            unlabeled = NonDetMultiThreadedAugmenter(
                loader, None, workers, num_cached=cached, pin_memory=pinned, wait_time=0.002
            )
        self.augmenters["unlabeled"] = unlabeled
        return unlabeled

    def begin(self, seed: int | None, *, rank: int, epoch: int) -> None:
        """Start all workers that do not run yet, seeded where there is a seed, and watch them.

        Args:
            seed: of the training; the workers get others on each rank, and after a checkpoint others than before it.
            rank: of this process.
            epoch: that the training begins with.
        """
        if seed is not None:
            self._seed(seed, rank=rank, epoch=epoch)
        next(self.augmenters["unlabeled"])
        # batchgenerators forgets those that have ended.
        self._processes = {f"{name} batches": list(one._processes) for name, one in self.with_workers.items()}

    def _seed(self, seed: int, *, rank: int, epoch: int) -> None:
        for number, loader in enumerate(self.with_workers.values(), start=1):
            running = loader.initialized
            loader._finish()
            loader.seeds = [derived_seed(seed, rank, epoch, number, worker) for worker in range(loader.num_processes)]
            if running:
                next(loader)
        seed_this_process(derived_seed(seed, rank, epoch, 0))

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Within, a training runs; afterwards all worker processes are ended, whatever happened.

        Raises:
            RuntimeError: there was one, and workers were killed; the text names them.
        """
        try:
            yield
        except RuntimeError as error:
            if killed := killed_workers(self._processes):
                raise RuntimeError(
                    f"Training stops: {'; '.join(killed)}. The system kills processes when memory runs out. "
                    f"Use fewer workers (environment variable nnUNet_n_proc_DA, {get_allowed_n_proc_DA()} "
                    "now) and continue with --c. The last checkpoint is intact."
                ) from error
            raise
        finally:
            self.finish()

    def finish(self) -> None:
        """End all worker processes; by force where they do not end when they are asked to."""
        for name, loader in self.with_workers.items():
            workers = {*self._processes.get(f"{name} batches", ()), *loader._processes}
            # One that was killed while it held a lock would make this wait for ever.
            asking = threading.Thread(target=loader._finish, daemon=True)
            asking.start()
            asking.join(SECONDS_TO_END)
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                    worker.join()
