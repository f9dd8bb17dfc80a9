"""``nnunet-ssl doctor``: what a semi-supervised training needs, checked before it starts."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pkgutil
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.cli.trainers import trainers_folder
from nnunet_ssl.data.nnunet_files import read_dataset_json, read_plans
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

HELP = "check the installation and, with -d and -c, a dataset; every line says ok or what to do"

# The same lower bounds as in pyproject.toml, which an installed package no longer has in this form.
REQUIRED = {
    "nnunetv2": "2.8.1",
    "torch": "2.2",
    "numpy": "1.24",
    "batchgenerators": "0.25.1",
    "batchgeneratorsv2": "0.3.2",
    "dynamic-network-architectures": "0.4.4",
    "acvl-utils": "0.2.6",
    "SimpleITK": "2.2.1",
    "nibabel": "4",
    "scipy": "1.10",
    "matplotlib": "3.6",
    "tqdm": "4.64",
    "threadpoolctl": "3.1",
    "connected-components-3d": "3.12",
    "edt": "2.4.1",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; the text of a ``warn`` or ``FAIL`` says what to do."""

    level: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.text}"


def ok(text: str) -> Finding:
    """A check that passed."""
    return Finding("ok", text)


def warn(text: str) -> Finding:
    """Something that does not stop a training."""
    return Finding("warn", text)


