"""The base of all methods: nnU-Net's trainer with an unlabeled stream.

nnU-Net keeps planning, preprocessing, augmentation, the epoch loop, validation and inference. This file adds what a
step needs: a second loader, passes of many streams, named loss terms with a schedule, and their log.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, cast

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch import distributed as dist

import nnunet_ssl
from nnunet_ssl.data.labeled_targets import AddTargets, LabeledTarget
from nnunet_ssl.data.loader import UnlabeledDataset
from nnunet_ssl.data.predicted_foreground import PredictedForeground
from nnunet_ssl.data.prepare import UnlabeledSource, prepare_unlabeled_cases
from nnunet_ssl.data.previous_stage import PreviousStage
from nnunet_ssl.data.records import folder_name
from nnunet_ssl.data.views import WithWeakView, flat
from nnunet_ssl.distributed import Ranks, alone, device_of_this_process, joined, on_all_ranks
from nnunet_ssl.errors import MethodError
from nnunet_ssl.evaluation.curves import save_training_curves
from nnunet_ssl.networks.architectures import UNet, build_unet, check_network
from nnunet_ssl.networks.passes import Outputs
from nnunet_ssl.networks.streams import Logits, Stream, StreamOutput
from nnunet_ssl.networks.training_network import TrainingNetwork, predicted_by_the_other
from nnunet_ssl.processes import Sigterm, derived_seed, handled_sigterm, seed_this_process
from nnunet_ssl.settings import SemiSupervisedSettings, TeacherSettings
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch, Views
from nnunet_ssl.trainer.cascade import segmented_by_previous_stage
from nnunet_ssl.trainer.checkpoint import (
    CHECKPOINT_KEY,
    best_so_far,
    load_networks,
    own_entry,
    plain,
    read_to_continue,
    write_durably,
)
from nnunet_ssl.trainer.epoch_log import EpochLog
from nnunet_ssl.trainer.gradients import (
    SUPERVISED,
    FallBack,
    MemoryMode,
    StepGradients,
    check_teacher_moved,
    without_wrapper,
)
from nnunet_ssl.trainer.loaders import Loaders, augmented, restart, unlabeled_loader
from nnunet_ssl.trainer.memory import log_memory
from nnunet_ssl.trainer.optimizer import GuardedOptimizer
from nnunet_ssl.trainer.predictions import Predictions
from nnunet_ssl.trainer.step_numbers import read_step


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with unlabeled data. A method derives from it and overrides the hooks below.

    Hooks: ``settings_class``, :meth:`unlabeled_views`, :meth:`streams`, :meth:`images`, :meth:`loss_terms`,
    :meth:`loss_weights`; and where needed :meth:`build_training_network`, :meth:`labeled_targets`, :meth:`stages` with
    :meth:`stage`, :meth:`prepare` and :meth:`after_optimizer_step`.

    The constructor's arguments are nnU-Net's own, which reads them back by name from a checkpoint. Settings come from
    the plans (:mod:`nnunet_ssl.settings`).

    Raises:
        UserError: the plans hold a setting that is unknown or out of range, or a path where a name should be.

    Attributes:
        settings: the method's settings.
        current_stage: the one of :meth:`stages` that the present step belongs to.
        step_gradients: computes the gradients of a step; made by :meth:`initialize`.

    A method of four hooks, which makes predictions on unlabeled images certain:

    >>> from nnunet_ssl.api import SemiSupervisedTrainer, Stream, entropy, training_length_variants
    >>> class EntropyTrainer(SemiSupervisedTrainer):
    ...     def streams(self):
    ...         return {"x": Stream("x", deep_supervision=self.enable_deep_supervision), "u": Stream("u")}
    ...     def images(self, labeled, unlabeled, prepared):
    ...         return {"x": labeled.image, "u": unlabeled.weak}
    ...     def loss_terms(self, outputs, labeled, unlabeled, prepared):
    ...         yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}
    ...         yield {"entropy": entropy(outputs["u"].logits, regions=self.label_manager.has_regions).mean()}
    ...     def loss_weights(self, progress):
    ...         return {"supervised": 1.0, "entropy": 0.1 * progress}
    >>> sorted(training_length_variants(EntropyTrainer))[:2]
    ['EntropyTrainer', 'EntropyTrainer_100epochs']
    """

    settings_class: ClassVar[type[SemiSupervisedSettings]] = SemiSupervisedSettings
    training_epochs: ClassVar[int | None] = None

    # nnU-Net's own, which are not annotated there.
    is_ddp: bool
    device: torch.device
    output_folder: str
    grad_scaler: Any
    network: Any

    step_gradients: StepGradients

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
        self.ranks = Ranks()
        if self.is_ddp:
            # nnU-Net takes the GPU whose number is the rank, which on a second machine is none.
            self.device = device_of_this_process(device)
            self.grad_scaler = self.grad_scaler if self.device.type == "cuda" else None
        self.settings = self.settings_class.from_plans(self.configuration_manager.configuration)
        if self.training_epochs is not None:
            self.num_epochs = self.training_epochs
        # nnU-Net's inference calls build_network_architecture on the class and gets the stock network; training calls
        # it on the instance.
        self.build_network_architecture = self.build_network_for_training
        # A trainer that has its own augmentation overrides this on the class.
        self.get_training_transforms = self._training_transforms
        self.extra_targets = self.labeled_targets()
        self.dataloader_unlabeled: Iterator[Any] | None = None
        self.loaders = Loaders()
        self.epoch_log = EpochLog(
            lambda: self.logger.local_logger.my_fantastic_logging,
            self.logger.log,
            self.print_to_log_file,
            counts_skipped_steps=self.grad_scaler is not None,
        )
        self.current_stage = self.stages()[0]
        self._unlabeled_dataset: UnlabeledDataset | None = None
        labels = self.label_manager
        self.predictions = Predictions(self.epoch_log.record, () if labels.has_regions else labels.foreground_labels)
        self._steps_in_epoch = 0
        self._sigterm = Sigterm()

    # ---- hooks of a method ------------------------------------------------------------------------------------------

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        """Wrap nnU-Net's network with what training needs."""
        return TrainingNetwork(network)

    def unlabeled_views(self) -> Views:
        """Which views the unlabeled loader yields: by default the weak one alone."""
        return Views()

    def labeled_targets(self) -> Mapping[str, LabeledTarget]:
        """What the labeled loader's workers compute in addition to nnU-Net's targets; nothing by default.

        They are made of a batch after nnU-Net's own transforms, and ``LabeledBatch.extra`` then has them under their
        names. Called by the constructor.
        """
        return {}

    def stages(self) -> tuple[str, ...]:
        """The names of the training's stages, in their order; one by default. Called by the constructor.

        A stage may have streams and terms of its own: :meth:`streams`, :meth:`images` and :meth:`loss_terms` look at
        ``self.current_stage``. A term that a stage does not have is logged as nan.
        """
        return ("training",)

    def stage(self, progress: float) -> str:
        """Which of :meth:`stages` a step belongs to, by the share of the planned training that is done."""
        return self.stages()[0]

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> Any:
        """What a step draws or computes once, before its passes: boxes, partners, noise, a teacher's prediction.

        The result is handed to :meth:`images` and :meth:`loss_terms`. It carries no gradient. Passes in addition to
        the step's streams, such as repeated ones of a teacher, are made with :meth:`without_gradient`.
        """
        return None

    def streams(self) -> dict[str, Stream]:
        """The passes of a step, by name, in the order in which :meth:`loss_terms` asks for them."""
        raise NotImplementedError

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        """The images that the streams name, (N, C, *patch size): of one size, but for N."""
        raise NotImplementedError

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Yield named, unweighted parts of the loss; parts of one name add up to its term. One term is ``supervised``.

        A part may use the outputs that were asked for since the last yield, and detached values of earlier ones: with
        little memory, a stream's graph is gone once its part was yielded.
        """
        raise NotImplementedError

    def loss_weights(self, progress: float) -> dict[str, float]:
        """The weight of every term, where ``progress`` in [0, 1] is the share of the planned training that is done."""
        raise NotImplementedError

    def after_optimizer_step(self) -> None:
        """Called after each step of the optimizer, but not after one that the gradient scaler skipped.

        By default the teacher follows the student, where there is one.
        """
        if self.training_network.has_teacher:
            assert isinstance(self.settings, TeacherSettings)
            self.training_network.update_teacher(self.settings.ema_decay)

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

    def without_gradient(self, image: Tensor, stream: Stream) -> StreamOutput:
        """One pass in addition to the step's streams, for :meth:`prepare`.

        Args:
            image: (N, C, *patch size).
            stream: says which network, decoder and dropout; what it calls its image does not matter.
        """
        return self.step_gradients.without_gradient(image, stream)

    def known_voxels(self, labeled: LabeledBatch) -> Tensor | None:
        """Where the label is not the ignore label: (B, 1, *patch size), bool; None for a dataset without one."""
        labels, target = self.label_manager, labeled.full_resolution
        if not labels.has_ignore_label:
            return None
        return target[:, -1:] == 0 if labels.has_regions else target != labels.ignore_label

    def label_of(self, labeled: LabeledBatch) -> Tensor:
        """The label as losses and pseudo-labels have it: classes (B, 1, *patch size), or regions (B, R, *patch size),
        bool. Voxels with the ignore label are background: :meth:`known_voxels` says where they are.
        """
        labels, target = self.label_manager, labeled.full_resolution
        if labels.has_regions:
            return target[:, : labels.num_segmentation_heads] > 0
        return target.masked_fill(target == labels.ignore_label, 0) if labels.has_ignore_label else target

    def record(self, name: str, count: Tensor, total: Tensor) -> None:
        """Log the ratio of two counts, summed over the epoch: see :meth:`EpochLog.record`."""
        self.epoch_log.record(name, count, total)

    def record_prediction(self, logits: Logits) -> None:
        """Count what is predicted on unlabeled images, for the log and the warning of a collapse, and where later
        patches are cropped. Call it once a step.

        Args:
            logits: (U, C, *spatial), of the stream whose predictions are pseudo-labels; with deep supervision the list.
        """
        self.predictions.count(logits[0] if isinstance(logits, list) else logits)

    def _record_labels(self, labeled: LabeledBatch) -> None:
        # nnU-Net centers the last patches of a batch on foreground; unlabeled ones are cropped at random.
        anywhere = 1.0 if self.probabilistic_oversampling else 1 - self.oversample_foreground_percent
        patches = round(len(labeled.image) * anywhere)
        known = self.known_voxels(labeled)
        self.predictions.count_labeled(self.label_of(labeled)[:patches], None if known is None else known[:patches, 0])

    # ---- network ----------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """As nnU-Net; of several processes, each with its share of the batch and with the device it was given."""
        if self.settings.seed is not None:
            seed_this_process(derived_seed(self.settings.seed))
        # nnU-Net would wrap the network in DistributedDataParallel.
        distributed, self.is_ddp = self.is_ddp, False
        try:
            super().initialize()
        finally:
            self.is_ddp = distributed
        self._loss_of_this_process = self.loss
        if distributed:
            self.ranks = Ranks.of_this_training()
            self._set_batch_size_and_oversample()
            self.loss = self._build_loss()
            self.network = joined(self.network, self.device)
        self.prepare_steps()

    def prepare_steps(self) -> None:
        """Make what computes the steps, of the network, the gradient scaler and the optimizer as they are now."""
        mode: MemoryMode | str = self.settings.memory_mode
        automatic = mode == "auto"
        if automatic:
            mode = "split" if self.device.type == "cpu" else "stacked"
        fall_back = FallBack(self.optimizer, self.epoch_log, self._without_other_ranks, self.print_to_log_file)
        self.step_gradients = StepGradients(
            self,
            self.network,
            device=self.device,
            memory_mode=cast(MemoryMode, mode),
            grad_scaler=self.grad_scaler,
            distributed=self.is_ddp,
            fall_back=fall_back if automatic else None,
        )
        self.guarded_optimizer = GuardedOptimizer(self.optimizer, self.network.parameters(), self.grad_scaler)

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
        unet = build_unet(self._stock_builder, plans_manager, configuration_manager, *arguments)
        network = self.build_training_network(unet)
        network.set_activation_checkpointing(self.settings.activation_checkpointing)
        if network.has_teacher and not isinstance(self.settings, TeacherSettings):
            settings = type(self.settings).__name__
            raise MethodError(
                f"{type(self).__name__} has a teacher: derive {settings} from TeacherSettings, which say how it moves."
            )
        return network

    @property
    def _stock_builder(self) -> Callable[..., nn.Module]:
        return getattr(type(self), "build_network_architecture")  # noqa: B009 - shadowed on the instance

    @property
    def training_network(self) -> TrainingNetwork:
        """The network without the wrapper of ``torch.compile``."""
        return without_wrapper(self.network)

    # ---- unlabeled data ---------------------------------------------------------------------------------------------

    @property
    def unlabeled_batch_size(self) -> int:
        """U, the unlabeled patches of a step: the plan's batch size, at least 2 since CutMix needs a partner.

        Several processes share them equally, each with at least 2.
        """
        return self.settings.unlabeled_batch_size or max(2, self.configuration_manager.batch_size)

    @property
    def unlabeled_patches(self) -> int:
        """The unlabeled patches of a step that this process has."""
        return max(2, -(-self.unlabeled_batch_size // self.ranks.count))

    def on_train_start(self) -> None:
        """Check the fold, preprocess and check the unlabeled cases, then start as nnU-Net does.

        Raises:
            UserError: the fold cannot be trained, or there is no unlabeled case, or one that is a validation case.
        """
        check_network(self._stock_builder, self.plans_manager, self.configuration_manager, self.dataset_json)
        # Of several processes, none has let nnU-Net write a split file yet: that comes after the network's wrapping.
        if self.local_rank == 0:
            self.unlabeled_source.check_fold(self.configuration_name, type(self).__name__, self.print_to_log_file)
        if not self.was_initialized:
            self.initialize()
        self.print_to_log_file(f"{type(self).__name__} of nnunet_ssl {nnunet_ssl.__version__}, {self.settings}")
        if self.is_ddp:
            # All processes start with PyTorch's default seed, and would draw the same dropout and noise.
            torch.manual_seed(torch.initial_seed() + self.ranks.rank)
        start_split = log_memory(self)
        if self.step_gradients.memory_mode == "stacked" and not on_all_ranks(not start_split, self.device):
            self.step_gradients.memory_mode = "split"
        self.print_to_log_file(f"Memory mode: {self.step_gradients.memory_mode}")
        self._unlabeled_dataset = self._prepare_dataset()
        super().on_train_start()
        # From here on there is something to save first.
        self._sigterm.held = True

    def do_split(self) -> tuple[list[str], list[str]]:
        """As nnU-Net; a fold without validation cases has its training cases in their place, as fold all has."""
        train, val = super().do_split()
        return train, val if len(val) else train

    @property
    def unlabeled_source(self) -> UnlabeledSource:
        """Where the fold's unlabeled cases come from."""
        # A machine that only trains may have the preprocessed data alone.
        raw = Path(str(nnUNet_raw)) / self.plans_manager.dataset_name if nnUNet_raw.is_set() else None
        preprocessed = Path(self.preprocessed_dataset_folder_base)
        return UnlabeledSource(raw, preprocessed, self.plans_manager, self.dataset_json, self.fold)

    def _prepare_dataset(self) -> UnlabeledDataset:
        cases = prepare_unlabeled_cases(
            self.unlabeled_source,
            self.configuration_name,
            split=self.do_split,
            allow_transductive=self.settings.allow_transductive,
            ranks=self.ranks,
            log=self.print_to_log_file,
        )
        if not self.is_cascaded:
            return UnlabeledDataset(cases)
        name = folder_name(self.configuration_manager.previous_stage_name, "previous_stage")
        results = Path(self.folder_with_segs_from_previous_stage)
        train, val = self.do_split()
        segmentations = segmented_by_previous_stage(
            cases,
            self.unlabeled_source,
            PreviousStage(results, name, self.configuration_name, type(self).__name__),
            labeled_cases=[*train, *val],
            build=self._stock_builder,
            device=self.device,
            ranks=self.ranks,
            log=self.print_to_log_file,
        )
        return UnlabeledDataset(cases, segmentations)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's two loaders; that of unlabeled batches is started with them."""
        train, val = super().get_dataloaders()
        # From here on they are ended whatever happens.
        self.loaders = Loaders({"training": train, "validation": val})
        if self.extra_targets:
            # nnU-Net's loaders can take this, but nnU-Net has started their workers without.
            train.transform = AddTargets(self.extra_targets)
            restart(train)
        assert self._unlabeled_dataset is not None
        loader = unlabeled_loader(
            train,
            self._unlabeled_dataset,
            self.unlabeled_patches,
            views=self.unlabeled_views(),
            configuration=self.configuration_manager,
            plans=self.plans_manager,
            foreground=self._follow_foreground(self._unlabeled_dataset),
            foreground_share=self.settings.foreground_crops,
        )
        pin_memory = self.device.type == "cuda"
        self.dataloader_unlabeled = augmented(loader, ranks=self.ranks.count, pin_memory=pin_memory)
        self.loaders = Loaders({"training": train, "validation": val, "unlabeled": self.dataloader_unlabeled})
        if self.settings.seed is not None:
            self.loaders.seed(self.settings.seed, rank=self.ranks.rank, epoch=self.current_epoch)
        next(self.dataloader_unlabeled)
        self.loaders.watch()
        return train, val

    def _follow_foreground(self, dataset: UnlabeledDataset) -> PredictedForeground | None:
        # With a seed, what a worker has seen of the training when it crops a patch must not depend on the time.
        unpredictable = self.settings.seed is not None and get_allowed_n_proc_DA() > 0
        share = self.settings.foreground_crops
        found = self.predictions.follow_foreground(
            dataset.identifiers, self.num_structures, share, unpredictable=unpredictable, log=self.print_to_log_file
        )
        self.predictions.choose_rare(self.epoch_log.history("patches/labeled_per_class"))
        return found

    def _training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        stock_transforms = getattr(type(self), "get_training_transforms")  # noqa: B009 - shadowed on the instance
        transforms = stock_transforms(*args, **kwargs)
        return WithWeakView(flat(transforms)) if self.unlabeled_views().weak_labeled else transforms

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
                if self._sigterm.came and "workers" in str(error):
                    # The signal went to the workers too, and they ended first.
                    self._stop_at_sigterm()
                if (killed := self.loaders.explain(self.current_epoch)) is not None:
                    raise killed from error
                raise
            finally:
                self.loaders.finish()

    def _stop_at_sigterm(self) -> None:
        file = Path(self.output_folder) / "checkpoint_latest.pth"
        self.write_checkpoint_of_epoch(str(file), next_epoch=self.current_epoch)
        self.print_to_log_file(
            f"SIGTERM in epoch {self.current_epoch}, after {self._steps_in_epoch} steps of it: stopped, weights are in "
            f"{file}. --c goes on from these weights at the start of the epoch."
        )
        raise SystemExit(128 + signal.SIGTERM)

    # ---- the step ---------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the planned training that is done, in [0, 1]."""
        return (self.current_epoch + self._steps_in_epoch / self.num_iterations_per_epoch) / self.num_epochs

    def next_batches(self, batch: dict) -> tuple[LabeledBatch, UnlabeledBatch]:
        """A step's two batches on the device: nnU-Net's labeled one, and the unlabeled loader's next."""
        assert self.dataloader_unlabeled is not None
        weak = self.unlabeled_views().weak_labeled
        deep_supervision = self.enable_deep_supervision
        labeled = LabeledBatch.from_loader(batch, self.device, deep_supervision=deep_supervision, weak=weak)
        start = perf_counter()
        unlabeled = next(self.dataloader_unlabeled)
        self.epoch_log.seconds_waiting += perf_counter() - start
        return labeled, UnlabeledBatch.from_loader(unlabeled, self.device)

    def train_step(self, batch: dict) -> dict:
        """One step on a labeled batch and an unlabeled one.

        Returns:
            ``loss``, the supervised term, which nnU-Net draws with the validation loss, and all terms by name.

        Raises:
            RuntimeError: a term is not finite; the text names it and the cases of the batch.
        """
        labeled, unlabeled = self.next_batches(batch)
        self.predictions.begin(unlabeled)
        self._enter_stage()
        weights = self.loss_weights(self.progress)
        prepared = self.prepare(labeled, unlabeled)
        terms = self.step_gradients(labeled, unlabeled, prepared, weights)
        self._record_labels(labeled)

        norm = self.guarded_optimizer.clip()
        moved = self.guarded_optimizer.step_scaled()
        found = read_step(terms, norm, stop=self._sigterm.came, voxels=self.predictions.draw(), distributed=self.is_ddp)
        cases = f"labeled {', '.join(labeled.keys)}; unlabeled {', '.join(unlabeled.keys)}"
        moved |= self.guarded_optimizer.check_and_step(
            found.terms, found.gradient, cases=cases, epoch=self.current_epoch
        )
        if moved:
            self.after_optimizer_step()
            check_teacher_moved(self.training_network)
        else:
            self.epoch_log.skipped_steps += 1
        if found.voxels is not None:
            self.predictions.remember(found.voxels, self.configuration_manager.patch_size)
        self._steps_in_epoch += 1
        if found.stop:
            self._stop_at_sigterm()
        return {
            "loss": found.terms[SUPERVISED],
            "loss/total": sum(weights[name] * value for name, value in found.terms.items()),
            **{f"loss/{name}": value for name, value in found.terms.items()},
            **{f"weight/{name}": weights[name] for name in found.terms},
        }

    def _enter_stage(self) -> None:
        stage = self.stage(self.progress)
        if stage not in self.stages():
            raise MethodError(f"stage() returns {stage!r}, which is none of stages(): {', '.join(self.stages())}.")
        if stage != self.current_stage:
            self.current_stage = stage
            self.step_gradients.begin_stage()
            self.print_to_log_file(f"Stage {stage}")

    @contextmanager
    def _without_other_ranks(self) -> Iterator[None]:
        """Within, steps have no collective: a rank that runs out of memory would leave the others waiting in it."""
        loss, self.loss = self.loss, self._loss_of_this_process
        try:
            with alone():
                yield
        finally:
            self.loss = loss

    # ---- log --------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """As nnU-Net, with the counters of an epoch set to zero."""
        super().on_train_epoch_start()
        self._steps_in_epoch = 0
        self.epoch_log.start()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the epoch's means of all terms and their weights, and what the method recorded."""
        super().on_train_epoch_end(train_outputs)
        self.epoch_log.finish(self.current_epoch, train_outputs, dist.all_reduce if self.is_ddp else None)
        self.predictions.choose_rare(self.epoch_log.history("patches/labeled_per_class"))

    def on_epoch_end(self) -> None:
        """As nnU-Net, and draw progress_ssl.png next to its progress.png."""
        super().on_epoch_end()
        if self.local_rank == 0:
            save_training_curves(
                Path(self.output_folder) / "progress_ssl.png",
                self.logger.local_logger.my_fantastic_logging,
                title=f"{type(self).__name__}, {self.plans_manager.dataset_name}, fold {self.fold}",
            )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnU-Net; with the setting ``validate_both``, before it the other of student and teacher.

        The other one's results are in ``validation_student`` or ``validation_teacher``; those of the network that
        predicts are in ``validation`` as ever.
        """
        network = self.training_network
        if network.has_teacher and isinstance(self.settings, TeacherSettings) and self.settings.validate_both:
            with predicted_by_the_other(network) as other:
                self.print_to_log_file(f"Validation of the {other} (validate_both), into validation_{other}")
                self._validate_into(f"validation_{other}", save_probabilities)
        super().perform_actual_validation(save_probabilities)

    def _validate_into(self, name: str, save_probabilities: bool) -> None:
        # nnU-Net's validation always writes into a folder of this name in its output folder.
        folder = Path(self.output_folder)
        self.output_folder = str(folder / f"{name}_partial")
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.output_folder = str(folder)
        if self.local_rank == 0:
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / f"{name}_partial" / "validation").rename(folder / name)
            (folder / f"{name}_partial").rmdir()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with one more entry, ``ssl``; a kill leaves the old file or the new one, whole.

        ``network_weights`` are those of nnU-Net's own network under its own names, so that stock nnU-Net predicts
        with the file once its trainer name is changed. All else is tensors and plain values.
        """
        self.write_checkpoint_of_epoch(filename, next_epoch=self.current_epoch + 1)

    def write_checkpoint_of_epoch(self, filename: str, *, next_epoch: int) -> None:
        """Write a checkpoint from which ``--c`` goes on with ``next_epoch``.

        Raises:
            RuntimeError: it cannot be written; what was in its place before is untouched.
        """
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoint = {
            "network_weights": self.training_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": {key: plain(values[:next_epoch]) for key, values in self.logger.get_checkpoint().items()},
            "_best_ema": best_so_far(self.logger.get_value("ema_fg_dice", step=None)),
            "current_epoch": next_epoch,
            # nnU-Net keeps the device itself, which older PyTorch does not read with weights_only.
            "init_args": {**self.my_init_kwargs, "device": str(self.device)},
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            CHECKPOINT_KEY: own_entry(self.training_network, self.settings),
        }
        write_durably(checkpoint, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restore a checkpoint of this trainer, loading tensors and plain values only.

        Raises:
            UserError: the file holds anything else, or was written by another kind of trainer, with other plans, or
                with settings that make another training network.
        """
        if not self.was_initialized:
            self.initialize()
        checkpoint, named = read_to_continue(filename_or_checkpoint, self.device)
        trained_with = {name: self.plans_manager.plans[name] for name in ("dataset_name", "plans_name")}
        load_networks(
            self.training_network,
            checkpoint,
            named,
            trainer_name=type(self).__name__,
            settings=self.settings,
            trained_with={**trained_with, "configuration": self.configuration_name},
            log=self.print_to_log_file,
        )
        if checkpoint["trainer_name"] != type(self).__name__:
            self.print_to_log_file(
                f"The checkpoint is one of {checkpoint['trainer_name']}, after {checkpoint['current_epoch']} epochs; "
                f"{type(self).__name__} has {self.num_epochs}"
            )
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.current_epoch = checkpoint["current_epoch"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
