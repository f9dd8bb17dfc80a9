"""``nnunet-ssl doctor``: what a semi-supervised training needs, checked before it starts."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from nnunet_ssl.cli.findings import Finding, fail, ok, safely, warn
from nnunet_ssl.cli.lookup import (
    RECOMMENDED,
    check_fold_name,
    device_name,
    find_trainer,
    import_errors,
    trainers_folder,
)
from nnunet_ssl.cli.report import report
from nnunet_ssl.cli.training_checks import check_dataset, check_device
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainer_lookup import EXPORT

HELP = "check the installation and, with -d and -c, a dataset; every line says ok or what to do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl doctor``."""
    parser.add_argument("-d", metavar="DATASET", help="also check this dataset: its number or name")
    parser.add_argument(
        "-c",
        metavar="CONFIGURATION",
        help="also check all that a training of this configuration, such as 3d_fullres, needs",
    )
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument("-f", metavar="FOLD", default="0", help="fold, a number or 'all' (default: %(default)s)")
    parser.add_argument("-tr", metavar="TRAINER", default=RECOMMENDED, help="trainer (default: %(default)s)")
    parser.add_argument(
        "--time",
        action="store_true",
        help="with -d and -c, also measure how long a training step takes on this machine",
    )
    parser.add_argument(
        "-device", choices=("cpu", "cuda", "mps"), help="device of --time (default: cuda where there is one, else cpu)"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="print one text to paste into an issue: system, all checks, and with -d and -c the plans in short and the "
        "last lines of the training's log; without names of cases and of folders outside nnU-Net's",
    )


def run(args: argparse.Namespace) -> int:
    """Print one line per finding; exit code 1 if any of them failed."""
    if args.c is not None and args.d is None:
        raise UserError("-c needs -d: which dataset's configuration?")
    check_fold_name(args.f)
    if args.time and args.c is None:
        raise UserError("--time needs -d and -c: the step of which configuration?")
    if args.device is not None and not args.time:
        raise UserError("-device is the device of --time, which is missing.")
    if args.report:
        found = list(findings(args))
        print(report(args, found))
        return 1 if any(finding.level == "FAIL" for finding in found) else 0
    failed = 0
    for finding in findings(args):
        print(finding, flush=True)
        failed += finding.level == "FAIL"
    if failed:
        print(f"\n{failed} {'thing has' if failed == 1 else 'things have'} to be fixed.")
    return 1 if failed else 0


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    """All findings, in the order in which a user would fix them; what several checks stumble over is told once."""
    told: set[Finding] = set()
    for finding in _checks(args):
        if finding not in told:
            told.add(finding)
            yield finding


def _checks(args: argparse.Namespace) -> Iterator[Finding]:
    yield from safely(check_versions())
    yield from safely(check_paths())
    yield from safely(check_trainer(args.tr))
    if args.d is not None:
        timed_on = device_name(args.device) if args.time else None
        yield from safely(check_dataset(args.d, args.c, args.p, args.f, args.tr, timed_on=timed_on))
    yield from safely(check_device())


def check_versions(required: Sequence[str] | None = None) -> Iterator[Finding]:
    """Python and the packages this one depends on; by default those that the installed package's metadata names."""
    if required is None:
        try:
            required = metadata.requires("nnunet-ssl") or []
        except metadata.PackageNotFoundError:
            yield warn("nnunet-ssl is not installed, so its requirements are not checked: pip install . in its folder")
            required = []
    good = [f"Python {platform.python_version()}"]
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield fail(f"{name} is not installed: pip install '{requirement}'")
            continue
        # A vendor's build of PyTorch may call itself 2.2.0a0+5f2.
        if requirement.specifier.contains(Version(version).base_version):
            good.append(f"{name} {version}")
        else:
            yield fail(f"{name} {version} does not fit: pip install '{requirement}'")
    yield ok(", ".join(good))


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
    value = os.environ.get("nnUNet_extTrainer", "")
    folders = [Path(part) for part in value.split(os.pathsep) if part.strip()]
    if not any(folder.resolve() == ours for folder in folders):
        now = f"is {value}, which does not hold {ours}" if value else "is not set"
        yield fail(f"nnUNet_extTrainer {now}: {EXPORT} (more folders are separated by '{os.pathsep}')")
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
    """The module of the trainer's nearest class. The thin ones that nnU-Net finds do not stay loaded."""
    return next(base.__module__ for base in trainer.__mro__ if base.__module__ in sys.modules)
