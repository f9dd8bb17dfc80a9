"""The gradients of one training step: a method's streams and terms, in one of two memory modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from nnunet_ssl.compiled import fusing
from nnunet_ssl.distributed import alone, average_gradients, num_processes, on_all_ranks
from nnunet_ssl.errors import MethodError, returned
from nnunet_ssl.networks.passes import Outputs, SplitOutputs, StackedOutputs
from nnunet_ssl.networks.streams import Stream, StreamOutput
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.out_of_memory import allocate_momentum, free_memory, random_state, unless_out_of_memory
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch
from nnunet_ssl.trainer.epoch_log import EpochLog
from nnunet_ssl.trainer.method_checks import check_images, check_weights, weighted_sum
from nnunet_ssl.trainer.step_numbers import SUPERVISED

MemoryMode: TypeAlias = Literal["stacked", "split"]
"""All streams of a step in one pass, or one after the other."""

_DICTIONARY = "Return a dictionary."
_GENERATOR = "Write it as a generator: yield each part of the loss as a dictionary."


class StepHooks(Protocol):
    """What a step asks of a method; :class:`~nnunet_ssl.trainer.base.SemiSupervisedTrainer` says what each is for."""

    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> Any:
        """What a step draws or computes once, before its passes."""

    def streams(self) -> dict[str, Stream]:
        """The passes of a step."""

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        """The images that the streams name."""

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Named parts of the loss."""


@dataclass(frozen=True)
class FallBack:
    """How memory mode ``auto`` goes from stacked to split when the device's memory does not suffice.

    Attributes:
        optimizer: nnU-Net's, whose momentum counts in the attempt.
        epoch_log: whose counts are those of before, when a step is repeated.
        log: writes a line to nnU-Net's log file.
    """

    optimizer: torch.optim.Optimizer
    epoch_log: EpochLog
    log: Callable[[str], None]


