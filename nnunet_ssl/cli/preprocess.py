"""``nnunet-ssl preprocess``: preprocess the images of imagesUn as nnU-Net preprocessed the labeled ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nnunet_ssl.cli.lookup import listing, nnunet_folder, plan_again, read_plans, worker_processes
from nnunet_ssl.data.nnunet_files import read_dataset_json
from nnunet_ssl.data.raw_cases import unread_folders_message
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import planning_command

HELP = "preprocess the images in imagesUn beforehand (otherwise a training does it when it starts)"

_EXPLANATION = """\
Preprocesses the images in nnUNet_raw/DATASET/imagesUn, with nnU-Net's own preprocessor and the plans that
nnUNetv2_plan_and_preprocess made from the labeled cases. It skips cases that are up to date, repeats cases whose images
have changed, and removes cases whose images are gone. You can interrupt it at any time.

Exit code: 0; 1 if a case cannot be used (the table says why; the others are preprocessed); 2 for an error in the call.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl preprocess``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset's number or name")
    parser.add_argument(
        "-c",
        nargs="+",
        metavar="CONFIGURATION",
        help="configurations, such as 3d_fullres (default: those whose labeled cases are preprocessed)",
    )
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument(
        "-np",
        type=int,
        metavar="N",
        help="worker processes; each has one case in memory (default: nnU-Net's, at most one per CPU core)",
    )
    parser.add_argument(
        "--num-parts",
        type=int,
        default=1,
        metavar="N",
        help="divide the cases among N runs, on one or several machines",
    )
    parser.add_argument("--part-id", type=int, default=0, metavar="I", help="the part of this run, from 0 to N-1")


def run(args: argparse.Namespace) -> int:
    """Preprocess, print a table per configuration, and return 1 if a case cannot be used."""
    raw = nnunet_folder("nnUNet_raw", "nnU-Net reads the images there.")
    preprocessed = nnunet_folder("nnUNet_preprocessed", "nnU-Net stores plans and preprocessed images there.")

    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        name = str(maybe_convert_to_dataset_name(args.d))
    except (RuntimeError, ValueError):
        name = ""
    if not (preprocessed / name / "dataset.json").is_file() or not name:
        planned = sorted(file.parent.name for file in preprocessed.glob("Dataset*/dataset.json"))
        raise UserError(
            f"{preprocessed} contains no dataset {args.d}; {listing('planned datasets there', planned)} Run "
            f"{planning_command(args.d)} first, or correct -d or nnUNet_preprocessed."
        )
    raw_dataset, preprocessed_dataset = raw / name, preprocessed / name
    if not (raw_dataset / "imagesUn").is_dir():
        unread = unread_folders_message(raw_dataset)
        raise UserError(
            f"There is no folder {raw_dataset / 'imagesUn'}. {unread and f'{unread} '}Create it and put the unlabeled "
            "images there, named as in imagesTr (CASE_0000 + file ending, one file per channel)."
        )
    plans = read_plans(preprocessed_dataset, args.p, args.d)

    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_ssl.data.preprocessing import preprocess_unlabeled
    from nnunet_ssl.data.unlabeled_cases import no_unlabeled_cases_message

    plans_manager = PlansManager(plans)
    dataset_json = read_dataset_json(preprocessed_dataset / "dataset.json", otherwise=plan_again(args.d))
    num_processes = worker_processes(args.np)
    failed = 0
    for configuration in _configurations(args.c, plans_manager, preprocessed_dataset, args.p):
        report = preprocess_unlabeled(
            raw_dataset_folder=raw_dataset,
            preprocessed_dataset_folder=preprocessed_dataset,
            plans_manager=plans_manager,
            configuration=configuration,
            dataset_json=dataset_json,
            num_processes=num_processes,
            num_parts=args.num_parts,
            part_id=args.part_id,
        )
        if args.num_parts == 1 and not (report.done or report.up_to_date or report.removed or report.failed):
            raise UserError(no_unlabeled_cases_message(raw_dataset, preprocessed_dataset))
        print(report.table(), flush=True)
        failed += len(report.failed)
    return 1 if failed else 0


def _configurations(asked: list[str] | None, plans_manager: Any, preprocessed_dataset: Path, plans: str) -> list[str]:
    """The configurations asked for, or one for each folder of preprocessed labeled cases."""
    available = plans_manager.available_configurations
    unknown = [name for name in asked or () if name not in available]
    if unknown:
        raise UserError(f"{plans} has no configuration {', '.join(unknown)}; {listing('it has', available)}")
    if asked:
        return asked
    folders: dict[str, str] = {}
    for name in available:
        # A cascade's second stage has the same images as the configuration it refines.
        identifier = plans_manager.get_configuration(name).data_identifier
        if (preprocessed_dataset / identifier).is_dir():
            folders.setdefault(identifier, name)
    if not folders:
        raise UserError(
            f"No labeled cases are preprocessed in {preprocessed_dataset}, so the configuration is not known. Choose "
            f"one with -c; {listing('the plans have', available)}"
        )
    return list(folders.values())
