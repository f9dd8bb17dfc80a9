"""The passes of a training step: what each of them decodes, drops and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Logits: TypeAlias = Any
"""(N, C, *spatial), or with deep supervision nnU-Net's list of them, full resolution first."""


@dataclass(frozen=True)
class Stream:
    """One pass of a decoder, and what it should return.

    Attributes:
        image: name of the image whose features are decoded. Streams of one image share its pass of the encoder.
        dropout: probability with which a channel is dropped, for this stream alone.
        dropout_on: where: ``skips``, ``bottleneck``, ``features`` (the decoder's last, before its heads).
        gradient: whether a loss is taken of this stream. Without, it runs without gradient.
        deep_supervision: whether it puts out all of nnU-Net's resolutions or the full one alone.
        decoder: which of the training network's ``decoders``; nnU-Net's own by default.
        head: whether the training network's ``head`` runs on the decoder's last features.
        features: whether the decoder's last features are returned, without gradient.
        bottleneck: whether the encoder's last features are returned, as the decoder got them.
        teacher: run by the teacher: its encoder, its decoder, its head. A teacher's stream has no gradient.
        network: which of the training network's ``networks`` runs it: its encoder, its decoder. nnU-Net's own by
            default.

    >>> Stream("u", dropout=0.5).dropout_on
    ('skips', 'bottleneck')
    >>> Stream("u", teacher=True)
    Traceback (most recent call last):
    ValueError: A teacher's stream has no gradient: set gradient=False.
    """

    image: str
    dropout: float = 0.0
    dropout_on: tuple[str, ...] = ("skips", "bottleneck")
    gradient: bool = True
    deep_supervision: bool = False
    decoder: str | None = None
    head: bool = False
    features: bool = False
    bottleneck: bool = False
    teacher: bool = False
    network: str | None = None

    def __post_init__(self) -> None:
        if self.teacher and self.gradient:
            raise ValueError("A teacher's stream has no gradient: set gradient=False.")
        if self.network is not None and (self.teacher or self.decoder is not None or self.head):
            raise ValueError("A stream of another network has that network's decoder, and no teacher and no head.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; it is a probability, from 0 to below 1.")
        if isinstance(self.dropout_on, str) or not set(self.dropout_on) <= {"skips", "bottleneck", "features"}:
            raise ValueError(f"dropout_on is {self.dropout_on!r}; give a tuple of skips, bottleneck and features.")

    @property
    def kind(self) -> Stream:
        """The stream without what the decoder's pass does not depend on.

        ``torch.compile`` makes a graph for every value that it sees: for each name, and for each probability.
        """
        return replace(self, image="image", dropout=0.0, dropout_on=(), gradient=False)


class StreamOutput(NamedTuple):
    """What a stream returns.

    Attributes:
        logits: (N, C, *spatial), or with deep supervision nnU-Net's list of them, full resolution first.
        features: (N, F, *spatial), the decoder's last features, where the stream asks for them. Without gradient: a
            compiled forward would otherwise make one of zeros for each, as large as they are.
        bottleneck: (N, G, *coarse), the encoder's last features, where the stream asks for them.
        head: the head's outputs by name, where the stream asks for them.

    >>> import torch
    >>> full, half = torch.zeros(1, 2, 8, 8, requires_grad=True), torch.zeros(1, 2, 4, 4)
    >>> output = StreamOutput([full, half])  # of a stream with deep supervision
    >>> output.full_resolution.shape, output.detach().full_resolution.requires_grad
    (torch.Size([1, 2, 8, 8]), False)
    """

    logits: Logits
    features: Tensor | None = None
    bottleneck: Tensor | None = None
    head: Mapping[str, Tensor] | None = None

    @property
    def full_resolution(self) -> Tensor:
        """The logits (N, C, *spatial), with deep supervision or without."""
        return self.logits[0] if isinstance(self.logits, list) else self.logits

    def detach(self) -> StreamOutput:
        """The same values without gradient."""
        return StreamOutput(
            [level.detach() for level in self.logits] if isinstance(self.logits, list) else self.logits.detach(),
            None if self.features is None else self.features.detach(),
            None if self.bottleneck is None else self.bottleneck.detach(),
            None if self.head is None else {name: tensor.detach() for name, tensor in self.head.items()},
        )


class StreamMasks(NamedTuple):
    """Channel dropout of one stream: factors (N, channels, 1, ...), or None where nothing is dropped.

    Attributes:
        levels: one per level of the encoder, full resolution first.
        features: for the decoder's last features.
    """

    levels: list[Tensor | None]
    features: Tensor | None


Masks: TypeAlias = Mapping[str, StreamMasks]


def draw_dropout_masks(channels: Sequence[int], streams: Mapping[str, Stream], images: Mapping[str, Tensor]) -> Masks:
    """Channel dropout for every stream that has it: 0, or 1 / (1 - p), per sample and channel.

    The masks are drawn before the passes, so that both memory modes use the same ones and a compiled forward draws
    nothing.

    Args:
        channels: of the encoder's levels, full resolution first.
        streams: by name.
        images: by name, (N, C, *spatial).
    """

    def draw(stream: Stream, place: str, count: int) -> Tensor | None:
        if place not in stream.dropout_on:
            return None
        image, keep = images[stream.image], 1 - stream.dropout
        return image.new_empty(len(image), count, *[1] * (image.ndim - 2)).bernoulli_(keep) / keep

    return {
        name: StreamMasks(
            [*(draw(stream, "skips", count) for count in channels[:-1]), draw(stream, "bottleneck", channels[-1])],
            draw(stream, "features", channels[0]),
        )
        for name, stream in streams.items()
        if stream.dropout
    }


def drop_channels(skips: Sequence[Tensor], masks: StreamMasks | None) -> list[Tensor]:
    """The encoder's features with a stream's dropout, or as they are."""
    if masks is None:
        return list(skips)
    return [scale_channels(skip, mask) for skip, mask in zip(skips, masks.levels, strict=True)]


def scale_channels(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features times their dropout factors, or as they are."""
    return features if mask is None else features * mask.to(features.dtype)
