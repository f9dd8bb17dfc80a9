"""What a training needs of dataset, fold, settings, network and GPUs, checked by ``nnunet-ssl doctor``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nnunet_ssl.cli.findings import Finding, fail, ok, safely, warn
from nnunet_ssl.cli.lookup import described, find_trainer
from nnunet_ssl.data.nnunet_files import read_dataset_json, read_fingerprint, read_plans
from nnunet_ssl.errors import MethodError, UserError
from nnunet_ssl.text import planning_command

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_ssl.data.raw_cases import CaseProblem, RawCase


def check_dataset(
    dataset: str,
    configuration: str | None,
    plans_name: str,
    fold: str,
    trainer_name: str,
    *,
    timed_on: str | None = None,
) -> Iterator[Finding]:
    """What nnU-Net and this package need of one dataset; with a configuration, all of it.

    ``timed_on`` is the device on which a step's time is measured.
    """
    if not (os.environ.get("nnUNet_raw") and os.environ.get("nnUNet_preprocessed")):
        raise UserError(f"dataset {dataset} cannot be looked up: set nnUNet_raw and nnUNet_preprocessed first")

    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"dataset {dataset}: {error}") from error
    raw, preprocessed = (Path(os.environ[variable]) / name for variable in ("nnUNet_raw", "nnUNet_preprocessed"))
    to_plan = f"{planning_command(dataset)} -c {configuration or 'CONFIGURATION'}"

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
    yield from safely(check_labeled(labeled, description, otherwise=to_plan))
    unlabeled = UnlabeledImages.of(raw, preprocessed, manager.data_identifier, description)
    yield from safely(check_unlabeled(unlabeled, raw, preprocessed, fold))
    try:
        trainer = find_trainer(trainer_name)
    except UserError:
        return  # check_trainer has reported it
    settings = [*safely(check_settings(trainer, manager.configuration, plans))]
    yield from settings
    yield from safely(check_fold(unlabeled, preprocessed, plans_manager, configuration, fold, trainer))
    network = [*safely(check_network(trainer, plans_manager, configuration, description))]
    yield from network
    # Bad settings or a bad network leave nothing to compute, and have been reported.
    if not any(finding.level == "FAIL" for finding in [*settings, *network]):
        memory = [*safely(check_memory(trainer, plans_manager, configuration, description))]
        yield from memory
        if timed_on is not None and not any(finding.level == "FAIL" for finding in memory):
            yield from safely(check_time(trainer, plans_manager, configuration, description, timed_on))


def check_labeled(folder: Path, dataset_json: dict[str, Any], *, otherwise: str) -> Iterator[Finding]:
    """The preprocessed labeled cases, and what nnU-Net has measured of them."""
    there = sum(1 for _ in folder.glob("*.pkl"))
    expected = dataset_json.get("numTraining", there)
    if there == 0:
        yield fail(f"{folder} holds no preprocessed case: {otherwise}")
    elif there < expected:
        yield warn(f"{folder} holds {there} of {expected} preprocessed cases: {otherwise}")
    else:
        yield ok(f"{there} labeled cases are preprocessed in {folder}")
    read_fingerprint(folder.parent)  # unlabeled images are compared with it


class UnlabeledImages(NamedTuple):
    """What there is in imagesUn.

    Attributes:
        named: cases that have all their files.
        problems: what else is there, and why it is left out.
        ready: names of the preprocessed cases, also of those whose images are elsewhere.
        failed: why cases could not be preprocessed earlier.
        labeled: the first image file of each labeled case, to find copies of it.
    """

    named: list[RawCase]
    problems: list[CaseProblem]
    ready: set[str]
    failed: dict[str, str]
    labeled: dict[str, Path]

    @classmethod
    def of(cls, raw: Path, preprocessed: Path, data_identifier: str, dataset_json: dict[str, Any]) -> UnlabeledImages:
        """Look for them, and for what earlier runs made of them."""
        from nnunet_ssl.data.raw_cases import IMAGES_FOLDER, files_per_case, find_raw_cases, labeled_images
        from nnunet_ssl.data.records import read_record, records_folder
        from nnunet_ssl.data.unlabeled_cases import ready_cases

        images_folder, channels = raw / IMAGES_FOLDER, files_per_case(raw, dataset_json)
        named, problems = find_raw_cases(images_folder, dataset_json["file_ending"], channels)
        ready = set(ready_cases(preprocessed, data_identifier))
        records = records_folder(preprocessed, data_identifier)
        failed = {
            case.identifier: record.get("reason", "")
            for case in named
            if case.identifier not in ready
            and (record := read_record(records / f"{case.identifier}.json")) is not None
            and record.get("status") == "failed"
        }
        return cls(named, problems, ready, failed, labeled_images(raw, dataset_json))

    @property
    def waiting(self) -> list[RawCase]:
        """What a training will preprocess when it starts."""
        return [case for case in self.named if case.identifier not in self.ready and case.identifier not in self.failed]


def check_unlabeled(unlabeled: UnlabeledImages, raw: Path, preprocessed: Path, fold: int | str) -> Iterator[Finding]:
    """Where the unlabeled cases are, and how many of them a training can use."""
    from nnunet_ssl.data.raw_cases import IMAGES_FOLDER, unread_folders_message
    from nnunet_ssl.data.splits import SPLITS_FILE, unlabeled_list
    from nnunet_ssl.data.unlabeled_cases import no_unlabeled_cases_message

    images_folder, problems = raw / IMAGES_FOLDER, unlabeled.problems
    for problem in problems[:10]:
        yield warn(f"{images_folder}: {problem.identifier} is left out: {problem.reason}")
    if len(problems) > 10:
        yield warn(f"{images_folder}: {len(problems) - 10} more cases are left out for such reasons")
    for identifier, reason in list(unlabeled.failed.items())[:10]:
        yield warn(f"{images_folder}: {identifier} could not be preprocessed: {reason}")
    listed = unlabeled_list(preprocessed / SPLITS_FILE, fold)
    if not unlabeled.named and not unlabeled.ready and not listed:
        yield fail(no_unlabeled_cases_message(raw, preprocessed, fold))
        return
    if unread := unread_folders_message(raw):
        yield warn(unread)
    waiting = len(unlabeled.waiting)
    later = "" if not waiting else f", {waiting} will be when training starts (or now: nnunet-ssl preprocess)"
    yield ok(
        f"{len(unlabeled.named)} unlabeled cases in {images_folder}, {len(unlabeled.ready)} preprocessed{later}; "
        f"{len(listed)} in the 'unlabeled' list of fold {fold}"
    )


def check_fold(
    unlabeled: UnlabeledImages,
    preprocessed: Path,
    plans: PlansManager,
    configuration: str,
    fold: int | str,
    trainer: type[Any],
) -> Iterator[Finding]:
    """The fold's lists against the preprocessed cases and against each other, images included."""
    from nnunet_ssl.data import fold_check, splits
    from nnunet_ssl.data.leak_guard import check_image_files, check_leaks
    from nnunet_ssl.data.unlabeled_cases import collect_unlabeled_cases, preprocessed_cases

    manager = plans.get_configuration(configuration)
    file, labeled = preprocessed / splits.SPLITS_FILE, preprocessed / manager.data_identifier
    cases, ours = preprocessed_cases(labeled), hasattr(trainer, "settings_class")
    if not cases:
        return  # check_labeled has reported it
    train_all = fold_check.train_all(preprocessed.name, configuration, plans.plans_name, trainer.__name__)
    notes = fold_check.check_fold(file, fold, labeled, cases, train_all=train_all, needs_validation=not ours)
    yield from map(warn, notes)
    if fold == "all":
        yield ok("fold all trains on every labeled case; there is no validation case to protect")
        return
    if not file.is_file():
        yield ok(f"{file} does not exist: nnU-Net will write its own five folds when training starts")
    folds, _ = splits.current_splits(preprocessed, None, sorted(cases))
    if not 0 <= int(fold) < len(folds):
        return  # nnU-Net draws the cases when it trains
    train, val = folds[int(fold)]["train"], folds[int(fold)]["val"]
    ready = collect_unlabeled_cases(preprocessed, manager.data_identifier, fold)
    if ours:
        reported: list[str] = []
        common: dict[str, Any] = {
            "train": train,
            "val": val,
            "allow_transductive": _allows_transductive(trainer, manager.configuration),
            "log": reported.append,
        }
        check_leaks(unlabeled=ready, labeled_folder=labeled, **common)
        check_image_files(unlabeled=unlabeled.waiting, labeled=unlabeled.labeled, **common)
        yield from map(warn, reported)
    waiting = len(unlabeled.waiting)
    yield ok(
        f"fold {fold}: {len(train)} labeled, {len(ready) + waiting} unlabeled"
        f"{f' ({waiting} not preprocessed yet)' if waiting else ''}, {len(val)} validation cases"
    )


