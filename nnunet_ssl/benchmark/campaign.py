"""What a campaign trains: one dataset, configuration and length; arms, labeled cases and seeds.

A campaign is a folder. Its plans are a copy, so that what happens to the dataset's plans later does not change it.
Where ``splits_final.json`` has no fold with its labeled cases, one is appended; the folds that are there stay.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nnunet_ssl.benchmark.arms import Arm
from nnunet_ssl.data.few_labels import label_few
from nnunet_ssl.data.nnunet_files import read_json, read_plans
from nnunet_ssl.data.splits import Fold, append_fold, current_splits, labeled_cases, name_folds
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import lock, write_text
from nnunet_ssl.settings import PLANS_KEY
from nnunet_ssl.text import dataset_number, planning_command

DRAW_SEED = 0
"""Of the draw of labeled cases: so that few labeled cases are a part of many, in every campaign the same ones."""

_FILE, _PLANS = "campaign.json", "plans.json"
_OTHER_FOLDER = "Choose another folder with -o."


@dataclass(frozen=True)
class Setting:
    """Which labeled cases: a fold.

    Attributes:
        name: of the same cases on every machine, where the fold may have another number.
        fold: its number in ``splits_final.json``.
        labeled: number of labeled cases.
    """

    name: str
    fold: int
    labeled: int


@dataclass(frozen=True)
class Training:
    """One training of a campaign."""

    arm: Arm
    setting: Setting
    seed: int

    @property
    def key(self) -> str:
        """Its name in the table of results."""
        return f"{self.arm.name}; {self.setting.name}; seed {self.seed}"

    @property
    def file_name(self) -> str:
        """Its name for files, without an ending."""
        return re.sub(r"[^\w.-]+", "_", self.key)


@dataclass(frozen=True)
class Campaign:
    """What all trainings of a folder have in common.

    Attributes:
        folder: of the campaign.
        identifier: unlike any other campaign's.
        date: when it was begun, UTC.
        dataset: its full name.
        plans: plans identifier.
        configuration: of the plans.
        epochs: length of every training.
        validation: number of validation cases, the first by name; None: all.
    """

    folder: Path
    identifier: str
    date: str
    dataset: str
    plans: str
    configuration: str
    epochs: int
    validation: int | None

    @property
    def results(self) -> Path:
        """The table with every case of every training."""
        return self.folder / "results.csv"

    @property
    def plans_file(self) -> Path:
        """The campaign's own copy of the plans."""
        return self.folder / _PLANS

    def log(self, training: Training) -> Path:
        """What a training prints."""
        return self.folder / "logs" / f"{training.file_name}.log"

    def task(self, training: Training) -> Path:
        """What the process of a training is told; its lock and its progress lie next to it."""
        return self.folder / "tasks" / f"{training.file_name}.json"

    def nnunet_results(self, training: Training) -> Path:
        """``nnUNet_results`` of a training: nnU-Net's names of folders have no place for a seed."""
        return self.folder / "nnUNet_results" / f"seed_{training.seed}"


def open_campaign(
    folder: Path,
    *,
    preprocessed_folder: Path,
    plans: str,
    configuration: str,
    epochs: int,
    validation: int | None,
    configurations: Path | None,
) -> Campaign:
    """Begin a campaign, or go on with the one in a folder.

    Args:
        folder: of the campaign.
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        plans: plans identifier.
        configuration: of the plans, or of ``configurations``.
        epochs: length of every training.
        validation: number of validation cases, the first by name; None: all.
        configurations: a JSON file with more configurations, written as in the plans.

    Raises:
        UserError: the plans have no such configuration, its cases are not preprocessed, or the folder holds a campaign
            of something else.
    """
    wanted = {
        "dataset": preprocessed_folder.name,
        "plans": plans,
        "configuration": configuration,
        "epochs": epochs,
        "validation": validation,
    }
    begins = not (folder / _FILE).is_file()
    # Before the folder is made: a mistake leaves none.
    content = _plans(preprocessed_folder, plans, configuration, configurations) if begins else {}
    with lock(folder / f".{_FILE}.lock"):
        if begins and not (folder / _FILE).is_file():
            write_text(folder / _PLANS, json.dumps(content, indent=4) + "\n", otherwise=_OTHER_FOLDER)
            now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
            begun = {"identifier": uuid.uuid4().hex[:12], "date": now, **wanted}
            write_text(folder / _FILE, json.dumps(begun, indent=1) + "\n", otherwise=_OTHER_FOLDER)
    campaign = read_campaign(folder)
    differ = [
        f"{name} {value} (there {getattr(campaign, name)})"
        for name, value in wanted.items()
        if getattr(campaign, name) != value
    ]
    if differ:
        raise UserError(
            f"{folder} contains another campaign: {', '.join(differ)}. Only trainings of one campaign can be "
            f"compared. {_OTHER_FOLDER}"
        )
    return campaign