class StepGradients:
    """Fills the parameters' gradients with those of a step's weighted loss.

    Args:
        method: its hooks.
        network: the network, as ``torch.compile`` may have wrapped it.
        device: that trains.
        memory_mode: ``stacked``, ``split`` or ``auto``, which begins with split on a CPU and with batch normalization
            over several processes, and else with stacked.
        grad_scaler: nnU-Net's, or None without mixed precision.
        image_dtype: of the images, where the network is not of float32.
        fall_back: how ``auto`` goes from stacked to split.

    Attributes:
        memory_mode: the present one, stacked or split.
        autocast: makes the context in which passes and terms are computed; mixed precision on CUDA alone, as nnU-Net.
    """

    def __init__(
        self,
        method: StepHooks,
        network: nn.Module,
        *,
        device: torch.device,
        memory_mode: str,
        grad_scaler: Any = None,
        image_dtype: torch.dtype = torch.float32,
        fall_back: FallBack | None = None,
    ) -> None:
        # Batch normalization that sees all ranks waits for them within alone() too: an attempt that fails on one rank
        # would leave the others there.
        waits = any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
        first: MemoryMode = "split" if device.type == "cpu" or waits else "stacked"
        self.memory_mode: MemoryMode = first if memory_mode == "auto" else cast(MemoryMode, memory_mode)
        self.autocast: Callable[[], AbstractContextManager[Any]] = (
            (lambda: torch.autocast("cuda")) if device.type == "cuda" else nullcontext
        )
        self._method = method
        self._network = network
        self._training_network = without_wrapper(network)
        self._compiled = isinstance(network, OptimizedModule)
        self._device = device
        self._grad_scaler = grad_scaler
        self._distributed = num_processes() > 1
        self._image_dtype = image_dtype
        self._fall_back = fall_back if memory_mode == "auto" else None
        self._tried = False

    def settle_mode(self, *, start_split: bool) -> None:
        """Begin in split on all ranks, if one of them has no use in trying stacked."""
        if self.memory_mode == "stacked" and not on_all_ranks(not start_split, self._device):
            self.memory_mode = "split"

    def begin_stage(self) -> None:
        """Of several processes, which try stacked in the first step alone, try it again: the streams are others now."""
        self._tried = False

    @torch.no_grad()
    def prepare(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> Any:
        """What the method prepares for a step. Its gradient would need graphs that memory mode split does not keep."""
        return self._method.prepare(labeled, unlabeled)

    def __call__(
        self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Compute a step's gradients; with a fall-back, in split mode from the first step on that stacked cannot make.

        The repeated step is as if nothing had been before it, but for running statistics of a batch normalization. Of
        several processes, which have to go on together, only the first step is tried, with all that later ones hold.
        The optimizer's own step is never repeated: it may have moved some of the weights.

        Args:
            labeled: the labeled batch.
            unlabeled: the unlabeled batch.
            prepared: what the method has prepared for these two.
            weights: of the terms.

        Returns:
            The terms by name, unweighted scalars without gradient.

        Raises:
            MethodError: the method has a mistake that its author can correct.
        """
        fall_back = self._fall_back
        if fall_back is None or self.memory_mode != "stacked" or (self._distributed and self._tried):
            return self._compute(labeled, unlabeled, prepared, weights)
        self._tried = True
        counts, restore_random_state = fall_back.epoch_log.counts, random_state(self._device)

        def attempt() -> dict[str, Tensor]:
            allocate_momentum(fall_back.optimizer)
            # A rank that runs out of memory would leave the others waiting in a collective.
            with alone():
                return self._compute(labeled, unlabeled, prepared, weights)

        terms = unless_out_of_memory(attempt)
        if terms is not None and not self._distributed:
            return terms
        fall_back.epoch_log.reset_counts(counts)
        restore_random_state()
        if not on_all_ranks(terms is not None, self._device):
            self.memory_mode = "split"
            self._network.zero_grad(set_to_none=True)
            free_memory(self._device, compiled=self._compiled)
            fall_back.log(
                "The GPU's memory does not suffice for all streams in one pass: continuing in memory mode split, "
                'one stream at a time. Set "memory_mode": "split" in the plans\' "semi_supervised" to skip '
                "this attempt."
            )
        return self._compute(labeled, unlabeled, prepared, weights)

    def _compute(
        self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        self._network.zero_grad(set_to_none=True)
        streams = returned("streams", self._method.streams(), Mapping, _DICTIONARY)
        images = returned("images", self._method.images(labeled, unlabeled, prepared), Mapping, _DICTIONARY)
        check_weights(returned("loss_weights", weights, Mapping, _DICTIONARY))
        check_images(streams, images)
        self._training_network.check_streams(streams)
        named = dict.fromkeys(stream.image for stream in streams.values())
        images = {name: images[name].to(self._image_dtype) for name in named}
        with self.autocast():
            outputs = self._outputs(images, streams)
            parts = self._method.loss_terms(outputs, labeled, unlabeled, prepared)
        parts = returned("loss_terms", parts, Iterator, _GENERATOR)
        terms: dict[str, Tensor] = {}
        while True:
            # The passes of a stream run when the method asks for it, the backward passes outside autocast.
            with self.autocast(), fusing(self._compiled and not self._distributed):
                part = next(parts, None)
            if part is None:
                break
            loss = weighted_sum(part, weights)
            outputs.backward(self._grad_scaler.scale(loss) if self._grad_scaler is not None else loss)
            for name, value in part.items():
                terms[name] = terms.get(name, 0) + value.detach().float()
        if SUPERVISED not in terms:
            raise MethodError(
                f"loss_terms yields no term {SUPERVISED!r}, only {', '.join(terms) or 'nothing'}: every stage of a "
                f"training learns from the labeled images, and nnU-Net's log shows that term."
            )
        outputs.finish()
        average_gradients(self._training_network.parameters())
        return terms

    @torch.no_grad()
    def without_gradient(self, image: Tensor, stream: Stream) -> StreamOutput:
        """One pass in addition to the step's, without gradient; what the stream calls its image does not matter."""
        if not isinstance(image, Tensor):
            raise MethodError(
                f"without_gradient() gets {'None' if image is None else f'a {type(image).__name__}'} as its image, not "
                "a tensor. If that is a view, ask for it in unlabeled_views()."
            )
        stream = replace(stream, gradient=False)
        images, streams = {stream.image: image.to(self._image_dtype)}, {"alone": stream}
        self._training_network.check_streams({"without_gradient": stream})
        masks = self._training_network.draw_dropout_masks(streams, images)
        with self.autocast():
            return SplitOutputs(self._training_network, images, streams, masks, compile_passes=self._compiled)["alone"]

    def _outputs(self, images: Mapping[str, Tensor], streams: Mapping[str, Stream]) -> Outputs:
        masks = self._training_network.draw_dropout_masks(streams, images)
        if self.memory_mode == "stacked":
            return StackedOutputs(self._network, images, streams, masks)
        return SplitOutputs(self._training_network, images, streams, masks, compile_passes=self._compiled)


def without_wrapper(network: nn.Module) -> TrainingNetwork:
    """The network without the wrapper of ``torch.compile``."""
    network = network._orig_mod if isinstance(network, OptimizedModule) else network
    assert isinstance(network, TrainingNetwork)
    return network
