"""The arms of a campaign: trainers, also with settings, after a start by nnUNetTrainer, or as teachers of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.settings import PLANS_KEY
from nnunet_ssl.text import did_you_mean
from nnunet_ssl.trainer_lookup import find_trainer

BASELINE = "nnUNetTrainer"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as the user gave it: a trainer, ``TRAINER:NAME=VALUE,NAME=VALUE``, ``TRAINER@warm=SHARE`` or
            ``TRAINER@self-train=ROUNDS``, also these with settings.
        trainer: its class name.
        settings: added to the configuration as ``semi_supervised``.
        warm: share of the length that nnUNetTrainer trains first; 0: none.
        rounds: of self-training, in which nnUNetTrainer learns from what two trainings of the trainer agree on.
    """

    name: str
    trainer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    warm: float = 0.0
    rounds: int = 0


def short_name(arm: str) -> str:
    """An arm's name for a figure: CrossMatch for CrossMatchTrainer; nnU-Net's own trainers keep theirs."""
    return arm if arm.startswith(BASELINE) else re.sub(r"^(\w+?)Trainer(?![a-zA-Z0-9])", r"\1", arm)


@dataclass(frozen=True)
class Stage:
    """A part of a training, which ends as a training of its own. After a warm start, its weights go on.

    Attributes:
        arm: what trains.
        epochs: its length.
        plans: added to the plans' name, so that nnU-Net gives the stage a folder of its own.
        round: of self-training: 0 with the labels that there are, then with the pseudo-labels of the round before.
        fold: of self-training, whose two folds have the same cases; None: the training's own fold.
    """

    arm: Arm
    epochs: int
    plans: str = ""
    round: int = 0
    fold: int | None = None


def stages(arm: Arm, epochs: int) -> list[Stage]:
    """The one stage of an arm, the two of a warm start, or those of self-training: two teachers a round, one student.

    Raises:
        UserError: the length leaves no epoch for one of the two of a warm start.
    """
    if arm.rounds:
        arms = [arm, *[Arm(BASELINE, BASELINE)] * arm.rounds]
        return [
            Stage(one, epochs, round=number, fold=fold)
            for number, one in enumerate(arms)
            for fold in ((0,) if number == arm.rounds else (0, 1))
        ]
    if not arm.warm:
        return [Stage(arm, epochs)]
    first = round(epochs * arm.warm)
    if not 0 < first < epochs:
        raise UserError(
            f"-tr {arm.name}: of {epochs} epochs, {first} would be {BASELINE}'s and {epochs - first} {arm.trainer}'s. "
            "Give a longer --epochs, or another share."
        )
    name = re.sub(r"[^\w.-]+", "_", arm.name)
    return [Stage(Arm(BASELINE, BASELINE), first, f"_before_{name}"), Stage(arm, epochs - first, f"_warm_{arm.warm:g}")]


def parse_arms(texts: Sequence[str], common: Sequence[str]) -> list[Arm]:
    """Arms from the command line.

    Args:
        texts: each as :attr:`Arm.name`.
        common: ``NAME=VALUE``, settings of every arm whose trainer has them.

    Raises:
        UserError: nnU-Net finds no such trainer, or a setting or share is unknown or out of range.
    """
    shared = _parse_settings(common, "--settings")
    arms: dict[str, Arm] = {}
    known: set[str] = set()
    for text in dict.fromkeys(texts):
        start, colon, rest = text.partition(":")
        trainer, at, share = start.partition("@")
        warm, rounds = _parse_start(share, f"-tr {text}") if at else (0.0, 0)
        own = _parse_settings(rest.split(","), f"-tr {text}") if colon else {}
        settings_class = getattr(find_trainer(trainer), "settings_class", None)
        if own and settings_class is None:
            raise UserError(f"-tr {text}: {trainer} has no settings; only semi-supervised trainers have.")
        names = set() if settings_class is None else {option.name for option in dataclasses.fields(settings_class)}
        known |= names
        settings = {**{name: value for name, value in shared.items() if name in names}, **own}
        try:
            if settings_class is not None:
                settings_class.from_plans({PLANS_KEY: settings})
        except UserError as error:
            raise UserError(f"-tr {text}: {error}") from None
        written = ",".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        began = f"@warm={warm:g}" if warm else f"@self-train={rounds}" if rounds else ""
        name = trainer + began + (f":{written}" if written else "")
        arms[name] = Arm(name, trainer, settings, warm, rounds)
    unknown = sorted(set(shared) - known)
    if unknown:
        named = ", ".join(map(repr, unknown))
        raise UserError(f"--settings: no trainer of -tr has the setting {named}.{did_you_mean(unknown, known)}")
    return list(arms.values())


def _parse_start(text: str, option: str) -> tuple[float, int]:
    """Share of a warm start, and rounds of self-training: one of them is 0."""
    name, _, value = text.partition("=")
    if name == "self-train" and re.fullmatch(r"[1-9]", value, re.ASCII):
        return 0.0, int(value)
    try:
        warm = float(value) if name == "warm" else 0.0
    except ValueError:
        warm = 0.0
    if not 0 < warm < 1:
        raise UserError(
            f"{option}: after @, give warm= and {BASELINE}'s share of the length, such as @warm=0.5, or self-train= "
            "and the number of rounds, 1 to 9, such as @self-train=1."
        )
    return warm, 0


def _parse_settings(texts: Sequence[str], option: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UserError(f"{option}: {text!r} is not a setting; give NAME=VALUE, such as ramp_length=0.2.")
        if name in settings:
            raise UserError(f"{option}: the setting {name!r} is given twice. Give it once.")
        if name == "seed":
            raise UserError(f"{option}: --seeds gives each training its seed; leave out the setting 'seed'.")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


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