def read_campaign(folder: Path) -> Campaign:
    """The campaign in a folder.

    Raises:
        UserError: there is none, or its file is broken.
    """
    entries = {"identifier": str, "date": str, "dataset": str, "plans": str, "configuration": str}
    content = read_json(folder / _FILE, otherwise=_OTHER_FOLDER, entries=entries)
    names = [one.name for one in dataclasses.fields(Campaign) if one.name != "folder"]
    missing = [name for name in names if name not in content]
    if missing:
        raise UserError(f"{folder / _FILE} has no {', '.join(missing)}. {_OTHER_FOLDER}")
    return Campaign(folder, **{name: content[name] for name in names})


def fold_of(campaign: Campaign, setting: str) -> Fold:
    """The cases of a setting, as they were when the campaign began with it."""
    fold: Fold = read_json(campaign.folder / _FILE, otherwise=_OTHER_FOLDER)["settings"][setting]
    return fold


def _plans(preprocessed_folder: Path, name: str, configuration: str, more: Path | None) -> dict[str, Any]:
    """The plans with what ``more`` adds, checked to have a configuration whose cases are preprocessed."""
    again = f"Make it with {planning_command(preprocessed_folder.name)}, or choose other plans with -p."
    file = preprocessed_folder / f"{name}.json"
    plans = read_plans(file, otherwise=again)
    if more is not None:
        for added, content in read_json(more, otherwise="Correct --configurations.").items():
            if not isinstance(content, dict):
                raise UserError(f"{more}: {added!r} must be a table, like a configuration in the plans.")
            if plans["configurations"].setdefault(added, content) != content:
                raise UserError(f"{file} has another configuration named {added!r} than {more}. Rename it there.")
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise UserError(f"{file} has no configuration {configuration}; there are {known}. Choose one with -c.")
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    try:
        planned = PlansManager(plans).get_configuration(configuration)
        identifier = planned.data_identifier
    except Exception as error:
        raise UserError(f"{file}: the configuration {configuration} is broken: {error!r}. Correct it.") from None
    settings = planned.configuration.get(PLANS_KEY)
    if isinstance(settings, dict) and settings.get("seed") is not None:
        raise UserError(
            f"{file}: the configuration {configuration} has the setting 'seed', with which all trainings of an arm "
            "would be the same. Remove it: --seeds gives each training its own."
        )
    if not (preprocessed_folder / identifier).is_dir():
        raise UserError(
            f"No case is preprocessed for {configuration}: there is no {preprocessed_folder / identifier}. "
            f"{_to_preprocess(file, configuration, identifier)}"
        )
    return plans


