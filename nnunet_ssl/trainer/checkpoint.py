"""The checkpoint of a training: what goes into it, and which ones a training can go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nnunet_ssl
from nnunet_ssl.errors import UserError
from nnunet_ssl.networks.checkpoints import NotPlainError, differences, read_checkpoint, write_checkpoint
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.settings import PLANS_KEY, SemiSupervisedSettings

CHECKPOINT_KEY = "ssl"
"""The entry of this package in nnU-Net's checkpoint."""

_START_FROM_WEIGHTS = (
    "To start from the weights of this checkpoint, use -pretrained_weights and not --c, which goes on with trainings "
    "of semi-supervised trainers only."
)


def own_entry(network: TrainingNetwork, settings: SemiSupervisedSettings) -> dict[str, Any]:
    """The entry :data:`CHECKPOINT_KEY`: plain values and tensors."""
    return {"version": nnunet_ssl.__version__, "settings": settings.as_dict(), "network": network.training_state()}


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
            f"The checkpoint {file} could not be written ({error}); {free:.0f} MiB are free there. What was in its "
            f"place before is untouched. Make room, then go on with --c."
        ) from error


def best_so_far(values: Sequence[float]) -> float | None:
    """nnU-Net's best value, of the epochs' values.

    nnU-Net writes checkpoint_latest before it compares the epoch's value with the best one. Continued from there, it
    would take the next epoch for the best.
    """
    return max((float(value) for value in values if np.isfinite(value)), default=None)


def plain(value: Any) -> Any:
    """The value without NumPy's scalars, which make a checkpoint unreadable with weights_only."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def read_to_continue(checkpoint: dict[str, Any] | str, device: torch.device) -> tuple[dict[str, Any], str]:
    """A checkpoint to go on from, and what to call it in a message.

    Args:
        checkpoint: read already, or its file.
        device: for its tensors.

    Raises:
        UserError: it holds more than tensors and plain values, is damaged, or is of no semi-supervised trainer.
    """
    named = "The checkpoint"
    if not isinstance(checkpoint, dict):
        named = f"The checkpoint {checkpoint}"
        checkpoint = _read(Path(checkpoint), device)
    if CHECKPOINT_KEY not in checkpoint:
        raise UserError(f"{_START_FROM_WEIGHTS} {named} was written by {checkpoint.get('trainer_name')}.")
    return checkpoint, named


def _read(file: Path, device: torch.device) -> dict[str, Any]:
    try:
        return read_checkpoint(file, device)
    except NotPlainError as error:
        raise UserError(f"{_START_FROM_WEIGHTS} {error}") from None
    except UserError as error:
        raise UserError(
            f"{error} Move it away; --c takes the first that is there of checkpoint_final.pth, checkpoint_latest.pth "
            "and checkpoint_best.pth."
        ) from None


def load_networks(
    network: TrainingNetwork,
    checkpoint: Mapping[str, Any],
    named: str,
    *,
    trainer_name: str,
    settings: SemiSupervisedSettings,
    trained_with: Mapping[str, str],
    log: Callable[[str], None],
) -> None:
    """Load a checkpoint's networks, if they are those of this training; changed settings are logged.

    Args:
        network: to load them into.
        checkpoint: of :func:`read_to_continue`.
        named: what it is called in a message.
        trainer_name: of this training.
        settings: of this training.
        trained_with: ``dataset_name``, ``plans_name`` and ``configuration`` of this training.
        log: writes a line to nnU-Net's log file.

    Raises:
        UserError: they are of another network, trainer or settings; the text names what differs and what to do.
    """
    writer, ours = checkpoint["trainer_name"], checkpoint[CHECKPOINT_KEY]
    if unlike := differences(checkpoint["network_weights"], network.state_dict()):
        raise UserError(
            "Continue with the plans and the dataset.json of the checkpoint; or train without --c, with "
            f"-pretrained_weights if only the outputs differ. {named} is of another network: "
            f"{'; '.join([*unlike, *_other_plans(checkpoint['init_args'], trained_with)])}."
        )
    before = ours["settings"]
    changed = {name: value for name, value in settings.as_dict().items() if before.get(name) != value}
    for setting, value in changed.items():
        log(f"Setting {setting} was {before.get(setting)!r} in the checkpoint, is {value!r} now")
    network.load_state_dict(checkpoint["network_weights"])
    try:
        network.load_training_state(ours.get("network", {}))
    except (KeyError, ValueError) as error:
        again = ", ".join(f'"{setting}": {json.dumps(before[setting])}' for setting in changed if setting in before)
        if writer != trainer_name:
            advice = f"Continue with -tr {writer}, or start from its weights with -pretrained_weights and not --c."
        elif again:
            advice = f'Continue with the settings of the checkpoint: "{PLANS_KEY}": {{{again}}} in the plans.'
        else:
            advice = f"Continue with nnunet_ssl {ours.get('version')}, which wrote the checkpoint."
        raise UserError(
            f"{advice} {named}, of {writer}, does not hold what {trainer_name} trains with its settings: "
            f"{error.args[0]}."
        ) from None


def _other_plans(init_args: Mapping[str, Any], trained_with: Mapping[str, str]) -> list[str]:
    """Where a checkpoint was trained, if elsewhere."""
    there = {**init_args.get("plans", {}), "configuration": init_args.get("configuration")}
    return [
        f"{name} {there.get(name)} there, {here} here" for name, here in trained_with.items() if there.get(name) != here
    ]
