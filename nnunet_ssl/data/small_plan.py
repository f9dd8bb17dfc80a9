"""Configurations that a computer without a GPU can train: a smaller patch, and a smaller network."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.text import shorten

CHANNELS = (8, 16, 32, 64)
"""Of each stage. nnU-Net's begin with 32."""

LARGEST_PATCH = {2: 128**2, 3: 32**3}
"""Pixels or voxels of a patch, by dimension. With the batch, a step then costs about the same in 2D and in 3D."""

LARGEST_BATCH = {2: 12, 3: 2}
"""Patches in a batch, by dimension."""


def small_configuration(name: str, parent: Mapping[str, Any]) -> dict[str, Any]:
    """The small version of a configuration.

    Args:
        name: of the parent.
        parent: a configuration of nnU-Net's plans, resolved.

    Returns:
        What plans say of it: it inherits from the parent, and so it shares the parent's preprocessed data.

    Raises:
        UserError: the architecture is not described as nnU-Net describes its U-Nets.
    """
    patch: Sequence[int] = parent["patch_size"]
    dim = len(patch)
    factor = min(1.0, (LARGEST_PATCH[dim] / math.prod(patch)) ** (1 / dim))
    made = inheriting(
        name,
        parent,
        patch_size=[length * factor for length in patch],
        batch_size=min(LARGEST_BATCH[dim], parent["batch_size"]),
        channels=CHANNELS,
    )
    if parent.get("next_stage"):
        made["next_stage"] = None  # or nnU-Net would predict the training cases for it after each training
    return made


def inheriting(
    name: str, parent: Mapping[str, Any], *, patch_size: Sequence[float], batch_size: int, channels: Sequence[int]
) -> dict[str, Any]:
    """A configuration with the first stages of its parent's network, each with two convolutions.

    Args:
        name: of the parent.
        parent: a configuration of nnU-Net's plans, resolved.
        patch_size: the largest wanted, voxels; each axis is rounded down to what the strides divide.
        batch_size: patches.
        channels: of at most so many stages. A stage never has more than the parent's.

    Raises:
        UserError: see :func:`small_configuration`.
    """
    architecture = copy.deepcopy(dict(parent["architecture"]))
    options = architecture["arch_kwargs"]
    for key in ("strides", "kernel_sizes"):
        if not isinstance(options.get(key), list) or not all(isinstance(one, (list, tuple)) for one in options[key]):
            raise UserError(
                f"The architecture of configuration {name} has {key} = {shorten(options.get(key))}; one list per stage "
                "is needed, as nnU-Net's planners write it."
            )
    stages = min(len(channels), len(options["strides"]))
    strides = options["strides"][:stages]
    widest = options.get("features_per_stage", channels)
    options |= {
        "n_stages": stages,
        "features_per_stage": [min(pair) for pair in zip(channels, widest, strict=False)][:stages],
        "kernel_sizes": options["kernel_sizes"][:stages],
        "strides": strides,
    }
    if "n_blocks_per_stage" in options:  # a residual block has two convolutions
        options |= {"n_blocks_per_stage": [1] * stages, "n_conv_per_stage_decoder": [1] * (stages - 1)}
    else:
        options |= {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
    divisors = [math.prod(axis) for axis in zip(*strides, strict=True)]
    return {
        "inherits_from": name,
        "patch_size": [
            max(1, int(length / divisor)) * divisor for length, divisor in zip(patch_size, divisors, strict=True)
        ],
        "batch_size": batch_size,
        "architecture": architecture,
    }
