"""The checkpoint of a training: what goes into it, and which ones a training can go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnunet_ssl
from nnunet_ssl.errors import UserError
from nnunet_ssl.networks.checkpoints import NotPlainError, differences, read_checkpoint, write_checkpoint
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.settings import PLANS_KEY, SemiSupervisedSettings
from nnunet_ssl.text import unwrap

CHECKPOINT_KEY = "ssl"
"""The entry of this package in nnU-Net's checkpoint."""

_START_FROM_WEIGHTS = (
    "To start from the weights of this checkpoint, use -pretrained_weights. --c continues only trainings of "
    "semi-supervised trainers."
)


def learned(
    network: TrainingNetwork, optimizer: torch.optim.Optimizer, grad_scaler: Any, settings: SemiSupervisedSettings
) -> dict[str, Any]:
    """The entries of a checkpoint that hold what was learned; the package's own one is :data:`CHECKPOINT_KEY`.

    ``network_weights`` are those of nnU-Net's own network under its own names, so that stock nnU-Net predicts with the
    file once its trainer name is changed. All is tensors and plain values.
    """
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": grad_scaler.state_dict() if grad_scaler is not None else None,
        CHECKPOINT_KEY: {
            "version": nnunet_ssl.__version__,
            "settings": settings.as_dict(),
            "network": network.training_state(),
        },
    }


def logged(logger: Any, next_epoch: int) -> dict[str, Any]:
    """The entries of a checkpoint that hold the log of the epochs before ``next_epoch``; ``logger`` is nnU-Net's."""
    return {
        "logging": {key: _plain(values[:next_epoch]) for key, values in logger.get_checkpoint().items()},
        "_best_ema": best_so_far(logger.get_value("ema_fg_dice", step=None)),
        "current_epoch": next_epoch,
    }


