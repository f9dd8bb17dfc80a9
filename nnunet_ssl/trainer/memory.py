"""The memory of a training step, computed before the first one, from the sizes of its tensors.

The trainer's own step is run with tensors that have a size but no content (PyTorch's FakeTensorMode), so nothing is
allocated and nothing is computed. Every storage counts from the operation that makes it until the last tensor that uses
it is gone, autograd's saved tensors among them; the largest sum is the step's peak.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ssl.distributed import alone
from nnunet_ssl.errors import MethodError
from nnunet_ssl.networks.branch import Branch
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.processes import environment
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch, Views
from nnunet_ssl.trainer.epoch_log import EpochLog
from nnunet_ssl.trainer.gradients import StepGradients
from nnunet_ssl.trainer.live_bytes import LiveBytes
from nnunet_ssl.trainer.method_checks import MOMENTS, check_target, last_moments
from nnunet_ssl.trainer.predictions import Predictions

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

Mode: TypeAlias = Literal["supervised", "split", "stacked"]
"""nnUNetTrainer's step, or a method's in one of its memory modes."""

# What a GPU needs on top of the tensors that are alive: the allocator's gaps, libraries' workspaces. Not measured yet.
_HEADROOM = 1.25

_FLOAT32, _HALF = 4, 2


class StepBytes(NamedTuple):
    """Memory of a step in bytes.

    Attributes:
        peak: the most that is alive at once: weights, optimizer, batches, activations, gradients.
        before: what of it is there before the first step: weights and batches.
    """

    peak: int
    before: int


def trainer_of_plans(
    trainer: type[Any], plans: PlansManager, configuration: str, dataset_json: dict[str, Any], device: str = "cpu"
) -> Any:
    """A trainer with what its step depends on, but without network and data, and without a trace on the disk.

    It is constructed as nnU-Net constructs it, :func:`without_a_trace`.
    """
    with without_a_trace():
        given = {**plans.plans, "continue_training": False}
        made = trainer(given, configuration, 0, dataset_json, torch.device(device))
    made.batch_size = made.configuration_manager.batch_size
    made.num_input_channels = determine_num_input_channels(plans, made.configuration_manager, dataset_json)
    return made


@contextmanager
def without_a_trace() -> Iterator[None]:
    """Within, trainers are made that print nothing, keep a log in a temporary folder and tell no tracking service."""
    with (
        tempfile.TemporaryDirectory() as folder,
        environment(nnUNet_results=folder, nnUNet_wandb_enabled="0"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


def step_bytes(
    trainer: Any, mode: Mode, *, mixed_precision: bool, activation_checkpointing: bool | None = None
) -> StepBytes:
    """Compute the memory of a training step, of the stage that needs the most; the trainer stays as it is.

    Args:
        trainer: a semi-supervised trainer, initialized or of :func:`trainer_of_plans`. Of several processes, one.
        mode: which step.
        mixed_precision: activations in half precision and losses in float32, as on CUDA; or all in float32.
        activation_checkpointing: instead of the trainer's setting.
    """
    stages = trainer.stages()[:1] if mode == "supervised" else trainer.stages()
    steps = [_step_of_stage(trainer, mode, stage, mixed_precision, activation_checkpointing) for stage in stages]
    return max(steps, key=lambda step: step.peak)


def _step_of_stage(
    trainer: Any, mode: Mode, stage: str, mixed_precision: bool, activation_checkpointing: bool | None
) -> StepBytes:
    rehearsal = _rehearsal(trainer, stage, activation_checkpointing)
    dtype = torch.float16 if mixed_precision else torch.float32
    with torch.device("meta"):
        build = type(rehearsal).build_network_architecture if mode == "supervised" else None
        network = _build(rehearsal, build or rehearsal.build_network_for_training)
    with alone(), FakeTensorMode():
        # A CPU's autocast is not a GPU's: a network in half precision, with losses in float32, stands in for it.
        _without_content(network, dtype)
        if isinstance(network, TrainingNetwork):
            _cast_inputs(network.training_only, dtype)
        rehearsal.network = network
        rehearsal.loss = _in_float32(rehearsal._build_loss())
        live = LiveBytes()
        for tensor in (*network.parameters(), *network.buffers()):
            live.count(tensor)
        with live:
            run = _supervised_step if mode == "supervised" else _semi_supervised_step
            before = run(rehearsal, mode, dtype, live)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() for parameter in network.parameters())
    momentum = _FLOAT32 * trained
    if not mixed_precision:
        return StepBytes(live.peak + momentum, before)
    # Autocast's copies of the weights are in half precision; weights, gradients and momentum are not.
    return StepBytes(live.peak + _FLOAT32 * weights + _HALF * trained + momentum, before + (_FLOAT32 - _HALF) * weights)


def _rehearsal(trainer: Any, stage: str, activation_checkpointing: bool | None) -> Any:
    """The trainer once more, to run a step on tensors without content."""
    rehearsal = copy.copy(trainer)
    rehearsal.device = torch.device("cpu")
    rehearsal.is_ddp = False
    rehearsal.grad_scaler = None
    rehearsal.current_stage = stage
    rehearsal.epoch_log = EpochLog(None, lambda _: None, counts_skipped_steps=False)
    rehearsal.predictions = Predictions(rehearsal.epoch_log, trainer.label_manager, lambda _: None)
    rehearsal._do_i_compile = lambda: False
    if activation_checkpointing is not None:
        rehearsal.settings = dataclasses.replace(trainer.settings, activation_checkpointing=activation_checkpointing)
    return rehearsal


def _supervised_step(rehearsal: Any, mode: Mode, dtype: torch.dtype, live: LiveBytes) -> int:
    """nnUNetTrainer's step; returns the bytes that were alive before it."""
    batch = labeled_batch(rehearsal)
    before = live.now
    rehearsal.loss(rehearsal.network(batch["data"].to(dtype)), batch["target"]).backward()
    return before


