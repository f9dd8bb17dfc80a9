"""The base of all methods: nnU-Net's trainer with an unlabeled stream.

nnU-Net keeps planning, preprocessing, augmentation, the epoch loop, validation and inference. This file adds what a
step needs: a second loader, passes of many streams, named loss terms with a schedule, and their log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor
from torch import distributed as dist

import nnunet_ssl
from nnunet_ssl.data.labeled_targets import LabeledTarget
from nnunet_ssl.data.loader import UnlabeledDataset
from nnunet_ssl.data.prepare import UnlabeledSource, prepare_unlabeled_cases
from nnunet_ssl.data.previous_stage import PreviousStage
from nnunet_ssl.data.records import folder_name
from nnunet_ssl.distributed import LossOfRanks, Ranks, check_device, device_of_this_process, joined
from nnunet_ssl.errors import returned, show_user_errors_alone
from nnunet_ssl.evaluation.curves import class_names, save_training_curves
from nnunet_ssl.networks.architectures import UNet, build_unet, check_network
from nnunet_ssl.networks.passes import Outputs
from nnunet_ssl.networks.streams import Logits, Stream, StreamOutput
from nnunet_ssl.networks.training_network import TrainingNetwork, training_network_of
from nnunet_ssl.processes import StopSignal, derived_seed, handled_signals, seed_this_process
from nnunet_ssl.settings import SemiSupervisedSettings, predicts_with_teacher, teacher_settings
from nnunet_ssl.trainer import method_checks
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch, Views, known_voxels, label_of, of_equal_resolutions
from nnunet_ssl.trainer.cascade import segmented_by_previous_stage
from nnunet_ssl.trainer.checkpoint import continue_from, learned, logged, write_durably
from nnunet_ssl.trainer.epoch_log import EpochLog
from nnunet_ssl.trainer.gradients import FallBack, StepGradients, without_wrapper
from nnunet_ssl.trainer.loaders import Loaders, unlabeled_loader
from nnunet_ssl.trainer.memory import log_memory
from nnunet_ssl.trainer.optimizer import GuardedOptimizer
from nnunet_ssl.trainer.predictions import Predictions
from nnunet_ssl.trainer.step_numbers import read_step, step_values
from nnunet_ssl.trainer.validation import by_the_other


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with unlabeled data; docs/how-to/write-a-method.md says how a method derives from it.

    The constructor's arguments are nnU-Net's own, which reads them back by name from a checkpoint. Settings come from
    the plans (:mod:`nnunet_ssl.settings`).

    Attributes:
        settings: the method's settings.
        current_stage: the one of :meth:`stages` that the present step belongs to.
        step_gradients: computes the gradients of a step; made by :meth:`initialize`.

    Raises:
        UserError: the plans hold a setting that is unknown or out of range, or a path where a name should be.

    >>> from nnunet_ssl.api import SemiSupervisedTrainer
    >>> SemiSupervisedTrainer.settings_class(ramp_length=0.5).memory_mode
    'auto'
    """

    settings_class: ClassVar[type[SemiSupervisedSettings]] = SemiSupervisedSettings
    training_epochs: ClassVar[int | None] = None
    # nnU-Net's own, which are not annotated there.
    is_ddp: bool
    device: torch.device
    output_folder: str
    num_epochs: int
    grad_scaler: Any
    network: Any
    loss: Any
    build_network_architecture: Any
    # Made when a training starts.
    dataloader_unlabeled: Iterator[Any]
    _unlabeled_dataset: UnlabeledDataset

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature
    ) -> None:
        show_user_errors_alone()
        for key in ("dataset_name", "plans_name"):
            folder_name(plans[key], key)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.ranks = Ranks()
        if self.is_ddp:
            # nnU-Net takes the GPU whose number is the rank, which on a second machine is none.
            self.device = device_of_this_process(device)
            self.grad_scaler = self.grad_scaler if self.device.type == "cuda" else None
        self.settings = self.settings_class.from_plans(self.configuration_manager.configuration, plans)
        self.num_epochs = self.training_epochs or self.num_epochs
        # nnU-Net's inference calls it on the class and gets the stock network; training calls it on the instance.
        self.build_network_architecture = self.build_network_for_training
        method_checks.check_hook_names(type(self), SemiSupervisedTrainer)
        self.extra_targets = method_checks.labeled_targets_of(self.labeled_targets())
        returned("unlabeled_views", self.unlabeled_views(), Views, "Return Views(...).")
        self.loaders = Loaders()
        self.epoch_log = EpochLog(self.logger, self.print_to_log_file, counts_skipped_steps=bool(self.grad_scaler))
        self.current_stage = method_checks.first_stage(self.stages())
        self.predictions = Predictions(self.epoch_log, self.label_manager, self.print_to_log_file)
        self._steps_in_epoch = 0
        self._stop = StopSignal()

    # ---- hooks of a method ------------------------------------------------------------------------------------------

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """Wrap nnU-Net's network with what training needs."""
        return TrainingNetwork(network)

    def unlabeled_views(self) -> Views:
        """Which views the unlabeled loader yields: by default the weak one alone."""
        return Views()

    def labeled_targets(self) -> Mapping[str, LabeledTarget]:
        """What the labeled loader's workers make of a batch after nnU-Net's transforms; nothing by default.

        ``LabeledBatch.extra`` has them under their names. Called by the constructor.
        """
        return {}

    def stages(self) -> tuple[str, ...]:
        """The names of the training's stages, in their order; one by default. Called by the constructor.

        A stage may have streams and terms of its own: the hooks look at ``self.current_stage``. A term that a stage
        does not have is logged as nan.
        """
        return ("training",)

    def stage(self, progress: float) -> str:
        """Which of :meth:`stages` a step belongs to, by the share of the planned training that is done."""
        return self.stages()[0]

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> Any:
        """What a step draws or computes once, before its passes: boxes, partners, noise, a teacher's prediction.

        The result is handed to :meth:`images` and :meth:`loss_terms`. It carries no gradient. Passes of its own, such
        as repeated ones of a teacher, are made with :meth:`without_gradient`.
        """
        return None

    def streams(self) -> dict[str, Stream]:
        """The passes of a step, by name, in the order in which :meth:`loss_terms` asks for them."""
        raise NotImplementedError(f"{type(self).__name__} has no streams(). Every method writes this hook.")

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        """The images that the streams name, (N, C, *patch size): of one size, but for N."""
        raise NotImplementedError(f"{type(self).__name__} has no images(). Every method writes this hook.")

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield named, unweighted parts of the loss; parts of one name add up to its term. One term is ``supervised``.

        A part may use outputs that no earlier part has used, and detached values of the others: with little memory, a
        stream's graph is gone once its part was yielded.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss_terms(). Every method writes this hook.")

    def loss_weights(self, progress: float) -> dict[str, float]:
        """The weight of every term, where ``progress`` in [0, 1] is the share of the planned training that is done."""
        raise NotImplementedError(f"{type(self).__name__} has no loss_weights(). Every method writes this hook.")

    def after_optimizer_step(self) -> None:
        """Called after each step that moved the weights; by default the teacher follows, where there is one."""
        if self.training_network.has_teacher:
            self.training_network.update_teacher(teacher_settings(self.settings).ema_decay)

    # ---- for methods to call ----------------------------------------------------------------------------------------

    @property
    def num_structures(self) -> int:
        """Number of foreground classes, or of regions."""
        return self.label_manager.num_segmentation_heads - (0 if self.label_manager.has_regions else 1)

    def supervised_loss(self, output: Any, target: Any) -> Tensor:
        """nnU-Net's own loss for the dataset: Dice and cross-entropy, or Dice and BCE for regions, ignore label and
        deep supervision included. **[choice]** The papers use Dice (and cross-entropy) on the full resolution alone.
        """
        return self.loss(*of_equal_resolutions(output, target, self.loss))

    def without_gradient(self, image: Tensor, stream: Stream) -> StreamOutput:
        """One pass in addition to the step's streams, for :meth:`prepare`, of an image (N, C, *patch size).

        The stream says which network, decoder and dropout; what it calls its image does not matter.
        """
        return self.step_gradients.without_gradient(image, stream)

    def known_voxels(self, labeled: LabeledBatch) -> Tensor | None:
        """Where the label is not the ignore label: (B, 1, *patch size), bool; None for a dataset without one."""
        return known_voxels(labeled.full_resolution, self.label_manager)

    def label_of(self, labeled: LabeledBatch) -> Tensor:
        """The label as losses and pseudo-labels have it: classes (B, 1, *patch size), or regions (B, R, *patch size),
        bool. Voxels with the ignore label are background: :meth:`known_voxels` says where they are.
        """
        return label_of(labeled.full_resolution, self.label_manager)

    def record(self, name: str, count: Tensor, total: Tensor) -> None:
        """Log the ratio of two counts, summed over the epoch: see :meth:`EpochLog.record`."""
        self.epoch_log.record(name, count, total)

    def record_prediction(self, logits: Logits) -> None:
        """Count what is predicted on unlabeled images, for the log, the warning of a collapse and where to crop later.

        Call it once a step, with the logits (U, C, *spatial) of pseudo-labels, or with deep supervision's list.
        """
        self.predictions.count(logits[0] if isinstance(logits, list) else logits)

    # ---- network and unlabeled data ---------------------------------------------------------------------------------

    def initialize(self) -> None:
        """As nnU-Net, after :func:`check_device`; each of several processes has its share of a batch and its device."""
        check_device(self.device)
        if self.settings.seed is not None:
            seed_this_process(derived_seed(self.settings.seed))
        # nnU-Net would wrap the network in DistributedDataParallel.
        distributed, self.is_ddp = self.is_ddp, False
        super().initialize()
        self.is_ddp = distributed
        if distributed:
            self.ranks = Ranks.of_this_training()
            self._set_batch_size_and_oversample()
            self.loss = LossOfRanks(together=self._build_loss(), own=self.loss)
            self.network = joined(self.network, self.device)
        method_checks.last_moments(self.stage, self.stages())
        self.prepare_steps()

    def prepare_steps(self) -> None:
        """Make what computes the steps, of the network, the gradient scaler and the optimizer as they are now."""
        scaler, mode = self.grad_scaler, self.settings.memory_mode
        fall_back = FallBack(self.optimizer, self.epoch_log, self.print_to_log_file)
        self.step_gradients = StepGradients(
            self, self.network, device=self.device, memory_mode=mode, grad_scaler=scaler, fall_back=fall_back
        )
        self.guarded_optimizer = GuardedOptimizer(self.optimizer, self.network.parameters(), scaler)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As nnU-Net, which with several processes expects a network that is wrapped."""
        self.training_network.decoder.deep_supervision = enabled

    def build_network_for_training(
        self,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> TrainingNetwork:
        """Called in place of ``build_network_architecture``, with its arguments: the network that is trained."""
        arguments = (num_input_channels, num_output_channels, enable_deep_supervision)
        unet = build_unet(type(self).build_network_architecture, plans_manager, configuration_manager, *arguments)
        network = training_network_of(self.build_training_network(unet))
        network.set_activation_checkpointing(self.settings.activation_checkpointing)
        network.predict_with_teacher = predicts_with_teacher(self.settings, has_teacher=network.has_teacher)
        return network

    @property
    def training_network(self) -> TrainingNetwork:
        """The network without the wrapper of ``torch.compile``."""
        return without_wrapper(self.network)

    @property
    def unlabeled_batch_size(self) -> int:
        """U, the unlabeled patches of a step; by default the plan's batch size, at least 2 for CutMix's partners."""
        return self.settings.unlabeled_batch_size or max(2, self.configuration_manager.batch_size)

    @property
    def unlabeled_patches(self) -> int:
        """The unlabeled patches of a step that this process has: an equal share, at least 2."""
        return max(2, -(-self.unlabeled_batch_size // self.ranks.count))

    def on_train_start(self) -> None:
        """Check the fold, preprocess and check the unlabeled cases, then start as nnU-Net does.

        Raises:
            UserError: the fold cannot be trained, or there is no unlabeled case, or one that is a validation case.
        """
        build = type(self).build_network_architecture
        check_network(build, self.plans_manager, self.configuration_manager, self.dataset_json, self.print_to_log_file)
        # Of several processes, none has let nnU-Net write a split file yet: that comes after the network's wrapping.
        if self.local_rank == 0:
            self.unlabeled_source.check_fold(self.print_to_log_file)
        if not self.was_initialized:
            self.initialize()
        method_checks.log_unknown_modules(vars(self), self.training_network.parameters(), self.print_to_log_file)
        self.print_to_log_file(f"{type(self).__name__} of nnunet_ssl {nnunet_ssl.__version__}, {self.settings}")
        if self.is_ddp:
            # All processes start with PyTorch's default seed, and would draw the same dropout and noise.
            torch.manual_seed(torch.initial_seed() + self.ranks.rank)
        self.step_gradients.settle_mode(start_split=log_memory(self))
        self.print_to_log_file(f"Memory mode: {self.step_gradients.memory_mode}")
        self._unlabeled_dataset = self._prepare_dataset()
        super().on_train_start()
        # From here on there is something to save first.
        self._stop.held = True

    def do_split(self) -> tuple[list[str], list[str]]:
        """As nnU-Net; a fold without validation cases has its training cases in their place, as fold all has."""
        train, val = super().do_split()
        return train, val if len(val) else train

    @property
    def unlabeled_source(self) -> UnlabeledSource:
        """Where the fold's unlabeled cases come from."""
        # A machine that only trains may have the preprocessed data alone.
        raw = Path(str(nnUNet_raw)) / self.plans_manager.dataset_name if nnUNet_raw.is_set() else None
        place, trained = Path(self.preprocessed_dataset_folder_base), (self.fold, self.configuration_name)
        return UnlabeledSource(raw, place, self.plans_manager, self.dataset_json, *trained, type(self).__name__)

    def _prepare_dataset(self) -> UnlabeledDataset:
        source, log, allow = self.unlabeled_source, self.print_to_log_file, self.settings.allow_transductive
        cases = prepare_unlabeled_cases(source, self.do_split, allow_transductive=allow, ranks=self.ranks, log=log)
        if not self.is_cascaded:
            return UnlabeledDataset(cases)
        name = folder_name(self.configuration_manager.previous_stage_name, "previous_stage")
        stage = PreviousStage(Path(self.folder_with_segs_from_previous_stage), name)
        (train, val), build = self.do_split(), type(self).build_network_architecture
        segmentations = segmented_by_previous_stage(
            cases, source, stage, [*train, *val], build, self.device, ranks=self.ranks, log=log
        )
        return UnlabeledDataset(cases, segmentations)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's two loaders; that of unlabeled batches is started with them. All end with the training."""
        self._stop.shields = True
        train, val = super().get_dataloaders()
        self.loaders.augmenters.update(training=train, validation=val)
        self.loaders.extend_training(self.extra_targets, weak=self.unlabeled_views().weak_labeled)
        dataset, seed, share = self._unlabeled_dataset, self.settings.seed, self.settings.foreground_crops
        views, plans, configuration = self.unlabeled_views(), self.plans_manager, self.configuration_manager
        foreground = self.predictions.follow_foreground(dataset.identifiers, share, seeded=seed is not None)
        loader = unlabeled_loader(
            train, dataset, self.unlabeled_patches, views, configuration, plans, foreground, foreground_share=share
        )
        self.dataloader_unlabeled = self.loaders.add_unlabeled(loader, ranks=self.ranks.count, device=self.device)
        self.loaders.begin(seed, rank=self.ranks.rank, epoch=self.current_epoch)
        self._stop.shields = False
        return train, val

    def run_training(self) -> None:
        """As nnU-Net, and end all worker processes whatever happens.

        Raises:
            SystemExit: SIGTERM or Ctrl-C came; with code 143 or 130, after a checkpoint from which ``--c`` goes on.
            RuntimeError: a worker was killed, a term is not finite, or a checkpoint could not be written.
        """
        with handled_signals() as self._stop, self.loaders.finished():
            try:
                super().run_training()
            except RuntimeError as error:
                # The signal may go to the workers too, and they end first.
                if not (self._stop.wanted and "workers" in str(error)):
                    raise
                self._stop_at_signal()

    def _stop_at_signal(self) -> None:
        file = Path(self.output_folder) / "checkpoint_latest.pth"
        self.write_checkpoint_of_epoch(str(file), next_epoch=self.current_epoch)
        self.print_to_log_file(self._stop.message(self.current_epoch, self._steps_in_epoch, file))
        raise SystemExit(128 + self._stop.number)

    # ---- the step ---------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the planned training that is done, in [0, 1]."""
        return (self.current_epoch + self._steps_in_epoch / self.num_iterations_per_epoch) / self.num_epochs

    def next_batches(self, batch: dict) -> tuple[LabeledBatch, UnlabeledBatch]:
        """A step's two batches on the device: nnU-Net's labeled one, and the unlabeled loader's next."""
        weak, deep = self.unlabeled_views().weak_labeled, self.enable_deep_supervision
        labeled = LabeledBatch.from_loader(batch, self.device, deep_supervision=deep, weak=weak)
        with self.epoch_log.waiting():
            unlabeled = next(self.dataloader_unlabeled)
        return labeled, UnlabeledBatch.from_loader(unlabeled, self.device)

    def train_step(self, batch: dict) -> dict:
        """One step on a labeled batch and an unlabeled one; returns :func:`step_values`.

        Raises:
            RuntimeError: a term is not finite; the text names it and the cases of the batch.
        """
        labeled, unlabeled = self.next_batches(batch)
        self.predictions.begin(unlabeled)
        self._enter_stage()
        weights = self.loss_weights(self.progress)
        prepared = self.step_gradients.prepare(labeled, unlabeled)
        terms = self.step_gradients(labeled, unlabeled, prepared, weights)
        # nnU-Net centers the other labeled patches on foreground.
        anywhere = 1.0 if self.probabilistic_oversampling else 1 - self.oversample_foreground_percent
        self.predictions.count_labeled(self.label_of(labeled), self.known_voxels(labeled), cropped_anywhere=anywhere)

        optimizer = self.guarded_optimizer
        norm, moved = optimizer.clip(), optimizer.step_scaled()
        found = read_step(terms, norm, stop=self._stop.wanted, voxels=self.predictions.draw(), distributed=self.is_ddp)
        cases = f"labeled {', '.join(labeled.keys)}; unlabeled {', '.join(unlabeled.keys)}"
        moved |= optimizer.check_and_step(found.terms, found.gradient, cases=cases, epoch=self.current_epoch)
        if moved:
            self.after_optimizer_step()
            self.training_network.check_teacher_moved()
        else:
            self.epoch_log.skipped_steps += 1
        self.predictions.remember(found.voxels, self.configuration_manager.patch_size)
        self._steps_in_epoch += 1
        self.epoch_log.time_step(self.num_iterations_per_epoch)
        if found.stop:
            self._stop_at_signal()
        return step_values(found.terms, weights)

    def _enter_stage(self) -> None:
        stage = method_checks.known_stage(self.stage(self.progress), self.stages())
        if stage != self.current_stage:
            self.current_stage = stage
            self.step_gradients.begin_stage()
            self.print_to_log_file(f"Stage {stage}")

    # ---- log, validation, checkpoints -------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """As nnU-Net, with the counters of an epoch set to zero."""
        super().on_train_epoch_start()
        self._steps_in_epoch = 0
        self.epoch_log.start()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the epoch's means of all terms and their weights, and what the method recorded."""
        super().on_train_epoch_end(train_outputs)
        self.epoch_log.finish(self.current_epoch, train_outputs, dist.all_reduce if self.is_ddp else None)
        self.predictions.choose_rare()

    def on_epoch_end(self) -> None:
        """As nnU-Net, and draw progress_ssl.png next to its progress.png."""
        super().on_epoch_end()
        if self.local_rank == 0:
            title = f"{type(self).__name__}, {self.plans_manager.dataset_name}, fold {self.fold}"
            file, names = Path(self.output_folder) / "progress_ssl.png", class_names(self.dataset_json)
            save_training_curves(file, self.epoch_log.lists, title=title, names=names)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnU-Net; with the setting ``validate_both``, before it the other of student and teacher.

        The other one's results are in ``validation_student`` or ``validation_teacher``.
        """
        network, folder = self.training_network, self.output_folder
        if network.has_teacher and teacher_settings(self.settings).validate_both:
            try:
                with by_the_other(network, Path(folder), first=self.local_rank == 0) as (other, self.output_folder):
                    self.print_to_log_file(f"Validation of the {other} (validate_both), into validation_{other}")
                    super().perform_actual_validation(save_probabilities)
            finally:
                self.output_folder = folder
        super().perform_actual_validation(save_probabilities)

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with one more entry, ``ssl``; see :func:`learned`."""
        self.write_checkpoint_of_epoch(filename, next_epoch=self.current_epoch + 1)

    def write_checkpoint_of_epoch(self, filename: str, *, next_epoch: int) -> None:
        """Write a checkpoint from which ``--c`` goes on with ``next_epoch``; raises as :func:`write_durably` does."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoint = {
            "trainer_name": type(self).__name__,
            # nnU-Net keeps the device itself, which older PyTorch does not read with weights_only.
            "init_args": {**self.my_init_kwargs, "device": str(self.device)},
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            **learned(self.training_network, self.optimizer, self.grad_scaler, self.settings),
            **logged(self.logger, next_epoch),
        }
        write_durably(checkpoint, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restore a checkpoint of this trainer, of tensors and plain values; raises as :func:`continue_from` does."""
        if not self.was_initialized:
            self.initialize()
        here = {**self.plans_manager.plans, **self.my_init_kwargs, "num_epochs": self.num_epochs}
        parts = self.training_network, self.optimizer, self.grad_scaler, self.settings
        checkpoint = continue_from(
            filename_or_checkpoint, *parts, trainer_name=type(self).__name__, here=here, log=self.print_to_log_file
        )
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.current_epoch = checkpoint["current_epoch"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