def write_durably(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint; a kill or a power cut leaves the old file or the new one, whole.

    Raises:
        RuntimeError: it cannot be written; what was in its place before is untouched.
    """
    try:
        # Aside under one name, so that what a kill leaves there is overwritten by the next.
        write_checkpoint(checkpoint, file, aside=file.with_name(f"{file.name}.partial"), durable=True)
    except OSError as error:
        free = shutil.disk_usage(file.parent).free / 2**20 if file.parent.is_dir() else 0
        raise RuntimeError(
            f"The checkpoint {file} could not be written ({error}); {free:.0f} MiB are free there. The previous file "
            "is intact. Free some space, then continue with --c."
        ) from error


def best_so_far(values: Sequence[float]) -> float | None:
    """nnU-Net's best value, of the epochs' values; None where none has ended yet.

    nnU-Net writes checkpoint_latest before it compares the epoch's value with the best one. Continued from there, it
    would take the next epoch for the best.
    """
    return max((float(value) for value in values if np.isfinite(value)), default=None)


def _plain(value: Any) -> Any:
    """The value without NumPy's scalars, which make a checkpoint unreadable with weights_only."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def continue_from(
    checkpoint: dict[str, Any] | str,
    network: TrainingNetwork,
    optimizer: torch.optim.Optimizer,
    grad_scaler: Any,
    settings: SemiSupervisedSettings,
    *,
    trainer_name: str,
    here: Mapping[str, Any],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Restore :func:`learned` of a checkpoint of a training like this one; changed settings are logged.

    Args:
        checkpoint: read already, or its file.
        network: of this training, like all that follow.
        optimizer: nnU-Net's.
        grad_scaler: nnU-Net's, or None.
        settings: of the method.
        trainer_name: of its class.
        here: nnU-Net's plans, and ``configuration``, ``dataset_json`` and ``num_epochs`` of this training.
        log: writes a line to nnU-Net's log file.

    Returns:
        The checkpoint.

    Raises:
        UserError: it holds more than tensors and plain values, is damaged, is of no semi-supervised trainer, or is of
            another network, trainer or settings; the text names what differs and what to do.
    """
    named = "The checkpoint"
    if not isinstance(checkpoint, dict):
        named = f"The checkpoint {checkpoint}"
        checkpoint = _read(Path(checkpoint), next(network.parameters()).device)
    if CHECKPOINT_KEY not in checkpoint:
        raise UserError(f"{_START_FROM_WEIGHTS} {named} was written by {checkpoint.get('trainer_name')}.")
    if unlike := differences(checkpoint["network_weights"], network.state_dict()):
        raise UserError(
            "Continue with the plans and the dataset.json of the checkpoint; or train without --c, with "
            f"-pretrained_weights if only the outputs differ. {named} is of another network: "
            f"{'; '.join([*unlike, *_other_plans(checkpoint['init_args'], here)])}."
        )
    writer, before = checkpoint["trainer_name"], checkpoint[CHECKPOINT_KEY]["settings"]
    changed = {name: value for name, value in settings.as_dict().items() if before.get(name) != value}
    for setting, value in changed.items():
        log(f"Setting {setting} was {before.get(setting)!r} in the checkpoint, is {value!r} now")
    _load_networks(network, checkpoint, named, trainer_name, changed)
    if other := _other_plans(checkpoint["init_args"], here):
        log(f"WARNING: The checkpoint was trained with other plans: {'; '.join(other)}")
    if other := _other_classes(checkpoint["init_args"], here):
        log(f"WARNING: The checkpoint was trained with other classes: {'; '.join(other)}")
    if writer != trainer_name:
        done = checkpoint["current_epoch"]
        log(f"The checkpoint is from {writer}, after {done} epochs; {trainer_name} has {here['num_epochs']}")
    optimizer.load_state_dict(checkpoint["optimizer_state"])
    if grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
        grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
    return checkpoint


def _read(file: Path, device: torch.device) -> dict[str, Any]:
    try:
        return read_checkpoint(file, device)
    except NotPlainError as error:
        raise UserError(f"{_START_FROM_WEIGHTS} {error}") from None
    except UserError as error:
        raise UserError(
            f"{error} Move it away; --c uses the first that exists of checkpoint_final.pth, checkpoint_latest.pth "
            "and checkpoint_best.pth."
        ) from None


def _load_networks(
    network: TrainingNetwork, checkpoint: Mapping[str, Any], named: str, trainer_name: str, changed: Mapping[str, Any]
) -> None:
    """Load a checkpoint's networks; ``changed`` are the settings of this training that were others there."""
    writer, ours = checkpoint["trainer_name"], checkpoint[CHECKPOINT_KEY]
    network.load_state_dict(checkpoint["network_weights"])
    try:
        network.load_training_state(ours.get("network", {}))
    except (KeyError, ValueError) as error:
        before = ours["settings"]
        again = ", ".join(f'"{setting}": {json.dumps(before[setting])}' for setting in changed if setting in before)
        if writer != trainer_name:
            advice = f"Continue with -tr {writer}, or start from its weights with -pretrained_weights and not --c."
        elif again:
            advice = f'Continue with the settings of the checkpoint: "{PLANS_KEY}": {{{again}}} in the plans.'
        else:
            advice = f"Continue with nnunet_ssl {ours.get('version')}, which wrote the checkpoint."
        raise UserError(
            f"{advice} {named}, of {writer}, does not contain what {trainer_name} trains with its settings: "
            f"{error.args[0]}."
        ) from None


def _other_plans(init_args: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In what a checkpoint's plans are unlike these, but for the settings, which are compared by themselves."""
    there = {**init_args.get("plans", {}), "configuration": init_args.get("configuration")}
    theirs, ours = _described(there), _described(here)
    return [
        f"{name} {unwrap(theirs.get(name), 80)} there, {unwrap(value, 80)} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]


def _other_classes(init_args: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Which classes a checkpoint's dataset.json has under other numbers; its network may have as many outputs."""
    theirs, ours = (one.get("dataset_json", {}).get("labels", {}) for one in (init_args, here))
    return [
        f"{name} {theirs.get(name, 'not')} there, {ours.get(name, 'not')} here"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    ]


def _described(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Names, and what images and patches are made with; the names alone of plans that cannot be read."""
    described = {name: plans.get(name) for name in ("dataset_name", "plans_name", "configuration")}
    with suppress(Exception):
        described |= PlansManager(dict(plans)).get_configuration(described["configuration"]).configuration
    ignored = (PLANS_KEY, "inherits_from", "architecture")
    return {name: value for name, value in described.items() if name not in ignored}
