"""The base of all methods: nnU-Net's trainer with an unlabeled stream.

nnU-Net keeps planning, preprocessing, augmentation, the epoch loop, validation and inference. This file adds what a
step needs: a second loader, passes of many streams, named loss terms with a schedule, and their log.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

import nnunet_ssl
from nnunet_ssl.data.cases import (
    UnlabeledCase,
    collect_unlabeled_cases,
    folder_name,
    no_unlabeled_cases_message,
    preprocessed_cases,
)
from nnunet_ssl.data.cutmix import CutMix
from nnunet_ssl.data.labeled_targets import AddTargets, LabeledTarget
from nnunet_ssl.data.leak_guard import check_leaks
from nnunet_ssl.data.loader import UnlabeledDataLoader, UnlabeledDataset, unlabeled_workers
from nnunet_ssl.data.predicted_foreground import RARE, Aim, PredictedForeground, draw_voxels
from nnunet_ssl.data.preprocessing import preprocess_unlabeled
from nnunet_ssl.data.previous_stage import check_labeled_cases, previous_stage_folder, segment_by_previous_stage
from nnunet_ssl.data.splits import SPLITS_FILE, check_fold, train_all
from nnunet_ssl.data.views import UnlabeledViews
from nnunet_ssl.distributed import alone, average_gradients, device_of_this_process, on_all_ranks, patient_group
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.curves import save_training_curves
from nnunet_ssl.evaluation.shares import collapse_warning, collapsed, mean_share
from nnunet_ssl.memory import log_memory
from nnunet_ssl.networks.checkpoints import NotPlainError, differences, read_checkpoint, write_checkpoint
from nnunet_ssl.networks.outputs import Outputs, SplitOutputs, StackedOutputs
from nnunet_ssl.networks.training_network import (
    SUPPORTED,
    Stream,
    TrainingNetwork,
    UNet,
    check_architecture,
    check_supported,
    draw_dropout_masks,
    unsupported,
)
from nnunet_ssl.out_of_memory import allocate_momentum, free_memory, random_state, unless_out_of_memory
from nnunet_ssl.processes import Sigterm, derived_seed, handled_sigterm, killed_workers, seed_this_process
from nnunet_ssl.settings import PLANS_KEY, SemiSupervisedSettings

LOG_PREFIX = "ssl/"
CHECKPOINT_KEY = "ssl"

_START_FROM_WEIGHTS = (
    "To start from the weights of this checkpoint, use -pretrained_weights and not --c, which goes on with trainings "
    "of semi-supervised trainers only."
)

# With mixed precision a step may overflow; the gradient scaler then skips it and halves its scale. Its scale starts
# at 2^16, so a network that is sound needs no more than this many steps in a row.
_OVERFLOWS_IN_A_ROW = 20


class LabeledBatch(NamedTuple):
    """A batch of nnU-Net's own loader, on the training device.

    Attributes:
        image: (B, C, *patch size).
        target: (B, 1, *patch size), or with deep supervision a list, full resolution first; regions as in nnU-Net.
        keys: the B cases.
        extra: by name, what the method's :meth:`SemiSupervisedTrainer.labeled_targets` make: tensors or tuples of them.
    """

    image: Tensor
    target: Any
    keys: list[str]
    extra: Mapping[str, Any] = MappingProxyType({})

    @property
    def full_resolution(self) -> Tensor:
        """The target with deep supervision or without."""
        return self.target[0] if isinstance(self.target, list) else self.target


class UnlabeledBatch(NamedTuple):
    """A batch of :class:`~nnunet_ssl.data.loader.UnlabeledDataLoader`, on the training device.

    Attributes:
        weak: (U, C, *patch size).
        strong: strong views of the same spatial samples, each like ``weak``.
        boxes: per strong view (U, dim, 2), a CutMix box for each sample, empty where it has none.
        partner: (U,), the index of the sample to fill the box from.
        keys: the U cases.
    """

    weak: Tensor
    strong: list[Tensor]
    boxes: list[Tensor]
    partner: Tensor
    keys: list[str]


@dataclass(frozen=True)
class Views:
    """Which views of an unlabeled patch a method asks for.

    Attributes:
        strong: number of strong views beside the weak one.
        cutmix: how the boxes of strong views are drawn.
    """

    strong: int = 0
    cutmix: CutMix | None = None


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with unlabeled data. A method derives from it and overrides the hooks below.

    Hooks: ``settings_class``, :meth:`unlabeled_views`, :meth:`streams`, :meth:`images`, :meth:`loss_terms`,
    :meth:`loss_weights`; and where needed :meth:`build_training_network`, :meth:`labeled_targets` and
    :meth:`after_optimizer_step`.

    The constructor's arguments are nnU-Net's own, which reads them back by name from a checkpoint. Settings come from
    the plans (:mod:`nnunet_ssl.settings`).

    Raises:
        UserError: the plans hold a setting that is unknown or out of range, or a path where a name should be.
    """

    settings_class: ClassVar[type[SemiSupervisedSettings]] = SemiSupervisedSettings
    training_epochs: ClassVar[int | None] = None

    # nnU-Net's own, which are not annotated there.
    is_ddp: bool
    device: torch.device
    grad_scaler: Any
    network: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature
    ) -> None:
        for key in ("dataset_name", "plans_name"):
            folder_name(plans[key], key)
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:
            # nnU-Net takes the GPU whose number is the rank, which on a second machine is none.
            self.device = device_of_this_process(device)
            self.grad_scaler = self.grad_scaler if self.device.type == "cuda" else None
        self.settings = self.settings_class.from_plans(self.configuration_manager.configuration)
        if self.training_epochs is not None:
            self.num_epochs = self.training_epochs
        # nnU-Net's inference calls build_network_architecture on the class and gets the stock network; training calls
        # it on the instance.
        self.build_network_architecture = self._build_for_training
        self._labeled_targets = self.labeled_targets()
        self.dataloader_unlabeled: NonDetMultiThreadedAugmenter | SingleThreadedAugmenter | None = None
        self.memory_mode = self.settings.memory_mode
        if self.memory_mode == "auto":
            self.memory_mode = "split" if self.device.type == "cpu" else "stacked"
        self._unlabeled_dataset: UnlabeledDataset | None = None
        self._foreground: PredictedForeground | None = None
        self._aims: list[Aim] = []
        self._coordinates: Tensor | None = None
        self._predicted: Tensor | None = None
        self._steps_in_epoch = 0
        self._first_step = True
        self._overflows = 0
        self._skipped_steps = 0
        self._recorded: dict[str, Tensor] = {}
        self._seconds_waiting = 0.0
        self._sigterm = Sigterm()
        self._workers: dict[str, list[BaseProcess]] = {}

    # ---- hooks of a method ------------------------------------------------------------------------------------------

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """Wrap nnU-Net's network with what training needs."""
        return TrainingNetwork(network)

    def unlabeled_views(self) -> Views:
        """Which views the unlabeled loader yields: by default the weak one alone."""
        return Views()

    def labeled_targets(self) -> Mapping[str, LabeledTarget]:
        """What the labeled loader's workers compute beside nnU-Net's targets; nothing by default.

        They are made of a batch after nnU-Net's own transforms, and ``LabeledBatch.extra`` then has them under their
        names. Called by the constructor.
        """
        return {}

    def streams(self) -> dict[str, Stream]:
        """The passes of a step, by name, in the order in which :meth:`loss_terms` asks for them."""
        raise NotImplementedError

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Tensor]:
        """The images that the streams name; the labeled one is ``x``."""
        raise NotImplementedError

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch
    ) -> Iterator[dict[str, Tensor]]:
        """Yield named, unweighted parts of the loss; parts of one name add up to its term.

        A part may use the outputs that were asked for since the last yield, and detached values of earlier ones: with
        little memory, a stream's graph is gone once its part was yielded.
        """
        raise NotImplementedError

    def loss_weights(self, progress: float) -> dict[str, float]:
        """The weight of every term, where ``progress`` in [0, 1] is the share of the planned training that is done."""
        raise NotImplementedError

    def after_optimizer_step(self) -> None:
        """Called after each step of the optimizer, say to move a teacher; not after one that the gradient scaler
        skipped. Nothing by default.
        """

    # ---- for methods to call ----------------------------------------------------------------------------------------

    @property
    def num_structures(self) -> int:
        """Number of foreground classes, or of regions."""
        return self.label_manager.num_segmentation_heads - (0 if self.label_manager.has_regions else 1)

    def supervised_loss(self, output: Any, target: Any) -> Tensor:
        """nnU-Net's own loss for the dataset: Dice and cross-entropy, or Dice and BCE for regions, ignore label and
        deep supervision included. **[choice]** The papers use Dice (and cross-entropy) on the full resolution alone.
        """
        return self.loss(output, target)

    def known_voxels(self, labeled: LabeledBatch) -> Tensor | None:
        """Where the label is not the ignore label: (B, 1, *patch size), bool; None for a dataset without one."""
        labels, target = self.label_manager, labeled.full_resolution
        if not labels.has_ignore_label:
            return None
        return target[:, -1:] == 0 if labels.has_regions else target != labels.ignore_label

    def record(self, name: str, count: Tensor, total: Tensor) -> None:
        """Log the ratio of two counts, summed over the epoch, without a transfer from the device.

        Args:
            name: logged as ``ssl/<name>``, and the entries after the first as the list ``ssl/<name>_per_class``.
            count: scalar or (K + 1,).
            total: like ``count``.
        """
        counts = torch.stack((count, total)).detach()
        # Half precision ends at 65504, and MPS has no double precision.
        counts = counts.float() if counts.is_floating_point() else counts.long()
        self._recorded[name] = self._recorded[name] + counts if name in self._recorded else counts

    def record_prediction(self, logits: Tensor) -> None:
        """Count what is predicted on unlabeled images, for the log and the warning of a collapse, and where later
        patches are cut. Call it once a step.

        Args:
            logits: (U, C, *spatial), of the stream whose predictions are pseudo-labels.
        """
        # On a CPU max is many times faster than argmax.
        label = logits > 0 if self.label_manager.has_regions else logits.max(1).indices
        # Patches that are centered on foreground say nothing about its share; the loader puts them last.
        anywhere = sum(aim.structure < 0 for aim in self._aims) if self._aims else len(label)
        self._record_share("unlabeled", label[:anywhere])
        if self._coordinates is not None:
            # It is kept for the rest of the step: a quarter of the memory.
            self._predicted = label if label.dtype == torch.bool else label.to(torch.int16)

    def _record_labeled_share(self, labeled: LabeledBatch) -> None:
        labels, target, known = self.label_manager, labeled.full_resolution, self.known_voxels(labeled)
        label = target[:, : labels.num_segmentation_heads] > 0 if labels.has_regions else target[:, 0]
        # nnU-Net centers the last patches of a batch on foreground; unlabeled ones are cut anywhere.
        anywhere = 1.0 if self.probabilistic_oversampling else 1 - self.oversample_foreground_percent
        patches = round(len(label) * anywhere)
        self._record_share("labeled", label[:patches], None if known is None else known[:patches, 0])

    def _record_share(self, of: str, label: Tensor, known: Tensor | None = None) -> None:
        """Of classes (B, *spatial), of regions (B, R, *spatial) bool; ``known`` is (B, *spatial) bool."""
        regions = self.label_manager.has_regions
        if known is None:
            known = torch.ones_like(label[:, 0] if regions else label, dtype=torch.bool)
        if regions:
            voxels = [(member & known).flatten(1).sum(1) for member in (label.any(1), *label.unbind(1))]
        else:
            # Class by class: of many classes, all at once would take many times the memory of an image.
            voxels = [((label == value) & known).flatten(1).sum(1) for value in self.label_manager.foreground_labels]
            voxels = [torch.stack(voxels).sum(0), *voxels]
        in_patches = torch.stack(voxels)  # (K + 1, B)
        self.record(f"share/{of}", in_patches.sum(1), known.sum().expand(len(in_patches)))
        self.record(f"patches/{of}", (in_patches > 0).sum(1), in_patches.new_full((len(in_patches),), len(known)))

    # ---- network ----------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """As nnU-Net; of several processes, each with its share of the batch and with the device it was given."""
        if self.settings.seed is not None:
            seed_this_process(derived_seed(self.settings.seed))
        distributed, self.is_ddp = self.is_ddp, False
        try:
            super().initialize()
        finally:
            self.is_ddp = distributed
        if not distributed:
            return
        self._patient_group = patient_group()
        self._set_batch_size_and_oversample()
        self.loss = self._build_loss()
        network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network) if self.device.type == "cuda" else self.network
        # Buffers are the same on all ranks by what they are made of. Broadcast in every forward, they would make ranks
        # wait for each other that validate unlike numbers of patches.
        devices = [self.device] if self.device.type == "cuda" else None
        self.network = DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)

    def _build_for_training(
        self,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        check_architecture(configuration_manager)
        stock_network = getattr(type(self), "build_network_architecture")  # noqa: B009 - shadowed on the instance
        if "plans_manager" not in inspect.signature(stock_network).parameters:
            raise NotImplementedError(
                f"{type(self).__name__}.build_network_architecture has nnU-Net's old signature. Change it to "
                f"(plans_manager, configuration_manager, num_input_channels, num_output_channels, "
                f"enable_deep_supervision)."
            )
        try:
            network = stock_network(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            )
        except TypeError as error:
            # nnU-Net builds what the plans name with deep supervision, which others than its U-Nets do not know.
            named = configuration_manager.network_arch_class_name.rsplit(".", 1)[-1]
            if named in SUPPORTED:
                raise
            raise unsupported(named) from error
        training_network = self.build_training_network(check_supported(network))
        training_network.activation_checkpointing = self.settings.activation_checkpointing
        return training_network

    @property
    def training_network(self) -> TrainingNetwork:
        """The network without the wrappers of DDP and ``torch.compile``."""
        network = self._without_ddp._orig_mod if self._is_compiled else self._without_ddp
        assert isinstance(network, TrainingNetwork)
        return network

    @property
    def _without_ddp(self) -> nn.Module:
        return self.network.module if self.is_ddp else self.network

    @property
    def _is_compiled(self) -> bool:
        return isinstance(self._without_ddp, OptimizedModule)

    # ---- unlabeled data ---------------------------------------------------------------------------------------------

    @property
    def unlabeled_batch_size(self) -> int:
        """U, the unlabeled patches of a step: the plan's batch size, at least 2 since CutMix needs a partner.

        Several processes share them equally, each with at least 2.
        """
        return self.settings.unlabeled_batch_size or max(2, self.configuration_manager.batch_size)

    @property
    def _unlabeled_share(self) -> int:
        world_size = dist.get_world_size() if self.is_ddp else 1
        return max(2, -(-self.unlabeled_batch_size // world_size))

    def on_train_start(self) -> None:
        """Check the fold, preprocess and check the unlabeled cases, then start as nnU-Net does.

        Raises:
            UserError: the fold cannot be trained, or there is no unlabeled case, or one that is a validation case.
        """
        # Of several processes, none has let nnU-Net write a split file yet: that comes after the network's wrapping.
        if self.local_rank == 0:
            self._check_fold()
        if not self.was_initialized:
            self.initialize()
        self.print_to_log_file(f"{type(self).__name__} of nnunet_ssl {nnunet_ssl.__version__}, {self.settings}")
        if self.is_ddp:
            # All processes start with PyTorch's default seed, and would draw the same dropout and noise.
            torch.manual_seed(torch.initial_seed() + dist.get_rank())
        start_split = log_memory(self)
        if self.memory_mode == "stacked" and not on_all_ranks(not start_split, self.device):
            self.memory_mode = "split"
        self.print_to_log_file(f"Memory mode: {self.memory_mode}")
        cases = self._prepare_unlabeled_cases()
        previous_stage = self._segment_by_previous_stage(cases) if self.is_cascaded else None
        self._unlabeled_dataset = UnlabeledDataset(cases, previous_stage)
        super().on_train_start()
        # From here on there is something to save first.
        self._sigterm.held = True

    def _check_fold(self) -> None:
        plans = self.plans_manager
        labeled = Path(self.preprocessed_dataset_folder)
        notes = check_fold(
            Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE,
            self.fold,
            labeled,
            preprocessed_cases(labeled),
            train_all=train_all(plans.dataset_name, self.configuration_name, plans.plans_name, type(self).__name__),
        )
        for note in notes:
            self.print_to_log_file(f"WARNING: {note}")

    def do_split(self) -> tuple[list[str], list[str]]:
        """As nnU-Net; a fold without validation cases has its training cases in their place, as fold all has."""
        train, val = super().do_split()
        return train, val if len(val) else train

    def _prepare_unlabeled_cases(self) -> list[UnlabeledCase]:
        preprocessed = Path(self.preprocessed_dataset_folder_base)
        data_identifier = self.configuration_manager.data_identifier
        if self.local_rank == 0:
            self._preprocess_unlabeled(self.configuration_name)
            cases = collect_unlabeled_cases(preprocessed, data_identifier, self.fold)
            if not cases:
                raw = self._raw_dataset_folder or Path("nnUNet_raw")
                raise UserError(no_unlabeled_cases_message(raw, preprocessed, self.fold))
            train, val = self.do_split()
            check_leaks(
                unlabeled=cases,
                labeled_folder=Path(self.preprocessed_dataset_folder),
                train=train,
                val=val,
                allow_transductive=self.settings.allow_transductive,
                log=self.print_to_log_file,
            )
            self.print_to_log_file(f"{len(cases)} unlabeled cases, {len(train)} labeled cases")
        self._wait_for_all_ranks()
        # A file is read for every case: not twice by the same process.
        return cases if self.local_rank == 0 else collect_unlabeled_cases(preprocessed, data_identifier, self.fold)

    def _segment_by_previous_stage(self, cases: list[UnlabeledCase]) -> Path:
        """In a cascade: what the previous stage makes of the unlabeled cases, predicted where it is missing.

        Raises:
            UserError: the previous stage is not trained, or has not validated all labeled cases.
        """
        labeled = Path(self.folder_with_segs_from_previous_stage)
        results = labeled.parents[1]
        previous = folder_name(self.configuration_manager.previous_stage_name, "previous_stage")
        to_do = (
            f"Train all folds of the previous stage: nnUNetv2_train {self.plans_manager.dataset_name} {previous} FOLD "
            f"-tr {type(self).__name__}"
        )
        checkpoint_file = results / f"fold_{self.fold}" / "checkpoint_final.pth"
        if not checkpoint_file.is_file():
            raise UserError(f"{self.configuration_name} needs {checkpoint_file}, which does not exist. {to_do}")
        train, val = self.do_split()
        check_labeled_cases(labeled, [*train, *val], to_do=to_do)
        manager = self.plans_manager.get_configuration(previous)
        build = getattr(type(self), "build_network_architecture")  # noqa: B009 - shadowed on the instance
        check_architecture(manager)
        network = build(
            self.plans_manager,
            manager,
            determine_num_input_channels(self.plans_manager, manager, self.dataset_json),
            self.label_manager.num_segmentation_heads,
            enable_deep_supervision=False,
        )
        try:
            checkpoint = read_checkpoint(checkpoint_file)
        except UserError as error:
            raise UserError(f"{to_do} {error}") from None
        unlike = differences(checkpoint["network_weights"], network.state_dict())
        if unlike:
            raise UserError(f"{to_do} {checkpoint_file} is of another network: {'; '.join(unlike)}.")
        network.load_state_dict(checkpoint["network_weights"])

        # After all that may be refused: it can take hours.
        if self.local_rank == 0:
            self._preprocess_unlabeled(previous)
        self._wait_for_all_ranks()
        images = collect_unlabeled_cases(
            Path(self.preprocessed_dataset_folder_base), manager.data_identifier, self.fold
        )
        folder = previous_stage_folder(results, self.configuration_name, self.fold)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if self.is_ddp else (0, 1)
        segment_by_previous_stage(
            cases[rank::world_size],
            images,
            folder=folder,
            checkpoint=checkpoint_file,
            network=network.to(self.device).eval(),
            mirroring_axes=checkpoint["inference_allowed_mirroring_axes"],
            plans_manager=self.plans_manager,
            configuration=previous,
            dataset_json=self.dataset_json,
            log=self.print_to_log_file,
        )
        self._wait_for_all_ranks()
        return folder

    @property
    def _raw_dataset_folder(self) -> Path | None:
        # A machine that only trains may have the preprocessed data alone.
        return Path(str(nnUNet_raw)) / self.plans_manager.dataset_name if nnUNet_raw.is_set() else None

    def _preprocess_unlabeled(self, configuration: str) -> None:
        report = preprocess_unlabeled(
            raw_dataset_folder=self._raw_dataset_folder,
            preprocessed_dataset_folder=Path(self.preprocessed_dataset_folder_base),
            plans_manager=self.plans_manager,
            configuration=configuration,
            dataset_json=self.dataset_json,
            num_processes=min(default_num_processes, os.cpu_count() or 1),
            log=self.print_to_log_file,
        )
        if report.done or report.removed or report.failed or report.warnings:
            self.print_to_log_file(report.table(), add_timestamp=False)

    def _wait_for_all_ranks(self) -> None:
        if self.is_ddp:
            dist.barrier(group=self._patient_group)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's two loaders; the unlabeled loader is started beside them."""
        train, val = super().get_dataloaders()
        self.dataloader_train, self.dataloader_val = train, val
        if self._labeled_targets:
            # nnU-Net's loaders can take this, but nnU-Net has started their workers without.
            train.transform = AddTargets(self._labeled_targets)
            if isinstance(train, NonDetMultiThreadedAugmenter):
                train._finish()
                next(train)
        labeled = train.data_loader if isinstance(train, SingleThreadedAugmenter) else train.generator
        assert isinstance(labeled, nnUNetDataLoader) and self._unlabeled_dataset is not None
        views = self.unlabeled_views()
        loader = UnlabeledDataLoader(
            labeled,
            self._unlabeled_dataset,
            self._unlabeled_share,
            views=UnlabeledViews(
                labeled.transforms,
                strong=views.strong,
                normalization_schemes=self.configuration_manager.normalization_schemes,
                intensity_properties=self.plans_manager.foreground_intensity_properties_per_channel,
            ),
            cutmix=views.cutmix,
            foreground=self._predicted_foreground(),
            foreground_share=self.settings.foreground_crops,
        )
        ranks = dist.get_world_size() if self.is_ddp else 1
        workers = unlabeled_workers(get_allowed_n_proc_DA(), (os.cpu_count() or 1) // ranks)
        if workers == 0:
            self.dataloader_unlabeled = SingleThreadedAugmenter(loader, None)
        else:
            self.dataloader_unlabeled = NonDetMultiThreadedAugmenter(
                loader,
                None,
                workers,
                num_cached=max(6, workers // 2),
                pin_memory=self.device.type == "cuda",
                wait_time=0.002,
            )
        if self.settings.seed is not None:
            self._seed(self.settings.seed)
        next(self.dataloader_unlabeled)
        self._workers = {f"{name} batches": list(one._processes) for name, one in self._loaders_with_workers.items()}
        return train, val

    def _predicted_foreground(self) -> PredictedForeground | None:
        self._foreground = None
        if self.settings.foreground_crops == 0:
            return None
        if self.settings.seed is not None and get_allowed_n_proc_DA() > 0:
            # What a worker has seen of the training when it cuts a patch depends on the time.
            self.print_to_log_file(
                "With a seed and workers (nnUNet_n_proc_DA), unlabeled patches are cut anywhere, also where a class is "
                "rare: foreground_crops has no effect."
            )
            return None
        assert self._unlabeled_dataset is not None
        self._foreground = PredictedForeground(self._unlabeled_dataset.identifiers, self.num_structures)
        self._update_rare()
        return self._foreground

    def _update_rare(self) -> None:
        """Which classes fewer labeled patches hold than nnU-Net centers on foreground, by all epochs so far."""
        history = self.logger.local_logger.my_fantastic_logging.get(f"{LOG_PREFIX}patches/labeled_per_class", [])
        epochs = [epoch for epoch in history if isinstance(epoch, list)]
        if self._foreground is None or not epochs:
            return
        before = self._foreground.rare
        self._foreground.rare = [number for number, share in enumerate(mean_share(epochs)) if share < RARE]
        if self._foreground.rare != before:
            named = ", ".join(str(number + 1) for number in self._foreground.rare) or "none"
            self.print_to_log_file(
                f"Classes or regions that fewer than a third of the labeled patches hold: {named}. Of the unlabeled "
                f"patches, {self.settings.foreground_crops:.0%} are centered where the network predicts such a class"
            )

    def _drawn_foreground(self) -> Tensor | None:
        """Where this step's patches are predicted as foreground: (U, K) of :func:`draw_voxels`, if it is wanted."""
        label, self._predicted = self._predicted, None
        if label is None or self._foreground is None or not self._foreground.rare:
            return None
        if label.dtype == torch.bool:
            return draw_voxels(label.flatten(0, 1).flatten(1), 2)[:, 1].view(label.shape[:2])
        return draw_voxels(label.flatten(1), self.num_structures + 1)[:, 1:]

    def _remember_foreground(self, keys: list[str], voxels: NDArray[np.int32]) -> None:
        """Keep what :meth:`_drawn_foreground` drew, for later patches."""
        assert self._foreground is not None and self._coordinates is not None
        patch_size = self.configuration_manager.patch_size
        for key, aim, drawn, coordinates in zip(keys, self._aims, voxels, self._coordinates, strict=True):
            self._foreground.update(key, aim, drawn, patch_size, coordinates)

    @property
    def _loaders_with_workers(self) -> dict[str, NonDetMultiThreadedAugmenter]:
        loaders = {"training": self.dataloader_train, "validation": self.dataloader_val}
        loaders["unlabeled"] = self.dataloader_unlabeled
        return {name: one for name, one in loaders.items() if isinstance(one, NonDetMultiThreadedAugmenter)}

    def _seed(self, seed: int) -> None:
        """Seed this process and the loaders' workers: unlike on each rank, and after a checkpoint unlike before it."""
        rank = dist.get_rank() if self.is_ddp else 0
        for number, loader in enumerate(self._loaders_with_workers.values(), start=1):
            running = loader.initialized
            loader._finish()
            workers = range(loader.num_processes)
            loader.seeds = [derived_seed(seed, rank, self.current_epoch, number, worker) for worker in workers]
            if running:
                next(loader)
        seed_this_process(derived_seed(seed, rank, self.current_epoch, 0))

    def run_training(self) -> None:
        """Train as nnU-Net does, and stop all worker processes whatever happens: it stops its own two at a good end.

        Raises:
            SystemExit: SIGTERM came; with code 143, after a checkpoint from which ``--c`` goes on.
            RuntimeError: a worker was killed, a term is not finite, or a checkpoint could not be written.
        """
        with handled_sigterm() as self._sigterm:
            try:
                super().run_training()
            except RuntimeError as error:
                killed = killed_workers(self._workers)
                if self._sigterm.came and "workers" in str(error):
                    # The signal went to the workers too, and they ended first.
                    self._stop_at_sigterm()
                if not killed:
                    raise
                raise RuntimeError(
                    f"Training stops in epoch {self.current_epoch}: {'; '.join(killed)}. The system does that when "
                    f"memory runs out. Use fewer workers (environment variable nnUNet_n_proc_DA, "
                    f"{get_allowed_n_proc_DA()} now) and go on with --c; the last checkpoint is untouched."
                ) from error
            finally:
                for loader in self._loaders_with_workers.values():
                    loader._finish()

    def _stop_at_sigterm(self) -> None:
        file = Path(self.output_folder) / "checkpoint_latest.pth"
        self._write_checkpoint(str(file), next_epoch=self.current_epoch)
        self.print_to_log_file(
            f"SIGTERM in epoch {self.current_epoch}, after {self._steps_in_epoch} steps of it: stopped, weights are in "
            f"{file}. --c goes on from these weights at the start of the epoch."
        )
        raise SystemExit(128 + signal.SIGTERM)

    def _next_unlabeled(self) -> UnlabeledBatch:
        assert self.dataloader_unlabeled is not None
        start = perf_counter()
        batch = next(self.dataloader_unlabeled)
        self._seconds_waiting += perf_counter() - start
        # batchgenerators makes plain tuples of them when it pins memory.
        self._aims, self._coordinates = [Aim(*aim) for aim in batch.get("aims", [])], batch.get("coordinates")
        return UnlabeledBatch(
            weak=self._to_device(batch["weak"]),
            strong=[self._to_device(view) for view in batch["strong"]],
            boxes=[self._to_device(boxes) for boxes in batch["boxes"]],
            partner=self._to_device(batch["partner"]),
            keys=list(batch["keys"]),
        )

    def _to_device(self, tensors: Any) -> Any:
        """A tensor, or a list or tuple of tensors."""
        if isinstance(tensors, (list, tuple)):
            return type(tensors)(self._to_device(tensor) for tensor in tensors)
        return tensors.to(self.device, non_blocking=True)

    # ---- the step ---------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the planned training that is done, in [0, 1]."""
        return (self.current_epoch + self._steps_in_epoch / self.num_iterations_per_epoch) / self.num_epochs

    def train_step(self, batch: dict) -> dict:
        """One step on a labeled batch and an unlabeled one.

        Returns:
            ``loss``, the supervised term, which nnU-Net draws beside the validation loss, and all terms by name.

        Raises:
            RuntimeError: a term is not finite; the text names it and the cases of the batch.
        """
        labeled = self._labeled_batch(batch)
        unlabeled = self._next_unlabeled()

        weights = self.loss_weights(self.progress)
        terms = self._gradients_or_split(labeled, unlabeled, weights)
        self._record_labeled_share(labeled)
        scaler = self.grad_scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if scaler is not None:
            # It leaves out a step whose gradients are not finite, so there is nothing to wait for before it.
            self._step_of_optimizer()
            scaler.update()
        values, gradient, stop, voxels = self._read_step(terms, norm)
        self._check_finite(values, labeled, unlabeled)
        if scaler is None:
            # Terms may be finite where their gradient is not, and no scaler would skip the step.
            self._check_finite({"the gradient": gradient}, labeled, unlabeled)
            self._step_of_optimizer()
        if voxels is not None:
            self._remember_foreground(unlabeled.keys, voxels)
        self._steps_in_epoch += 1
        self._first_step = False
        if stop:
            self._stop_at_sigterm()
        return {
            "loss": values["supervised"],
            "loss/total": sum(weights[name] * value for name, value in values.items()),
            **{f"loss/{name}": value for name, value in values.items()},
            **{f"weight/{name}": weight for name, weight in weights.items()},
        }

    def _step_of_optimizer(self) -> None:
        """Step with the gradient scaler, where there is one, and tell the method of a step that was not left out."""
        if self.grad_scaler is None:
            self.optimizer.step()
            self.after_optimizer_step()
            return
        # The scaler does not say whether it stepped, and reading its scale would wait for the GPU once more.
        steps: list[bool] = []
        hook = self.optimizer.register_step_post_hook(lambda *_: steps.append(True))
        self.grad_scaler.step(self.optimizer)
        hook.remove()
        if steps:
            self.after_optimizer_step()
        else:
            self._skipped_steps += 1

    def _read_step(
        self, terms: Mapping[str, Tensor], norm: Tensor
    ) -> tuple[dict[str, float], float, bool, NDArray[np.int32] | None]:
        """All that the host needs of a step, in one transfer, as nnU-Net makes one for its loss.

        Returns:
            the terms, the gradient's norm, whether a signal to stop came, and what :meth:`_drawn_foreground` drew; of
            several processes the means of terms and norms, and a signal that came to any.
        """
        numbers = torch.stack([*terms.values(), norm.float()])
        stop = self._sigterm.came
        if self.is_ddp:
            # Then all ranks stop at a term that is not finite on one, and at a signal that came to one.
            numbers = torch.cat((numbers, numbers.new_full((1,), float(stop))))
            dist.all_reduce(numbers)
            numbers /= dist.get_world_size()
        voxels = self._drawn_foreground()
        parts = [numbers.view(torch.int32), *([] if voxels is None else [voxels.flatten()])]
        found = torch.cat(parts).cpu().numpy()
        values = found[: len(numbers)].view(np.float32)
        return (
            dict(zip(terms, values, strict=False)),
            float(values[len(terms)]),
            stop or bool(values[len(terms) + 1 :].any()),
            None if voxels is None else found[len(numbers) :].reshape(voxels.shape),
        )

    def _labeled_batch(self, batch: dict) -> LabeledBatch:
        return LabeledBatch(
            image=self._to_device(batch["data"]),
            target=self._to_device(batch["target"]),
            keys=list(batch["keys"]),
            extra={name: self._to_device(target) for name, target in batch.get("extra", {}).items()},
        )

    def _gradients_or_split(
        self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The step's gradients; with memory mode auto, in split mode from the first step on that stacked cannot make.

        The repeated step is as if nothing had been before it, but for running statistics of a batch normalization. Of
        several processes, which have to go on together, only the first step is tried, with all that later ones hold.
        The optimizer's own step is never repeated: it may have moved some of the weights.
        """
        if (
            self.memory_mode != "stacked"
            or self.settings.memory_mode != "auto"
            or (self.is_ddp and not self._first_step)
        ):
            return self._gradients(labeled, unlabeled, weights)
        recorded, restore_random_state = dict(self._recorded), random_state(self.device)

        def attempt() -> dict[str, Tensor]:
            allocate_momentum(self.optimizer)
            with self._without_other_ranks():
                return self._gradients(labeled, unlabeled, weights)

        terms = unless_out_of_memory(attempt)
        if terms is not None and not self.is_ddp:
            return terms
        self._recorded = recorded
        restore_random_state()
        if not on_all_ranks(terms is not None, self.device):
            self.memory_mode = "split"
            self.optimizer.zero_grad(set_to_none=True)
            free_memory(self.device, compiled=self._is_compiled)
            self.print_to_log_file(
                "The GPU's memory does not suffice for all streams in one pass: going on in memory mode split, one "
                'stream at a time. Set "memory_mode": "split" in the plans\' "semi_supervised" to skip this attempt.'
            )
        return self._gradients(labeled, unlabeled, weights)

    @contextmanager
    def _without_other_ranks(self) -> Iterator[None]:
        """Within, steps have no collective: a rank that runs out of memory would leave the others waiting in it."""
        if not self.is_ddp:
            yield
            return
        loss, self.is_ddp = self.loss, False
        try:
            self.loss = self._build_loss()
            self.is_ddp = True
            with alone(), self.network.no_sync():
                yield
        finally:
            self.is_ddp, self.loss = True, loss

    def _gradients(
        self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Fill the parameters' gradients of the weighted loss; returns the unweighted terms, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        streams = self.streams()
        images = self.images(labeled, unlabeled)
        masks = draw_dropout_masks(self.training_network, streams, images)
        with self._autocast():
            outputs = self._outputs(images, streams, masks)
            parts = self.loss_terms(outputs, labeled, unlabeled)
        terms: dict[str, Tensor] = {}
        while True:
            # The passes of a stream run when the method asks for it, the backward passes outside autocast.
            with self._autocast():
                part = next(parts, None)
            if part is None:
                break
            loss = torch.stack([weights[name] * value for name, value in part.items()]).sum()
            outputs.backward(self.grad_scaler.scale(loss) if self.grad_scaler is not None else loss)
            for name, value in part.items():
                terms[name] = terms.get(name, 0) + value.detach().float()
        outputs.finish()
        if self.is_ddp and self.memory_mode == "split":
            # Encoder and decoders are called apart, and no wrapper sees it.
            average_gradients(self.training_network.parameters())
        return terms

    def _outputs(self, images: Mapping[str, Tensor], streams: Mapping[str, Stream], masks: Any) -> Outputs:
        if self.memory_mode == "stacked":
            return StackedOutputs(self.network, images, streams, masks)
        return SplitOutputs(self.training_network, images, streams, masks, compiled=self._is_compiled)

    def _autocast(self) -> AbstractContextManager:
        # As nnU-Net: mixed precision on CUDA alone.
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _check_finite(self, terms: Mapping[str, Any], labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> None:
        broken = [name for name, value in terms.items() if not np.isfinite(value)]
        self._overflows = self._overflows + 1 if broken else 0
        if self._overflows > (_OVERFLOWS_IN_A_ROW if self.grad_scaler is not None else 0):
            raise RuntimeError(
                f"Training stops in epoch {self.current_epoch}: not finite: {', '.join(broken)}. Cases of the batch: "
                f"labeled {', '.join(labeled.keys)}; unlabeled {', '.join(unlabeled.keys)}. The last checkpoint is "
                f"untouched. Check these images for extreme intensities, or lower the learning rate."
            )

    # ---- log --------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """As nnU-Net, with the counters of an epoch set to zero."""
        super().on_train_epoch_start()
        self._steps_in_epoch = 0
        self._recorded = {}
        self._seconds_waiting = 0.0
        self._skipped_steps = 0

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the epoch's means of all terms and their weights, and what the method recorded."""
        super().on_train_epoch_end(train_outputs)
        names = [name for name in train_outputs[0] if name != "loss"]
        values: dict[str, Any] = {name: float(np.mean([output[name] for output in train_outputs])) for name in names}
        for name, counts in self._recorded.items():
            if self.is_ddp:
                dist.all_reduce(counts)
            count, total = counts.cpu().numpy().astype(float).reshape(2, -1)
            ratio = np.divide(count, total, out=np.full_like(count, np.nan), where=total > 0).tolist()
            values[name] = ratio[0]
            if len(ratio) > 1:
                values[f"{name}_per_class"] = ratio[1:]
        values["seconds/unlabeled_wait"] = self._seconds_waiting
        if self.grad_scaler is not None:
            values["skipped_steps"] = self._skipped_steps
        warnings = self._check_shares(values)
        self._log_ssl(values)
        self._update_rare()
        for warning in warnings:
            self.print_to_log_file(warning)

    def _check_shares(self, values: dict[str, Any]) -> list[str]:
        """Add to the epoch's values which classes have collapsed; returns a warning for each that newly has."""
        lists = self.logger.local_logger.my_fantastic_logging

        def history(name: str) -> list[list[float]]:
            # An epoch without this record has nan in place of a list.
            return [epoch for epoch in lists.get(f"{LOG_PREFIX}share/{name}_per_class", []) if isinstance(epoch, list)]

        if "share/unlabeled_per_class" not in values:
            return []
        predicted, labeled = ([*history(of), values[f"share/{of}_per_class"]] for of in ("unlabeled", "labeled"))
        now = collapsed(predicted, labeled)
        before = (history("collapsed") or [[0.0] * len(now)])[-1]
        values["share/collapsed_per_class"] = [float(one) for one in now]
        new = [index for index, (is_now, was) in enumerate(zip(now, before, strict=True)) if is_now and not was]
        return [collapse_warning(index, predicted, labeled) for index in new]

    def _log_ssl(self, values: Mapping[str, Any]) -> None:
        # nnU-Net's logger wants known keys and one value per epoch for each; its picture is as long as the shortest
        # list. A key that is new since the checkpoint is filled up, one that is no longer logged goes on as nan.
        lists = self.logger.local_logger.my_fantastic_logging
        keyed = {LOG_PREFIX + name: value for name, value in values.items()}
        for key in [*keyed, *(key for key in lists if key.startswith(LOG_PREFIX) and key not in keyed)]:
            known = lists.setdefault(key, [])
            known.extend([float("nan")] * (self.current_epoch - len(known)))
            self.logger.log(key, keyed.get(key, float("nan")), self.current_epoch)
        weights = {name[len("weight/") :]: value for name, value in values.items() if name.startswith("weight/")}
        terms = ", ".join(f"{name} {values[f'loss/{name}']:.4f} (x {weight:.3f})" for name, weight in weights.items())
        self.print_to_log_file(f"loss {values['loss/total']:.4f}: {terms}")
        for name in self._recorded:
            per_class = ", ".join(f"{share:.3f}" for share in values.get(f"{name}_per_class", []))
            self.print_to_log_file(f"{name} {values[name]:.3f}" + (f", per class {per_class}" if per_class else ""))
        self.print_to_log_file(f"Waited {self._seconds_waiting:.1f} s for unlabeled batches")
        if self._skipped_steps:
            self.print_to_log_file(f"The gradient scaler skipped {self._skipped_steps} steps")

    def on_epoch_end(self) -> None:
        """As nnU-Net, and draw progress_ssl.png beside its progress.png."""
        super().on_epoch_end()
        if self.local_rank == 0:
            save_training_curves(
                Path(self.output_folder) / "progress_ssl.png",
                self.logger.local_logger.my_fantastic_logging,
                title=f"{type(self).__name__}, {self.plans_manager.dataset_name}, fold {self.fold}",
            )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with one more entry, ``ssl``; a kill leaves the old file or the new one, whole.

        ``network_weights`` are those of nnU-Net's own network under its own names, so that stock nnU-Net predicts
        with the file once its trainer name is changed. All else is tensors and plain values.
        """
        self._write_checkpoint(filename, next_epoch=self.current_epoch + 1)

    def _write_checkpoint(self, filename: str, *, next_epoch: int) -> None:
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoint = {
            "network_weights": self.training_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": {key: _plain(values[:next_epoch]) for key, values in self.logger.get_checkpoint().items()},
            "_best_ema": self._best_ema_so_far(),
            "current_epoch": next_epoch,
            # nnU-Net keeps the device itself, which older PyTorch does not read with weights_only.
            "init_args": {**self.my_init_kwargs, "device": str(self.device)},
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            CHECKPOINT_KEY: {
                "version": nnunet_ssl.__version__,
                "settings": self.settings.as_dict(),
                "network": self.training_network.training_state(),
            },
        }
        target = Path(filename)
        try:
            # Aside under one name, so that what a kill leaves there is overwritten by the next.
            write_checkpoint(checkpoint, target, aside=Path(f"{filename}.partial"), durable=True)
        except OSError as error:
            free = shutil.disk_usage(target.parent).free / 2**20 if target.parent.is_dir() else 0
            raise RuntimeError(
                f"The checkpoint {filename} could not be written ({error}); {free:.0f} MiB are free there. What was "
                f"in its place before is untouched. Make room, then go on with --c."
            ) from error

    def _best_ema_so_far(self) -> float | None:
        # nnU-Net writes checkpoint_latest before it compares the epoch's value with the best one. Continued from
        # there, it would take the next epoch for the best.
        values = [float(value) for value in self.logger.get_value("ema_fg_dice", step=None) if np.isfinite(value)]
        return max(values, default=None)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restore a checkpoint of this trainer, loading tensors and plain values only.

        Raises:
            UserError: the file holds anything else, or was written by another kind of trainer, with other plans, or
                with settings that make another training network.
        """
        if not self.was_initialized:
            self.initialize()
        checkpoint, named = filename_or_checkpoint, "The checkpoint"
        if not isinstance(checkpoint, dict):
            checkpoint, named = _read_to_continue(Path(checkpoint), self.device), f"The checkpoint {checkpoint}"
        if CHECKPOINT_KEY not in checkpoint:
            raise UserError(f"{_START_FROM_WEIGHTS} {named} was written by {checkpoint.get('trainer_name')}.")
        self._load_networks(checkpoint, named)
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.current_epoch = checkpoint["current_epoch"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]

    def _load_networks(self, checkpoint: Mapping[str, Any], named: str) -> None:
        writer, name, ours = checkpoint["trainer_name"], type(self).__name__, checkpoint[CHECKPOINT_KEY]
        if unlike := differences(checkpoint["network_weights"], self.training_network.state_dict()):
            raise UserError(
                "Continue with the plans and the dataset.json of the checkpoint; or train without --c, with "
                f"-pretrained_weights if only the outputs differ. {named} is of another network: "
                f"{'; '.join([*unlike, *self._other_plans(checkpoint['init_args'])])}."
            )
        before = ours["settings"]
        changed = {name: value for name, value in self.settings.as_dict().items() if before.get(name) != value}
        for setting, value in changed.items():
            self.print_to_log_file(f"Setting {setting} was {before.get(setting)!r} in the checkpoint, is {value!r} now")
        self.training_network.load_state_dict(checkpoint["network_weights"])
        try:
            self.training_network.load_training_state(ours.get("network", {}))
        except (KeyError, ValueError) as error:
            again = ", ".join(f'"{setting}": {json.dumps(before[setting])}' for setting in changed if setting in before)
            if writer != name:
                advice = f"Continue with -tr {writer}, or start from its weights with -pretrained_weights and not --c."
            elif again:
                advice = f'Continue with the settings of the checkpoint: "{PLANS_KEY}": {{{again}}} in the plans.'
            else:
                advice = f"Continue with nnunet_ssl {ours.get('version')}, which wrote the checkpoint."
            raise UserError(
                f"{advice} {named}, of {writer}, does not hold what {name} trains with its settings: {error.args[0]}."
            ) from None
        if writer != name:
            self.print_to_log_file(
                f"The checkpoint is one of {writer}, after {checkpoint['current_epoch']} epochs; {name} has "
                f"{self.num_epochs}"
            )

    def _other_plans(self, init_args: Mapping[str, Any]) -> list[str]:
        """Where a checkpoint was trained, if elsewhere."""
        plans, ours = init_args.get("plans", {}), self.plans_manager.plans
        pairs = {name: (plans.get(name), ours[name]) for name in ("dataset_name", "plans_name")}
        pairs["configuration"] = init_args.get("configuration"), self.configuration_name
        return [f"{name} {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]


def _plain(value: Any) -> Any:
    # NumPy's scalars make a checkpoint unreadable with weights_only.
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def _read_to_continue(file: Path, device: torch.device) -> dict[str, Any]:
    try:
        return read_checkpoint(file, device)
    except NotPlainError as error:
        raise UserError(f"{_START_FROM_WEIGHTS} {error}") from None
    except UserError as error:
        raise UserError(
            f"{error} Move it away; --c takes the first that is there of checkpoint_final.pth, checkpoint_latest.pth "
            "and checkpoint_best.pth."
        ) from None


TRAINING_LENGTHS = (1, 5, 10, 20, 50, 100, 250, 500, 2000, 4000, 8000)


def training_length_variants(trainer: type[SemiSupervisedTrainer]) -> dict[str, type[SemiSupervisedTrainer]]:
    """A trainer and its variants of other lengths, by name: ``<Trainer>_1epoch``, ``_5epochs`` to ``_8000epochs``.

    nnU-Net finds a trainer by its name in a module, so a module in trainers/ puts these into its namespace.
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