def _allows_transductive(trainer: type[Any], configuration: dict[str, Any]) -> bool:
    """The setting, also where other settings are wrong: check_settings has reported those."""
    from nnunet_ssl.settings import PLANS_KEY

    try:
        return bool(trainer.settings_class.from_plans(configuration).allow_transductive)
    except UserError:
        given = configuration.get(PLANS_KEY)
        return isinstance(given, dict) and given.get("allow_transductive") is True


def check_settings(trainer: type[Any], configuration: dict[str, Any], plans: dict[str, Any]) -> Iterator[Finding]:
    """The configuration's ``semi_supervised`` entry against the trainer's settings."""
    from nnunet_ssl.settings import PLANS_KEY

    if not hasattr(trainer, "settings_class"):
        yield warn(f"{trainer.__name__} is no semi-supervised trainer: it does not use unlabeled cases")
        return
    settings = trainer.settings_class.from_plans(configuration, plans)
    given = ", ".join(f"{name} = {value!r}" for name, value in configuration.get(PLANS_KEY, {}).items())
    yield ok(f"settings of {trainer.__name__}: {given or 'defaults'}; memory_mode is {settings.memory_mode}")


def check_network(
    trainer: type[Any], plans: PlansManager, configuration: str, dataset_json: dict[str, Any]
) -> Iterator[Finding]:
    """Findings if the network cannot be trained with unlabeled cases, or starts without the weights the plans name."""
    if not hasattr(trainer, "settings_class"):
        return

    from nnunet_ssl.networks import architectures

    notes: list[str] = []
    build, manager = trainer.build_network_architecture, plans.get_configuration(configuration)
    try:
        # This does not refuse a network that needs memory to be built; check_memory will say what went wrong there.
        architectures.check_network(build, plans, manager, dataset_json, notes.append)
    except NotImplementedError as error:
        yield fail(str(error))
    yield from map(warn, notes)


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
    except MethodError:
        raise
    except Exception as error:
        yield warn(f"no estimate of the GPU memory of {name} ({described(error)}): watch its first steps")
        return
    for gpu, free, _ in gpus():
        verdict = judge(estimate, free, made.settings.memory_mode)
        yield (ok if verdict.fits else warn)(f"{gpu}: {verdict.text}")


def check_time(
    trainer: type[Any], plans: PlansManager, configuration: str, dataset_json: dict[str, Any], device: str
) -> Iterator[Finding]:
    """How long a step takes on this machine, and so a training, measured on two steps."""
    from nnunet_ssl.trainer.memory import trainer_of_plans
    from nnunet_ssl.trainer.step_time import seconds_per_step

    try:
        made = trainer_of_plans(trainer, plans, configuration, dataset_json, device)
        seconds = seconds_per_step(made)
    except MethodError:
        raise
    except Exception as error:
        yield warn(f"no time of a step of {trainer.__name__} on {device} ({described(error)})")
        return
    steps, epochs = made.num_iterations_per_epoch, made.num_epochs
    epoch = seconds * steps
    yield ok(
        f"a step of {trainer.__name__} takes {seconds:.2f} s on {device}: {epoch / 60:.1f} min per epoch of {steps} "
        f"steps, {epoch * epochs / 3600:.1f} h for {epochs} epochs, without loaders and validation (two steps measured)"
    )


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
