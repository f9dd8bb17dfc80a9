"""Which networks can be trained here, and what plans may name."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ssl.errors import UserError

UNet: TypeAlias = PlainConvUNet | ResidualEncoderUNet
"""The networks of nnU-Net that can be trained here."""

SUPPORTED = {architecture.__name__: architecture for architecture in (PlainConvUNet, ResidualEncoderUNet)}
"""Their classes, by name."""

PRETRAIN_INFO = "pretrain_info"
"""Where nnU-Net's nnUNetv2_preprocess_like_nnssl, after version 2.8.1, notes the pretrained weights in its plans."""

PRETRAINED_ELSEWHERE = (
    "The plans {plans} name pretrained weights, in 'pretrain_info'. nnUNetv2_train does not load them: make a file of "
    "them with nnunet-ssl adapt -p {plans}, and start with -pretrained_weights."
)

_HOMES_OF_LAYERS = ("torch.nn.", "dynamic_network_architectures.")


def build_unet(
    build: Callable[..., nn.Module],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
) -> UNet:
    """Build a trainer's network, if plans and trainer make one that can be trained here.

    Args:
        build: the trainer class's ``build_network_architecture``.
        plans_manager: the arguments of ``build`` from here on are nnU-Net's own.
        configuration_manager: see ``plans_manager``.
        num_input_channels: see ``plans_manager``.
        num_output_channels: see ``plans_manager``.
        enable_deep_supervision: see ``plans_manager``.

    Raises:
        UserError: see :func:`check_architecture`.
        UnsupportedNetworkError: the network is none of nnU-Net's U-Nets.
        NotImplementedError: ``build`` has nnU-Net's old signature.
    """
    check_architecture(configuration_manager)
    if "plans_manager" not in inspect.signature(build).parameters:
        raise NotImplementedError(
            f"{build.__qualname__} has nnU-Net's old signature. Change it to (plans_manager, configuration_manager, "
            f"num_input_channels, num_output_channels, enable_deep_supervision)."
        )
    try:
        network = build(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
    except TypeError as error:
        # nnU-Net builds what the plans name with deep supervision, which others than its U-Nets do not know.
        named = configuration_manager.network_arch_class_name.rsplit(".", 1)[-1]
        if named in SUPPORTED:
            raise
        raise unsupported(named) from error
    return check_supported(network)


def check_network(
    build: Callable[..., nn.Module],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict[str, Any],
    log: Callable[[str], object],
) -> None:
    """Refuse plans and trainer whose network cannot be trained here, without memory for it.

    A network that cannot be built without memory is not refused here.

    Args:
        build: see :func:`build_unet`.
        plans_manager: see :func:`build_unet`.
        configuration_manager: see :func:`build_unet`.
        dataset_json: the dataset's.
        log: is told if the plans name pretrained weights, which nnUNetv2_train does not load.

    Raises:
        UserError, NotImplementedError: see :func:`build_unet`.
    """
    if PRETRAIN_INFO in plans_manager.plans:
        log(PRETRAINED_ELSEWHERE.format(plans=plans_manager.plans_name))
    channels = determine_num_input_channels(plans_manager, configuration_manager, dataset_json)
    heads = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
    try:
        with torch.device("meta"):
            build_unet(build, plans_manager, configuration_manager, channels, heads)
    except (UserError, NotImplementedError):
        raise
    except Exception:
        return  # it is built once more, for training, and then says what is wrong


def check_supported(network: nn.Module) -> UNet:
    """The network, if it has an encoder and a decoder that can be run apart.

    Raises:
        UnsupportedNetworkError: it is none of nnU-Net's U-Nets.
    """
    if isinstance(network, tuple(SUPPORTED.values())):
        return network
    raise unsupported(type(network).__name__)


def check_architecture(configuration: ConfigurationManager) -> None:
    """Refuse plans that name anything but networks and layers, before a network is built from them.

    nnU-Net looks these names up in all of Python and calls what it finds: in a plans file from elsewhere,
    ``"nonlin": "os.system"`` would be a command.

    Raises:
        UserError: a name is none of a network or layer of PyTorch or of dynamic_network_architectures.
    """
    options = configuration.network_arch_init_kwargs
    named = {name: options.get(name) for name in configuration.network_arch_init_kwargs_req_import}
    for entry, name in {"network_class_name": configuration.network_arch_class_name, **named}.items():
        if name is not None and not _is_layer(name):
            raise UserError(
                f"The plans' architecture has {entry} = {name!r}, which is not a network or layer of "
                "torch.nn or dynamic_network_architectures. nnU-Net would import and call it, whatever it "
                "is. If the plans are from someone else, do not use them (SECURITY.md)."
            )


def _is_layer(name: object) -> bool:
    if not isinstance(name, str) or not name.startswith(_HOMES_OF_LAYERS):
        return False
    # A path through modules can lead out of the package again, to what one of them imports.
    found = pydoc.locate(name)
    if found is None:
        return True  # nnU-Net then looks for it in dynamic_network_architectures
    return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(_HOMES_OF_LAYERS)


class UnsupportedNetworkError(UserError, NotImplementedError):
    """The trainer and its plans make a network that is none of nnU-Net's U-Nets."""


def unsupported(architecture: str) -> UnsupportedNetworkError:
    """What to raise for an architecture that is none of nnU-Net's U-Nets."""
    return UnsupportedNetworkError(
        "Semi-supervised training needs a network whose encoder and decoder can run separately. The trainer and its "
        f"plans make a {architecture}. Supported are {' and '.join(SUPPORTED)}."
    )