def fail(text: str) -> Finding:
    """Something that has to be mended before a training."""
    return Finding("FAIL", text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl doctor``."""
    parser.add_argument("-d", metavar="DATASET", help="also check this dataset: its number or name")
    parser.add_argument("-c", metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument("-f", metavar="FOLD", default="0", help="fold, a number or 'all' (default: %(default)s)")
    parser.add_argument("-tr", metavar="TRAINER", default="CrossMatchTrainer", help="trainer (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print one line per finding; exit code 1 if any of them failed."""
    if args.c is not None and args.d is None:
        raise UserError("-c needs -d: which dataset's configuration?")
    if not re.fullmatch(r"all|\d+", args.f):
        raise UserError(f"-f is {args.f!r}; it must be a number or 'all'.")
    failed = 0
    for finding in findings(args):
        print(finding, flush=True)
        failed += finding.level == "FAIL"
    if failed:
        print(f"\n{failed} {'thing has' if failed == 1 else 'things have'} to be mended.")
    return 1 if failed else 0


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    """All findings, in the order in which a user would mend them."""
    yield from _safely(check_versions())
    yield from _safely(check_paths())
    yield from _safely(check_trainer(args.tr))
    if args.d is not None:
        yield from _safely(check_dataset(args.d, args.c, args.p, args.f, args.tr))
    yield from _safely(check_device())


def _safely(check: Iterable[Finding]) -> Iterator[Finding]:
    """A check that breaks is a finding too: the others still run."""
    try:
        yield from check
    except UserError as error:
        yield fail(str(error))
    except Exception as error:
        yield fail(f"this check broke off ({_describe(error)}): if no other line explains it, please report it")


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def check_versions(required: dict[str, str] | None = None) -> Iterator[Finding]:
    """Python and the packages this one depends on."""
    good = [f"Python {platform.python_version()}"]
    for name, minimum in (REQUIRED if required is None else required).items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield fail(f"{name} is not installed: pip install '{name}>={minimum}'")
            continue
        if _release(version) < _release(minimum):
            yield fail(f"{name} {version} is too old: pip install '{name}>={minimum}'")
        else:
            good.append(f"{name} {version}")
    yield ok(", ".join(good))


def _release(version: str) -> tuple[int, ...]:
    """(2, 8, 1) of '2.8.1.post2+cu128'; trailing zeros do not count."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found.group().split(".")] if found else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_paths() -> Iterator[Finding]:
    """nnU-Net's three folders: set, there, and writable where nnU-Net writes."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        value = os.environ.get(name)
        if not value:
            yield fail(f"{name} is not set: export {name}=/a/folder (nnU-Net's documentation/setting_up_paths.md)")
        elif not Path(value).is_dir():
            yield warn(f"{name}={value} does not exist: create it, or correct the path")
        elif name != "nnUNet_raw" and not os.access(value, os.W_OK):
            yield fail(f"{name}={value} is not writable for this user, and nnU-Net writes there")
        else:
            yield ok(f"{name}={value}")


def check_trainer(name: str) -> Iterator[Finding]:
    """The folders in nnUNet_extTrainer, and the trainer as nnU-Net itself looks it up."""
    ours = trainers_folder()
    to_do = 'export nnUNet_extTrainer="$(nnunet-ssl trainers)"'
    value = os.environ.get("nnUNet_extTrainer", "")
    folders = [Path(part) for part in value.split(os.pathsep) if part.strip()]
    if not any(folder.resolve() == ours for folder in folders):
        now = f"is {value}, which does not hold {ours}" if value else "is not set"
        yield fail(f"nnUNet_extTrainer {now}: {to_do} (more folders are separated by '{os.pathsep}')")
        return
    for folder in folders:
        if not folder.is_dir():
            yield warn(f"nnUNet_extTrainer names {folder}, which does not exist")
            continue
        for module, reason in import_errors(folder):
            yield warn(f"{folder}: {module} cannot be imported and hides the trainers after it ({reason})")
    trainer = find_trainer(name)
    yield ok(f"nnU-Net finds {name} (of {_home(trainer)})")


def _home(trainer: type) -> str:
    """The package in which the trainer's nearest class with a module that stays loaded is defined."""
    return next(base.__module__ for base in trainer.__mro__ if "." in base.__module__)


def find_trainer(name: str) -> type[Any]:
    """The trainer's class, looked up by nnU-Net.

    Raises:
        UserError: nnU-Net does not find it.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except Exception as error:
        raise UserError(f"nnU-Net does not find the trainer {name}: {_describe(error)}") from error


def import_errors(folder: Path) -> Iterator[tuple[str, str]]:
    """Modules of a folder that nnU-Net's look-up of trainers would stumble over, with the reason."""
    from nnunetv2.utilities.find_class_by_name import (
        temporarily_cleanup_imports_from_path,
        temporarily_extend_syspath,
    )

    # nnU-Net imports them too, in this way, whenever it looks for a trainer outside its own tree.
    with temporarily_extend_syspath(str(folder)), temporarily_cleanup_imports_from_path(str(folder)):
        for module in _modules([str(folder)]):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    importlib.import_module(module)
            except (Exception, SystemExit) as error:
                if not (isinstance(error, ModuleNotFoundError) and error.name == module):  # nnU-Net skips these
                    yield module, _describe(error)


def _modules(folders: Sequence[str], prefix: str = "") -> Iterator[str]:
    for module in pkgutil.iter_modules(folders, prefix):
        yield module.name
        if module.ispkg:
            name = module.name.removeprefix(prefix)
            yield from _modules([str(Path(folder) / name) for folder in folders], f"{module.name}.")


def check_dataset(
    dataset: str, configuration: str | None, plans_name: str, fold: str, trainer_name: str
) -> Iterator[Finding]:
    """What nnU-Net and this package need of one dataset; with a configuration, all of it."""
    if not (os.environ.get("nnUNet_raw") and os.environ.get("nnUNet_preprocessed")):
        raise UserError(f"dataset {dataset} cannot be looked up: set nnUNet_raw and nnUNet_preprocessed first")

    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"dataset {dataset}: {error}") from error
    raw, preprocessed = (Path(os.environ[variable]) / name for variable in ("nnUNet_raw", "nnUNet_preprocessed"))
    to_plan = f"nnUNetv2_plan_and_preprocess -d {dataset} -c {configuration or 'CONFIGURATION'}"

    description = read_dataset_json(preprocessed / "dataset.json", otherwise=f"Run {to_plan}")
    yield ok(f"{name}: {description.get('numTraining', '?')} labeled cases, {len(description['labels'])} labels")
    plans = read_plans(preprocessed / f"{plans_name}.json", otherwise=f"Run {to_plan}")
    known = ", ".join(plans["configurations"])
    if configuration is None:
        yield ok(f"{plans_name} has the configurations {known}; check one with -c")
        return
    if configuration not in plans["configurations"]:
        yield fail(f"{plans_name} has no configuration {configuration}; it has {known}")
        return

    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans_manager = PlansManager(plans)
    manager = plans_manager.get_configuration(configuration)
    labeled = preprocessed / manager.data_identifier
    yield from _safely(check_labeled(labeled, description, otherwise=to_plan))
    yield from _safely(check_unlabeled(raw, preprocessed, manager.data_identifier, description, fold))
    try:
        trainer = find_trainer(trainer_name)
    except UserError:
        return  # check_trainer has reported it
    yield from _safely(check_settings(trainer, manager.configuration))
    yield from _safely(check_fold(preprocessed, plans_manager, configuration, fold, trainer))
    unsupported = [*_safely(check_network(trainer, plans_manager, configuration, description))]
    yield from unsupported or _safely(check_memory(trainer, plans_manager, configuration, description))


