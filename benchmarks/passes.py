"""The passes that a method's step needs, run bare: without its loss terms, dropout and heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nnunet_ssl.networks.streams import Stream, StreamOutput
from nnunet_ssl.trainer.base import SemiSupervisedTrainer


class BarePasses:
    """The passes of a step of the trainer's present stage: its streams', and those that ``prepare`` makes before them.

    Args:
        trainer: with unlabeled batches.
        batch: a labeled one, as for ``train_step``.
    """

    def __init__(self, trainer: SemiSupervisedTrainer, batch: dict[str, Any]) -> None:
        labeled, unlabeled = trainer.next_batches(batch)
        with _recorded(trainer) as self.before:
            prepared = trainer.prepare(labeled, unlabeled)
        self.network, self.device = trainer.training_network, trainer.device
        self.streams = {name: _bare(stream) for name, stream in trainer.streams().items()}
        needed = {stream.image for stream in self.streams.values()}
        images = trainer.images(labeled, unlabeled, prepared)
        self.images = {name: image.detach() for name, image in images.items() if name in needed}

    @property
    def counts(self) -> str:
        """How many passes there are: one of an encoder serves all streams of its image."""
        student = [stream for stream in self.streams.values() if not stream.teacher]
        before = [stream for _, stream in self.before if not stream.teacher]
        encoded = {(stream.network, stream.image) for stream in student}
        taught = sum(stream.teacher for stream in (*self.streams.values(), *(stream for _, stream in self.before)))
        text = f"{len(encoded) + len(before)} encoder + {len(student) + len(before)} decoder passes"
        return text + (f" + {taught} of the teacher" if taught else "")

    def stacked(self) -> None:
        """As in memory mode stacked."""
        self._begin()
        with self._autocast():
            outputs = self.network(self.images, self.streams, {})
            losses = [_loss_of(outputs[name]) for name, stream in self.streams.items() if stream.gradient]
        torch.stack(losses).sum().backward()

    def separate(self) -> None:
        """As in memory mode split."""
        self._begin()
        for place in dict.fromkeys(map(_place_of, self.streams.values())):
            self._separate({name: stream for name, stream in self.streams.items() if _place_of(stream) == place})

    def _separate(self, streams: dict[str, Stream]) -> None:
        """Streams of one image and one network."""
        first = next(iter(streams.values()))
        branch, learns = self.network.branch_of(first), any(stream.gradient for stream in streams.values())
        with torch.set_grad_enabled(learns), self._autocast():
            skips = branch.encoder(self.images[first.image])
        leaves = [skip.detach().requires_grad_(learns) for skip in skips]
        for name, stream in streams.items():
            with torch.set_grad_enabled(stream.gradient), self._autocast():
                loss = _loss_of(branch.decode({name: stream}, self.images, {stream.image: leaves}, {})[name])
            if stream.gradient:
                loss.backward()
        if learns:
            torch.autograd.backward(skips, [leaf.grad for leaf in leaves])

    def _begin(self) -> None:
        self.network.zero_grad(set_to_none=True)
        with torch.no_grad(), self._autocast():
            for image, stream in self.before:
                branch = self.network.branch_of(stream)
                branch.decode({"alone": stream}, {stream.image: image}, {stream.image: branch.encoder(image)}, {})

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=self.device.type == "cuda")


def bare_passes(
    trainer: SemiSupervisedTrainer, batch: dict[str, Any], *, stacked: bool
) -> tuple[str, Callable[[], None]]:
    """What the passes are, in words, and a function that runs them."""
    passes = BarePasses(trainer, batch)
    way = "stacked" if stacked else "separate"
    return f"{passes.counts}, {way}, bare", passes.stacked if stacked else passes.separate


@contextmanager
def _recorded(trainer: SemiSupervisedTrainer) -> Iterator[list[tuple[Tensor, Stream]]]:
    """The image and stream of every pass in addition to the step's."""
    passes: list[tuple[Tensor, Stream]] = []
    run = trainer.without_gradient

    def record(image: Tensor, stream: Stream) -> StreamOutput:
        passes.append((image, _bare(stream)))
        return run(image, stream)

    trainer.without_gradient = record  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del trainer.without_gradient


def _bare(stream: Stream) -> Stream:
    return Stream(
        stream.image, gradient=stream.gradient, decoder=stream.decoder, teacher=stream.teacher, network=stream.network
    )


def _place_of(stream: Stream) -> tuple[str | None, bool, str]:
    return stream.network, stream.teacher, stream.image


def _loss_of(output: StreamOutput) -> Tensor:
    return output.logits.float().square().mean()
