"""One of nnU-Net's U-Nets, run in parts: an encoder, decoders of its features, and a head on a decoder's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_ssl.errors import MethodError
from nnunet_ssl.networks.architectures import check_supported
from nnunet_ssl.networks.pointwise import pointwise
from nnunet_ssl.networks.streams import (
    Masks,
    Stream,
    StreamMasks,
    StreamOutput,
    drop_channels,
    scale_channels,
)


class Branch(nn.Module):
    """A U-Net of nnU-Net's, and what only training needs of its kind.

    Args:
        network: the network that nnU-Net built from the plans.
        decoders: more decoders of the same encoder, by name.
        head: called as ``head(image, features)`` with a stream's image and its decoder's last features; returns
            tensors (N, ...) by name.

    Attributes:
        activation_checkpointing: whether passes with gradient keep the outputs of the encoder's stages and of the
            decoders' but the last alone, and compute what is inside of them again for the backward pass. The last
            stage costs the most time and saves little: its activations are needed when memory is at its peak.

    Raises:
        UnsupportedNetworkError: the network is none of nnU-Net's U-Nets.
    """

    activation_checkpointing = False

    def __init__(
        self, network: nn.Module, *, decoders: Mapping[str, nn.Module] | None = None, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        unet = check_supported(network)
        self.encoder = unet.encoder
        self.decoder = unet.decoder
        self.training_only = nn.ModuleDict({f"decoder_{name}": decoder for name, decoder in (decoders or {}).items()})
        if head is not None:
            self.training_only["head"] = head

    def encode(self, image: Tensor) -> list[Tensor]:
        """The encoder's features of an image, full resolution first."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return self.encoder(image)
        skips = []
        stem = getattr(self.encoder, "stem", None)
        features = image if stem is None else _checkpoint(stem, image)
        for stage in self.encoder.stages:
            features = _checkpoint(stage, features)
            skips.append(features)
        return skips

    def encode_stacked(self, images: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """The encoder's features of each image, full resolution first, from one pass of all of them."""
        if not images:
            return {}
        sizes = [len(image) for image in images.values()]
        levels = [_split(level, sizes) for level in self.encode(_cat([*images.values()]))]
        return {name: [level[index] for level in levels] for index, name in enumerate(images)}

    def decode(
        self,
        streams: Mapping[str, Stream],
        images: Mapping[str, Tensor],
        skips: Mapping[str, Sequence[Tensor]],
        masks: Masks,
    ) -> dict[str, StreamOutput]:
        """Streams of one decoder, stacked.

        Args:
            streams: by name; all of the same decoder of this network.
            images: by name.
            skips: by the name of an image, the encoder's features, full resolution first, bottleneck last.
            masks: of :func:`~nnunet_ssl.networks.streams.draw_dropout_masks`.
        """
        # Deep supervision first: the heads of lower resolutions then take the leading rows of the stack.
        names = sorted(streams, key=lambda name: not streams[name].deep_supervision)
        dropped = {name: drop_channels(skips[streams[name].image], masks.get(name)) for name in names}
        sizes = [len(dropped[name][0]) for name in names]
        supervised = sum(size for size, name in zip(sizes, names, strict=True) if streams[name].deep_supervision)
        stacked = [_cat(level) for level in zip(*dropped.values(), strict=True)]

        decoder = self.decoder_of(streams[names[0]])
        again = self.activation_checkpointing and torch.is_grad_enabled()
        coarse, last = _decoder_levels(decoder, stacked, coarse_rows=supervised, checkpointing=again)
        features = [
            scale_channels(part, masks[name].features if name in masks else None)
            for name, part in zip(names, _split(last, sizes), strict=True)
        ]
        full = _split(pointwise(decoder.seg_layers[-1], _cat(features)), sizes)

        outputs: dict[str, StreamOutput] = {}
        first = 0
        for name, logits, part in zip(names, full, features, strict=True):
            stream, rows = streams[name], slice(first, first + len(logits))
            first = rows.stop
            outputs[name] = StreamOutput(
                [logits, *(level[rows] for level in reversed(coarse))] if stream.deep_supervision else logits,
                part.detach() if stream.features else None,
                dropped[name][-1] if stream.bottleneck else None,
                _by_name(self.training_only["head"](images[stream.image], part)) if stream.head else None,
            )
        return outputs

    def stock(self) -> nn.Module:
        """nnU-Net's network again, of the same parts: its state dict has nnU-Net's names."""
        stock = nn.Module()
        stock.encoder, stock.decoder = self.encoder, self.decoder
        return stock

    def decode_alone(
        self, stream: Stream, image: Tensor, skips: Sequence[Tensor], masks: StreamMasks | None
    ) -> StreamOutput:
        """One stream, with :attr:`Stream.kind` in its place: what is compiled of one then serves all of its kind.

        Args:
            stream: the stream's kind.
            image: what the stream names.
            skips: the encoder's features of the image, full resolution first.
            masks: the stream's channel dropout.
        """
        images, name = {stream.image: image}, "alone"
        return self.decode({name: stream}, images, {stream.image: skips}, {} if masks is None else {name: masks})[name]

    def decoder_of(self, stream: Stream) -> UNetDecoder:
        """The decoder that a stream names."""
        return self.decoder if stream.decoder is None else self.training_only[f"decoder_{stream.decoder}"]  # type: ignore[return-value]


def _by_name(made: Any) -> dict[str, Tensor]:
    if not (isinstance(made, dict) and all(isinstance(tensor, Tensor) for tensor in made.values())):
        raise MethodError(
            f"The head returns a value of the type {type(made).__name__}. Return a dictionary of tensors."
        )
    return made


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    # torch.cat copies, a single tensor too.
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _split(tensor: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    # The backward pass of split copies, that of a single part too.
    return [tensor] if len(sizes) == 1 else tensor.split(sizes)


def _checkpoint(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return checkpoint(run, *tensors, use_reentrant=False)


def _decoder_levels(
    decoder: UNetDecoder, skips: Sequence[Tensor], *, coarse_rows: int, checkpointing: bool
) -> tuple[list[Tensor], Tensor]:
    """nnU-Net's decoder up to its last features, and the logits of its lower resolutions, lowest first.

    ``UNetDecoder.forward`` with one difference: the heads of lower resolutions are only run for the first
    ``coarse_rows`` samples, since no other stream has a loss there.
    """
    coarse = []
    x = skips[-1]
    for level, (upsample, stage) in enumerate(zip(decoder.transpconvs, decoder.stages, strict=True)):

        def run(x: Tensor, skip: Tensor, upsample: nn.Module = upsample, stage: nn.Module = stage) -> Tensor:
            return stage(torch.cat((upsample(x), skip), 1))

        last = level == len(decoder.stages) - 1
        skip = skips[-(level + 2)]
        x = _checkpoint(run, x, skip) if checkpointing and not last else run(x, skip)
        if coarse_rows and not last:
            coarse.append(pointwise(decoder.seg_layers[level], x[:coarse_rows]))
    return coarse, x