def check_labeled(folder: Path, dataset_json: dict[str, Any], *, otherwise: str) -> Iterator[Finding]:
    """The preprocessed labeled cases."""
    there = sum(1 for _ in folder.glob("*.pkl"))
    expected = dataset_json.get("numTraining", there)
    if there == 0:
        yield fail(f"{folder} holds no preprocessed case: {otherwise}")
    elif there < expected:
        yield warn(f"{folder} holds {there} of {expected} preprocessed cases: {otherwise}")
    else:
        yield ok(f"{there} labeled cases are preprocessed in {folder}")


def check_unlabeled(
    raw: Path, preprocessed: Path, data_identifier: str, dataset_json: dict[str, Any], fold: int | str
) -> Iterator[Finding]:
    """Where the unlabeled cases are, and how many of them a training can use."""
    from nnunet_ssl.data.raw_cases import IMAGES_FOLDER, files_per_case, find_raw_cases
    from nnunet_ssl.data.records import read_record, records_folder
    from nnunet_ssl.data.splits import SPLITS_FILE, unlabeled_list
    from nnunet_ssl.data.unlabeled_cases import no_unlabeled_cases_message, ready_cases

    images_folder = raw / IMAGES_FOLDER
    named, problems = find_raw_cases(images_folder, dataset_json["file_ending"], files_per_case(raw, dataset_json))
    for problem in problems[:10]:
        yield warn(f"{images_folder}: {problem.identifier} is left out: {problem.reason}")
    if len(problems) > 10:
        yield warn(f"{images_folder}: {len(problems) - 10} more cases are left out for such reasons")

    ready = ready_cases(preprocessed, data_identifier)
    records = records_folder(preprocessed, data_identifier)
    failed = {
        case.identifier: record.get("reason", "")
        for case in named
        if case.identifier not in ready
        and (record := read_record(records / f"{case.identifier}.json")) is not None
        and record.get("status") == "failed"
    }
    for identifier, reason in list(failed.items())[:10]:
        yield warn(f"{images_folder}: {identifier} could not be preprocessed: {reason}")
    missing = len(named) - len(failed) - sum(case.identifier in ready for case in named)
    later = "" if not missing else f", {missing} will be when training starts (or now: nnunet-ssl preprocess)"
    listed = unlabeled_list(preprocessed / SPLITS_FILE, fold)
    if not named and not ready and not listed:
        yield fail(no_unlabeled_cases_message(raw, preprocessed, fold))
        return
    yield ok(
        f"{len(named)} unlabeled cases in {images_folder}, {len(ready)} preprocessed{later}; "
        f"{len(listed)} in the 'unlabeled' list of fold {fold}"
    )


def check_fold(
    preprocessed: Path, plans: PlansManager, configuration: str, fold: int | str, trainer: type[Any]
) -> Iterator[Finding]:
    """The fold's lists against the preprocessed cases and against each other, images included."""
    from nnunet_ssl.data import fold_check, splits
    from nnunet_ssl.data.leak_guard import check_leaks
    from nnunet_ssl.data.unlabeled_cases import collect_unlabeled_cases, preprocessed_cases

    manager = plans.get_configuration(configuration)
    file, labeled = preprocessed / splits.SPLITS_FILE, preprocessed / manager.data_identifier
    cases = preprocessed_cases(labeled)
    if not cases:
        return  # check_labeled has reported it
    train_all = fold_check.train_all(preprocessed.name, configuration, plans.plans_name, trainer.__name__)
    yield from map(warn, fold_check.check_fold(file, fold, labeled, cases, train_all=train_all))
    if fold == "all":
        yield ok("fold all trains on every labeled case; there is no validation case to protect")
        return
    lists = splits.fold_lists(file, fold)
    if lists is None:
        if not file.is_file():
            yield ok(f"{file} does not exist: nnU-Net will write its own five folds when training starts")
        return
    train, val = lists["train"], lists["val"]
    if not val and not hasattr(trainer, "settings_class"):
        yield fail(f"{trainer.__name__} trains no fold without validation cases: name some in {file}, or use fold all")
    notes: list[str] = []
    unlabeled = collect_unlabeled_cases(preprocessed, manager.data_identifier, fold)
    if hasattr(trainer, "settings_class"):
        check_leaks(
            unlabeled=unlabeled,
            labeled_folder=labeled,
            train=train,
            val=val,
            allow_transductive=trainer.settings_class.from_plans(manager.configuration).allow_transductive,
            log=notes.append,
        )
    yield from map(warn, notes)
    yield ok(f"fold {fold}: {len(train)} labeled, {len(unlabeled)} unlabeled (ready now), {len(val)} validation cases")