def plan_settings(
    campaign: Campaign,
    *,
    preprocessed_folder: Path,
    raw_folder: Path | None,
    labeled: Sequence[str],
    folds: Sequence[int],
    draw_fold: int,
) -> list[Setting]:
    """Folds for the campaign, found in ``splits_final.json`` or appended to it.

    Args:
        campaign: it may validate on fewer cases.
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        raw_folder: ``nnUNet_raw/DatasetXXX_Name``, or None.
        labeled: numbers of labeled cases, or percentages, each drawn from ``draw_fold`` as ``nnunet-ssl split`` does.
        folds: folds to be taken as they are.
        draw_fold: see ``labeled``.

    Raises:
        UserError: there is no such fold, it has fewer cases, or cases of it are not preprocessed.
    """
    cases = labeled_cases(preprocessed_folder, raw_folder)
    splits, source = current_splits(preprocessed_folder, raw_folder, cases)
    for number in [*folds, draw_fold]:
        if not 0 <= number < len(splits):
            raise UserError(
                f"There is no fold {number}: {source or preprocessed_folder} has {name_folds(len(splits))}."
            )
    wanted: dict[str, Fold] = {}
    for count in labeled:
        fold = label_few(splits[draw_fold], count, seed=DRAW_SEED, with_labels=cases)
        wanted[f"{len(fold['train'])} labeled" + (f" of fold {draw_fold}" if draw_fold else "")] = fold
    for number in folds:
        fold = {name: list(splits[number].get(name, [])) for name in ("train", "val", "unlabeled")}
        wanted[f"fold {number}, {len(fold['train'])} labeled"] = fold
    for name, fold in wanted.items():
        if not fold["val"]:
            raise UserError(
                f"{source or preprocessed_folder}: {name} has no validation case, so there is nothing to report."
            )
        fold["val"] = sorted(fold["val"])[: campaign.validation]
        _check_preprocessed(campaign, preprocessed_folder, fold)
    _keep(campaign, wanted)
    return [
        Setting(name, append_fold(preprocessed_folder, raw_folder, cases, fold), len(fold["train"]))
        for name, fold in wanted.items()
    ]


def options_of(setting: str) -> list[str]:
    """The options of ``nnunet-ssl benchmark`` that :func:`plan_settings` makes a setting of this name from.

    Raises:
        UserError: it makes none of this name.
    """
    drawn = re.fullmatch(r"(\d+) labeled(?: of fold (\d+))?", setting)
    if drawn:
        return ["--labeled", drawn[1], *(["--draw-fold", drawn[2]] if drawn[2] else [])]
    taken = re.fullmatch(r"fold (\d+), \d+ labeled", setting)
    if taken:
        return ["--folds", taken[1]]
    raise UserError(f"No setting of nnunet-ssl benchmark is named {setting!r}.")


def _keep(campaign: Campaign, settings: Mapping[str, Fold]) -> None:
    """Write into the campaign's file which cases its settings have; they never change."""
    file = campaign.folder / _FILE
    with lock(campaign.folder / f".{_FILE}.lock"):
        content = read_json(file, otherwise=_OTHER_FOLDER)
        kept = content.setdefault("settings", {})
        changed = [name for name, fold in settings.items() if kept.setdefault(name, fold) != fold]
        if changed:
            raise UserError(
                f"{', '.join(changed)}: the cases are not those with which {campaign.folder} was begun, because "
                f"splits_final.json has changed. {_OTHER_FOLDER}"
            )
        write_text(file, json.dumps(content, indent=1) + "\n")


def _check_preprocessed(campaign: Campaign, preprocessed_folder: Path, fold: Fold) -> None:
    folder = preprocessed_folder / configured(campaign, campaign.configuration).data_identifier
    plans = preprocessed_folder / f"{campaign.plans}.json"
    missing = [case for case in [*fold["train"], *fold["val"]] if not (folder / f"{case}.pkl").is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} labeled cases of the fold, such as {missing[0]}, are not preprocessed in {folder}. "
            f"{_to_preprocess(plans, campaign.configuration, folder.name)}"
        )


def _to_preprocess(plans: Path, configuration: str, identifier: str) -> str:
    """What to do where cases of a configuration are missing; nnU-Net preprocesses only configurations of the plans."""
    known = read_plans(plans, otherwise="Plan the dataset again.")["configurations"]
    if configuration not in known:  # it comes from --configurations
        same = [name for name, content in known.items() if content.get("data_identifier") == identifier]
        configuration = same[0] if same else configuration
    number = dataset_number(plans.parent.name)
    return f"Run nnUNetv2_preprocess -d {number} -plans_name {plans.stem} -c {configuration} first."


def configured(campaign: Campaign, configuration: str) -> Any:
    """A configuration of the campaign's plans, as nnU-Net's manager."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(read_plans(campaign.plans_file, otherwise=_OTHER_FOLDER)).get_configuration(configuration)


def plan_trainings(arms: Sequence[Arm], settings: Sequence[Setting], seeds: Sequence[int]) -> list[Training]:
    """All trainings, whole seeds first, so that there is something to compare early."""
    return [Training(arm, setting, seed) for seed in seeds for setting in settings for arm in arms]
