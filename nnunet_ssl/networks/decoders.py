"""More decoders, and more networks, of the kind that nnU-Net built."""

from __future__ import annotations

import copy

from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from nnunet_ssl.networks.architectures import UNet
from nnunet_ssl.networks.linear_upsample import LinearUpsample

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def another_network(network: UNet) -> UNet:
    """A network like another, with weights that are drawn apart, as nnU-Net draws them; the other stays as it is.

    >>> from dynamic_network_architectures.architectures.unet import PlainConvUNet
    >>> unet = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, 2, 1)
    >>> other = another_network(unet)
    >>> bool((other.encoder.stages[0][0].convs[0].conv.weight == unet.encoder.stages[0][0].convs[0].conv.weight).any())
    False
    """
    other = copy.deepcopy(network)
    return other.apply(other.initialize)


def another_decoder(decoder: UNetDecoder) -> UNetDecoder:
    """A decoder like another, with weights that are drawn apart; for the same encoder.

    >>> from dynamic_network_architectures.architectures.unet import PlainConvUNet
    >>> unet = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, 2, 1)
    >>> other = another_decoder(unet.decoder)
    >>> bool((other.seg_layers[0].weight == unet.decoder.seg_layers[0].weight).any())
    False
    """
    other = _copied(decoder)
    other.apply(InitWeights_He(1e-2))
    return other


def interpolating_decoder(decoder: UNetDecoder, *, upsampling: str) -> UNetDecoder:
    """A decoder with the stages of another, weights of its own, and interpolation for its transposed convolutions.

    Each transposed convolution becomes interpolation by its stride, whatever that is along each axis, and a 3×3(×3)
    convolution to the same number of channels. **[choice]** Corners are not aligned, so that a voxel's center keeps its
    place.

    Args:
        decoder: nnU-Net's decoder, which stays as it is.
        upsampling: ``linear`` or ``nearest``.

    >>> from dynamic_network_architectures.architectures.unet import PlainConvUNet
    >>> unet = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, 2, 1)
    >>> interpolating_decoder(unet.decoder, upsampling="nearest").transpconvs[0][0]
    Upsample(scale_factor=(2.0, 2.0), mode='nearest')
    """
    mode = {"linear": _LINEAR[len(decoder.transpconvs[0].kernel_size)], "nearest": "nearest"}[upsampling]  # type: ignore[arg-type]
    convolution = decoder.encoder.conv_op
    other = _copied(decoder)
    upsample = LinearUpsample if upsampling == "linear" else nn.Upsample
    for level, transposed in enumerate(decoder.transpconvs):
        other.transpconvs[level] = nn.Sequential(
            upsample(scale_factor=tuple(map(float, transposed.stride)), mode=mode),  # type: ignore[arg-type]
            convolution(
                transposed.in_channels,
                transposed.out_channels,
                kernel_size=3,
                padding=1,
                bias=transposed.bias is not None,
            ),
        )
    # As nnU-Net draws the weights of its own decoder.
    other.apply(InitWeights_He(1e-2))
    return other


def _copied(decoder: UNetDecoder) -> UNetDecoder:
    # nnU-Net's decoder holds the encoder, which is not to be copied.
    encoder = decoder.encoder
    decoder.encoder = None
    other = copy.deepcopy(decoder)
    decoder.encoder = encoder
    # Only its parts are run, the heads of lower resolutions where a loss wants them.
    other.deep_supervision = False
    return other