def _semi_supervised_step(rehearsal: Any, mode: Mode, dtype: torch.dtype, live: LiveBytes) -> int:
    """A method's step; returns the bytes that were alive before it."""
    views = rehearsal.unlabeled_views()
    made = labeled_batch(rehearsal, weak=views.weak_labeled)
    made["extra"] = _extra_targets(rehearsal)
    deep_supervision = rehearsal.enable_deep_supervision
    labeled = LabeledBatch.from_loader(
        made, rehearsal.device, deep_supervision=deep_supervision, weak=views.weak_labeled
    )
    unlabeled = UnlabeledBatch.from_loader(unlabeled_batch(rehearsal), rehearsal.device)
    del made
    before = live.now
    assert mode != "supervised"
    gradients = StepGradients(
        rehearsal, rehearsal.network, device=rehearsal.device, memory_mode=mode, image_dtype=dtype
    )
    rehearsal.step_gradients = gradients
    progress = max((one for one in MOMENTS if rehearsal.stage(one) == rehearsal.current_stage), default=1.0)
    gradients(labeled, unlabeled, gradients.prepare(labeled, unlabeled), rehearsal.loss_weights(progress))
    return before


def _build(rehearsal: Any, build: Callable[..., nn.Module]) -> nn.Module:
    return build(
        rehearsal.plans_manager,
        rehearsal.configuration_manager,
        rehearsal.num_input_channels,
        rehearsal.label_manager.num_segmentation_heads,
        rehearsal.enable_deep_supervision,
    )


def _without_content(network: nn.Module, dtype: torch.dtype) -> None:
    # Autocast knows no meta device, so the parameters become tensors of a CPU.
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype)
            module.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _cast_inputs(modules: nn.ModuleDict, dtype: torch.dtype) -> None:
    """A method's own modules, which run on what the heads put out, cast their inputs as autocast would."""

    def cast(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one for one in inputs)

    for name, module in modules.items():
        if name != "head" and not isinstance(module, (Branch, UNetDecoder)):
            module.register_forward_pre_hook(cast)


