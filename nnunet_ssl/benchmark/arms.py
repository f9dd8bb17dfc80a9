"""The arms of a campaign: trainers, or trainers with settings."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.settings import PLANS_KEY
from nnunet_ssl.text import unwrap

BASELINE = "nnUNetTrainer"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as the user gave it: a trainer, or ``TRAINER:NAME=VALUE,NAME=VALUE``.
        trainer: its class name.
        settings: added to the configuration as ``semi_supervised``.
    """

    name: str
    trainer: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def parse_arms(texts: Sequence[str], common: Sequence[str]) -> list[Arm]:
    """Arms from the command line.

    Args:
        texts: each a trainer, or ``TRAINER:NAME=VALUE,NAME=VALUE``.
        common: ``NAME=VALUE``, settings of every arm with a semi-supervised trainer.

    Raises:
        UserError: nnU-Net finds no such trainer, an arm is named twice, or a setting is unknown or out of range.
    """
    shared = _parse_settings(common, "--settings")
    arms: dict[str, Arm] = {}
    for text in dict.fromkeys(texts):
        trainer, colon, rest = text.partition(":")
        own = _parse_settings(rest.split(","), f"-tr {text}") if colon else {}
        settings_class = getattr(find_trainer(trainer), "settings_class", None)
        if own and settings_class is None:
            raise UserError(f"-tr {text}: {trainer} has no settings; only semi-supervised trainers have.")
        settings = {} if settings_class is None else {**shared, **own}
        try:
            if settings_class is not None:
                settings_class.from_plans({PLANS_KEY: settings})
        except UserError as error:
            raise UserError(f"-tr {text}: {error}") from None
        name = trainer + (":" + ",".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
                          if settings else "")  # fmt: skip
        arms[name] = Arm(name, trainer, settings)
    return list(arms.values())


def _parse_settings(texts: Sequence[str], option: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UserError(f"{option}: {text!r} is no setting; give NAME=VALUE, such as ramp_length=0.2.")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def find_trainer(name: str) -> type[Any]:
    """A trainer by its name, as nnU-Net finds it.

    Raises:
        UserError: it finds none.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except Exception as error:
        raise UserError(
            f"nnU-Net does not find the trainer {name} ({unwrap(error)}). nnunet-ssl trainers --list names this "
            "package's; a folder of your own is named by nnUNet_extTrainer."
        ) from None


def plans_of_arm(plans: Mapping[str, Any], configuration: str, arm: Arm) -> tuple[dict[str, Any], str]:
    """The plans with a configuration that has the arm's settings, and its name, which is the given one without any."""
    changed = copy.deepcopy(dict(plans))
    if not arm.settings:
        return changed, configuration
    # What a configuration inherits is replaced as a whole.
    inherited: Any = None
    parent: Any = configuration
    while inherited is None and parent is not None:
        inherited = plans["configurations"][parent].get(PLANS_KEY)
        parent = plans["configurations"][parent].get("inherits_from")
    settings = {**(inherited or {}), **arm.settings}
    written = "_".join(f"{name}_{value}" for name, value in arm.settings.items())
    name = f"{configuration}_{re.sub(r'[^0-9A-Za-z_.-]+', '_', written)}"
    changed["configurations"][name] = {"inherits_from": configuration, PLANS_KEY: settings}
    return changed, name
