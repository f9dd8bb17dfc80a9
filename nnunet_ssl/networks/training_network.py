"""nnU-Net's U-Net as training sees it: encoder and decoder apart, many decoder passes in one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

Output: TypeAlias = Any
"""Logits (N, C, *spatial), or with deep supervision nnU-Net's list of them, full resolution first."""

Masks: TypeAlias = Mapping[str, list[Tensor]]
"""Per stream with dropout: one mask (N, C, 1, ...) per level of the encoder, full resolution first."""


@dataclass(frozen=True)
class Stream:
    """One pass of the decoder.

    Attributes:
        image: name of the image whose features are decoded. Streams of one image share its pass of the encoder.
        dropout: probability with which a channel of a skip or of the bottleneck is dropped for this stream.
        gradient: whether a loss is taken of this stream. Without, it runs without gradient.
        deep_supervision: whether it puts out all of nnU-Net's resolutions or the full one alone.
    """

    image: str
    dropout: float = 0.0
    gradient: bool = True
    deep_supervision: bool = False


class TrainingNetwork(nn.Module):
    """nnU-Net's own encoder and decoder, under their own names: its state dict is the stock network's.

    Called with one tensor it is the stock network, for nnU-Net's validation. Called with images and streams it runs
    all streams of a training step at once, so that a DDP wrapper and ``torch.compile`` see one forward.

    Args:
        network: the network that nnU-Net built from the plans.

    Raises:
        NotImplementedError: the network is none of nnU-Net's U-Nets.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        supported = (PlainConvUNet, ResidualEncoderUNet)
        if not isinstance(network, supported):
            raise NotImplementedError(
                f"Semi-supervised training needs a network with an encoder and a decoder that it can run apart. The "
                f"plans ask for {type(network).__name__}; supported are "
                f"{' and '.join(architecture.__name__ for architecture in supported)}."
            )
        self.encoder = network.encoder
        self.decoder = network.decoder

    def forward(
        self,
        images: Tensor | Mapping[str, Tensor],
        streams: Mapping[str, Stream] | None = None,
        masks: Masks | None = None,
    ) -> Output | dict[str, Output]:
        """The stock forward of one tensor (N, C, *spatial), or all streams of a step.

        Args:
            images: a tensor, or tensors by name whose sizes differ in N at most.
            streams: the passes of the decoder, by name.
            masks: of :func:`draw_dropout_masks`.

        Returns:
            What nnU-Net's network returns, or the output of each stream by name.
        """
        if streams is None:
            return self.decoder(self.encoder(images))
        assert isinstance(images, Mapping) and masks is not None
        skips = self.encoder(torch.cat([*images.values()]))
        sizes = [len(image) for image in images.values()]
        levels = [dict(zip(images, skip.split(sizes), strict=True)) for skip in skips]

        def features(name: str) -> list[Tensor]:
            return drop_channels([level[streams[name].image] for level in levels], masks.get(name))

        # Deep supervision first: its coarse heads then take the leading rows of the stack.
        with_gradient = sorted(
            (name for name in streams if streams[name].gradient), key=lambda name: not streams[name].deep_supervision
        )
        parts = [features(name) for name in with_gradient]
        sizes = [len(part[0]) for part in parts]
        supervised = sum(s for s, name in zip(sizes, with_gradient, strict=True) if streams[name].deep_supervision)
        stacked = [torch.cat(level) for level in zip(*parts, strict=True)]
        *coarse, full = self._decode_levels(stacked, coarse_rows=supervised)
        outputs: dict[str, Output] = {}
        for index, (name, logits) in enumerate(zip(with_gradient, full.split(sizes), strict=True)):
            if streams[name].deep_supervision:
                first = sum(sizes[:index])
                lower = [level[first : first + sizes[index]] for level in reversed(coarse)]
                outputs[name] = [logits, *lower]
            else:
                outputs[name] = logits
        with torch.no_grad():
            for name in streams:
                if not streams[name].gradient:
                    detached = [skip.detach() for skip in features(name)]
                    outputs[name] = self.decode(detached, deep_supervision=streams[name].deep_supervision)
        return outputs

    def decode(self, skips: Sequence[Tensor], *, deep_supervision: bool) -> Output:
        """One pass of nnU-Net's decoder.

        Args:
            skips: the encoder's features, full resolution first, bottleneck last.
            deep_supervision: put out all resolutions, full one first, instead of the full one alone.
        """
        *coarse, full = self._decode_levels(skips, coarse_rows=len(skips[0]) if deep_supervision else 0)
        return [full, *reversed(coarse)] if deep_supervision else full

    def _decode_levels(self, skips: Sequence[Tensor], *, coarse_rows: int) -> list[Tensor]:
        # UNetDecoder.forward with one difference: the heads of the lower resolutions are only run for the first
        # `coarse_rows` samples, since no other stream has a loss there.
        outputs = []
        x = skips[-1]
        parts = zip(self.decoder.transpconvs, self.decoder.stages, self.decoder.seg_layers, strict=True)
        for level, (upsample, stage, head) in enumerate(parts):
            x = stage(torch.cat((upsample(x), skips[-(level + 2)]), 1))
            if level == len(self.decoder.stages) - 1:
                outputs.append(head(x))
            elif coarse_rows:
                outputs.append(head(x[:coarse_rows]))
        return outputs


def draw_dropout_masks(network: TrainingNetwork, streams: Mapping[str, Stream], images: Mapping[str, Tensor]) -> Masks:
    """Channel dropout for every stream that has it: 0, or 1 / (1 - p), per sample, channel and level.

    The masks are drawn before the passes, so that both memory modes use the same ones and a compiled forward draws
    nothing.
    """
    masks: dict[str, list[Tensor]] = {}
    for name, stream in streams.items():
        if stream.dropout:
            image = images[stream.image]
            keep = 1 - stream.dropout
            masks[name] = [
                image.new_empty(len(image), channels, *[1] * (image.ndim - 2)).bernoulli_(keep) / keep
                for channels in network.encoder.output_channels
            ]
    return masks


def drop_channels(skips: Sequence[Tensor], masks: Sequence[Tensor] | None) -> list[Tensor]:
    """Features with a dropout mask on every level, or as they are."""
    if masks is None:
        return list(skips)
    return [skip * mask.to(skip.dtype) for skip, mask in zip(skips, masks, strict=True)]