def _in_float32(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    def in_float32(output: Any, target: Any) -> Tensor:
        return loss([level.float() for level in output] if isinstance(output, list) else output.float(), target)

    return in_float32


def _channels_of_targets(trainer: Any) -> int:
    labels = trainer.label_manager
    return len(labels.foreground_regions) + labels.has_ignore_label if labels.has_regions else 1


def labeled_batch(trainer: Any, *, weak: bool = False) -> dict[str, Any]:
    """As nnU-Net's loader makes it, with tensors that nobody has filled; ``weak`` adds the weak view of the images."""
    size, patch = trainer.batch_size, trainer.configuration_manager.patch_size
    channels = _channels_of_targets(trainer)
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
    levels = [[round(length * scale) for length, scale in zip(patch, level, strict=True)] for level in scales]
    dtype = torch.bool if trainer.label_manager.has_regions else torch.int16
    targets = [torch.empty(size, channels, *level, dtype=dtype) for level in levels]
    if weak:
        targets.append(torch.empty(size, trainer.num_input_channels, *patch))
    return {
        "data": torch.empty(size, trainer.num_input_channels, *patch),
        "target": targets if trainer.enable_deep_supervision or weak else targets[0],
        "keys": [""] * size,
    }


def _extra_targets(trainer: Any) -> dict[str, Any]:
    patch = trainer.configuration_manager.patch_size
    made = {name: target.largest(trainer.batch_size, patch) for name, target in trainer.extra_targets.items()}
    for name, target in made.items():
        check_target(target, f"largest() of the labeled target {name!r} returns")
    return made


def unlabeled_batch(trainer: Any) -> dict[str, Any]:
    """As UnlabeledDataLoader makes it, with tensors that nobody has filled."""
    views: Views = trainer.unlabeled_views()
    size, patch = trainer.unlabeled_patches, trainer.configuration_manager.patch_size

    def image() -> Tensor:
        return torch.empty(size, trainer.num_input_channels, *patch)

    return {
        "weak": image(),
        "strong": [image() for _ in range(views.strong)],
        "boxes": [torch.empty(size, len(patch), 2, dtype=torch.int64) for _ in range(views.strong) if views.cutmix],
        "partner": torch.empty(size, dtype=torch.int64),
        "keys": [""] * size,
        **({"augmented": image()} if views.augmented else {}),
    }


class MemoryEstimate:
    """GPU memory of a trainer's step in GB (10⁹ bytes), each value computed when it is asked for.

    Args:
        trainer: as for :func:`step_bytes`.
        mixed_precision: as on CUDA, or all in float32.

    Attributes:
        labeled: labeled patches per step of one process.
        unlabeled: unlabeled ones.

    Raises:
        MethodError: at some moment of a training, the trainer is in no stage that there is.
    """

    def __init__(self, trainer: Any, *, mixed_precision: bool = True) -> None:
        last_moments(trainer.stage, trainer.stages())
        self._trainer = trainer
        self._mixed_precision = mixed_precision
        self.labeled: int = trainer.batch_size
        self.unlabeled: int = trainer.unlabeled_patches

    def _gigabytes(self, mode: Mode, activation_checkpointing: bool | None = None) -> float:
        return (
            step_bytes(
                self._trainer,
                mode,
                mixed_precision=self._mixed_precision,
                activation_checkpointing=activation_checkpointing,
            ).peak
            / 1e9
        )

    @cached_property
    def supervised(self) -> float:
        """nnUNetTrainer."""
        return self._gigabytes("supervised")

    @cached_property
    def stacked(self) -> float:
        """All streams in one pass."""
        return self._gigabytes("stacked")

    @cached_property
    def split(self) -> float:
        """One stream at a time."""
        return self._gigabytes("split")

    @cached_property
    def split_checkpointed(self) -> float:
        """One stream at a time, with activation checkpointing: the least there is."""
        return self._gigabytes("split", True)


class Verdict(NamedTuple):
    """Whether a training fits into a GPU as it is set, and which mode does, or what to do."""

    fits: bool
    text: str


def start_split(estimate: MemoryEstimate, free: float, memory_mode: str) -> bool:
    """Whether memory mode auto has no use in trying stacked: it needs more than the ``free`` GB of a GPU.

    Up to a quarter below them, auto tries stacked, and goes to split when that fails.
    """
    return memory_mode == "auto" and estimate.stacked > free


def judge(estimate: MemoryEstimate, free: float, memory_mode: str) -> Verdict:
    """Compare an estimate with the ``free`` GB of a GPU; a quarter more than the estimate has to be free."""

    def fits(needed: float) -> bool:
        return needed * _HEADROOM <= free

    if memory_mode != "split" and fits(estimate.stacked):
        return Verdict(True, f"stacked should fit into {free:.1f} GB")
    if fits(estimate.split):
        if memory_mode == "stacked":
            return Verdict(
                False,
                f'{free:.1f} GB may not suffice for stacked: set "memory_mode" to "auto" or "split". Split should fit',
            )
        by_itself = "; auto changes to split if needed" if memory_mode == "auto" else ""
        if start_split(estimate, free, memory_mode):
            by_itself = '; auto starts in split, because stacked needs more ("memory_mode": "stacked" tries it anyway)'
        return Verdict(True, f"split should fit into {free:.1f} GB{by_itself}")
    least = f"{estimate.split_checkpointed:.1f} GB"
    if fits(estimate.split_checkpointed):
        settings = ['"memory_mode": "split"'] if memory_mode == "stacked" else []
        settings.append('"activation_checkpointing": true')
        return Verdict(
            False, f"{free:.1f} GB may not suffice even for split: set {' and '.join(settings)}, for about {least}"
        )
    return Verdict(
        False,
        f"{free:.1f} GB may not suffice in any memory mode, not even for split with activation checkpointing (about "
        f'{least}): lower "unlabeled_batch_size", or plan for less memory (nnUNetv2_plan_experiment '
        "-gpu_memory_target)",
    )


def log_memory(trainer: Any) -> bool:
    """On a GPU, log how much memory a step needs and which memory mode fits.

    It stops a training only for a mistake of the method, which its first step would meet too.

    Returns:
        Whether memory mode auto should start in split, since stacked needs more memory than there is; False where
        nothing is known.
    """
    if trainer.device.type != "cuda" or trainer.local_rank != 0:
        return False
    try:
        estimate = MemoryEstimate(trainer)
        free = (torch.cuda.mem_get_info(trainer.device)[0] + torch.cuda.memory_reserved(trainer.device)) / 1e9
        memory_mode = trainer.settings.memory_mode
        verdict = judge(estimate, free, memory_mode)
        text = f"Estimate of a step's GPU memory: split {estimate.split:.1f} GB, stacked {estimate.stacked:.1f} GB. "
        trainer.print_to_log_file(text + verdict.text[0].upper() + verdict.text[1:])
        return start_split(estimate, free, memory_mode)
    except MethodError:
        raise
    except Exception as error:
        trainer.print_to_log_file(f"No estimate of the GPU memory of a step ({type(error).__name__}: {error})")
        return False
