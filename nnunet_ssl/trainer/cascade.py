"""The second stage of a cascade: what its first stage makes of the unlabeled cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn

from nnunet_ssl.data.prepare import UnlabeledSource
from nnunet_ssl.data.previous_stage import PreviousStage
from nnunet_ssl.data.unlabeled_cases import UnlabeledCase
from nnunet_ssl.distributed import Ranks
from nnunet_ssl.errors import UserError
from nnunet_ssl.networks.architectures import build_unet
from nnunet_ssl.networks.checkpoints import differences, read_checkpoint


def segmented_by_previous_stage(
    cases: Sequence[UnlabeledCase],
    source: UnlabeledSource,
    stage: PreviousStage,
    labeled_cases: Sequence[str],
    build: Callable[..., nn.Module],
    device: torch.device,
    *,
    ranks: Ranks,
    log: Callable[..., None],
) -> Path:
    """The folder of the first stage's segmentations of the unlabeled cases, complete.

    Args:
        cases: preprocessed for the stage that is trained.
        source: where they come from.
        stage: the first stage.
        labeled_cases: of the fold, for training and validation.
        build: the trainer class's ``build_network_architecture``.
        device: to predict on.
        ranks: this process among those that train together; each predicts a part.
        log: nnU-Net's print_to_log_file.

    Raises:
        UserError: the first stage is not trained, has not validated all labeled cases, or is of another network.
    """
    checkpoint_file = stage.checkpoint(source, labeled_cases)
    network, checkpoint = _trained_network(checkpoint_file, source, stage, build)
    # After all that may be refused: it can take hours.
    if ranks.first:
        source.preprocess(stage.configuration, log)
    ranks.wait()
    folder = stage.segment(
        cases[ranks.rank :: ranks.count],
        source,
        checkpoint_file,
        network=network.to(device).eval(),
        mirroring_axes=checkpoint["inference_allowed_mirroring_axes"],
        log=log,
    )
    ranks.wait()
    return folder


def _trained_network(
    file: Path, source: UnlabeledSource, stage: PreviousStage, build: Callable[..., nn.Module]
) -> tuple[nn.Module, dict[str, Any]]:
    plans, to_do = source.plans_manager, stage.to_do(source)
    manager = plans.get_configuration(stage.configuration)
    channels = determine_num_input_channels(plans, manager, source.dataset_json)
    heads = plans.get_label_manager(source.dataset_json).num_segmentation_heads
    network = build_unet(build, plans, manager, channels, heads, False)
    try:
        checkpoint = read_checkpoint(file)
    except UserError as error:
        raise UserError(f"{to_do} {error}") from None
    if unlike := differences(checkpoint["network_weights"], network.state_dict()):
        raise UserError(f"{to_do} {file} is of another network: {'; '.join(unlike)}.")
    network.load_state_dict(checkpoint["network_weights"])
    return network, checkpoint