def check_settings(trainer: type[Any], configuration: dict[str, Any]) -> Iterator[Finding]:
    """The configuration's ``semi_supervised`` entry against the trainer's settings."""
    from nnunet_ssl.settings import PLANS_KEY

    if not hasattr(trainer, "settings_class"):
        yield warn(f"{trainer.__name__} is no semi-supervised trainer: it does not use unlabeled cases")
        return
    settings = trainer.settings_class.from_plans(configuration)
    given = ", ".join(f"{name} = {value!r}" for name, value in configuration.get(PLANS_KEY, {}).items())
    yield ok(f"settings of {trainer.__name__}: {given or 'defaults'}; memory_mode is {settings.memory_mode}")


def check_network(
    trainer: type[Any], plans: PlansManager, configuration: str, dataset_json: dict[str, Any]
) -> Iterator[Finding]:
    """A finding if trainer and plans make a network that cannot be trained with unlabeled cases."""
    if not hasattr(trainer, "settings_class"):
        return

    import torch
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    from nnunet_ssl.networks.architectures import check_architecture, check_supported

    manager = plans.get_configuration(configuration)
    check_architecture(manager)
    channels = determine_num_input_channels(plans, manager, dataset_json)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    try:
        with torch.device("meta"):
            network = trainer.build_network_architecture(plans, manager, channels, heads, True)
    except Exception:
        return  # it may be one that needs memory to be built; check_memory will say what went wrong
    try:
        check_supported(network)
    except NotImplementedError as error:
        yield fail(str(error))


def check_memory(
    trainer: type[Any], plans: PlansManager, configuration: str, dataset_json: dict[str, Any]
) -> Iterator[Finding]:
    """The GPU memory of a step, computed without allocating it, and the GPUs' free memory against it."""
    if not hasattr(trainer, "settings_class"):
        return

    from nnunet_ssl.trainer.memory import MemoryEstimate, judge, trainer_of_plans

    name = trainer.__name__
    try:
        made = trainer_of_plans(trainer, plans, configuration, dataset_json)
        estimate = MemoryEstimate(made)
        yield ok(
            f"estimate of a step's GPU memory: nnUNetTrainer {estimate.supervised:.1f} GB, {name} split "
            f"{estimate.split:.1f} GB, stacked {estimate.stacked:.1f} GB (batches of {estimate.labeled} + "
            f"{estimate.unlabeled})"
        )
    except Exception as error:
        yield warn(f"no estimate of the GPU memory of {name} ({_describe(error)}): watch its first steps")
        return
    for gpu, free, _ in gpus():
        verdict = judge(estimate, free, made.settings.memory_mode)
        yield (ok if verdict.fits else warn)(f"{gpu}: {verdict.text}")


def gpus() -> list[tuple[str, float, float]]:
    """Name, free and total memory in GB of every CUDA GPU."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append((f"GPU {index}, {torch.cuda.get_device_name(index)}", free / 1e9, total / 1e9))
    return found


def check_device() -> Iterator[Finding]:
    """The GPUs."""
    found = gpus()
    for name, free, total in found:
        yield ok(f"{name}: {free:.1f} of {total:.1f} GB free")
    if not found:
        yield warn("no CUDA GPU: train with nnUNetv2_train ... -device cpu, in memory mode split (what auto chooses)")
