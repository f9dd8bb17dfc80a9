"""``nnunet-ssl pilot``: short trainings on the user's own data that say whether unlabeled images help there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.benchmark.arms import BASELINE
from nnunet_ssl.cli.campaigns import (
    Dataset,
    add_machine_arguments,
    check_arms,
    check_numbers,
    choose_machine,
    find_dataset,
)
from nnunet_ssl.cli.lookup import RECOMMENDED
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.data.splits import Fold

HELP = "will unlabeled images help on this dataset? short trainings, the gain with its interval, and a verdict"

_EXPLANATION = f"""\
Trains {BASELINE} and -tr on the dataset's own folds, one fold after the other, then again with another seed, as many as
fit into the hours. Prints the paired gain in Dice with its 95 % interval, a verdict (helps, no difference seen, hurts),
and what full trainings would cost. All files go into one folder; pilot.md has the printed text. Run it again to
continue for as many more hours.

The folds are those of splits_final.json, or else nnU-Net's own five. A fold is left out if it shares validation cases
with an earlier one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl pilot``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument(
        "-d", required=True, metavar="DATASET", help="dataset's number or name; planned and preprocessed"
    )
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument(
        "-tr",
        nargs="+",
        default=[RECOMMENDED],
        metavar="ARM",
        help=f"what to compare with nnUNetTrainer, written as for benchmark (default: {RECOMMENDED})",
    )
    parser.add_argument(
        "--hours", type=float, default=8.0, metavar="H", help="time for all trainings of this call (default: 8)"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=20,
        metavar="N",
        help="length of each training, in nnU-Net's epochs of 250 labeled iterations (default: 20)",
    )
    parser.add_argument(
        "--folds",
        type=int,
        nargs="+",
        metavar="FOLD",
        help="folds of splits_final.json (default: all, except those that share validation cases with an earlier fold)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="largest number of trainings per arm and fold (default: 3)"
    )
    parser.add_argument(
        "-o",
        type=Path,
        metavar="FOLDER",
        help="folder for all files (default: nnunet_ssl_pilot_DATASET_CONFIGURATION)",
    )
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train what fits the time, then report."""
    check_numbers(epochs=args.epochs, seeds=args.seeds, jobs=args.jobs)
    if not args.hours > 0:
        raise UserError(f"--hours is {args.hours:g}; give more than 0.")
    folder = (args.o or Path(f"nnunet_ssl_pilot_{args.d}_{args.c}")).resolve()
    dataset = find_dataset(args.d, folder)

    from nnunet_ssl.benchmark.arms import parse_arms
    from nnunet_ssl.benchmark.campaign import open_campaign, plan_settings
    from nnunet_ssl.benchmark.pilot import asked_for, in_words, run_pilot
    from nnunet_ssl.benchmark.report import Report
    from nnunet_ssl.benchmark.schedule import results_of
    from nnunet_ssl.data.splits import current_splits, labeled_cases
    from nnunet_ssl.files import ELSEWHERE, write_text

    arms = parse_arms([BASELINE, *args.tr], [])
    check_arms(arms, dataset, args.epochs)
    if len(arms) < 2:
        raise UserError(f"-tr names only {BASELINE}, with which the others are compared. Name another trainer.")
    cases = labeled_cases(dataset.preprocessed, dataset.raw)
    splits, source = current_splits(dataset.preprocessed, dataset.raw, cases)
    numbers = _choose_folds(splits, args.folds, str(source or dataset.preprocessed))
    _check_unlabeled(dataset, splits, numbers)
    campaign = open_campaign(
        folder,
        preprocessed_folder=dataset.preprocessed,
        plans=args.p,
        configuration=args.c,
        epochs=args.epochs,
        validation=None,
        configurations=None,
    )
    settings = plan_settings(
        campaign,
        preprocessed_folder=dataset.preprocessed,
        raw_folder=dataset.raw,
        labeled=[],
        folds=numbers,
        draw_fold=0,
    )
    print(f"{campaign.dataset}, {args.c}: folds {', '.join(map(str, numbers))}, at most {args.hours:g} hours, {folder}")
    problems = run_pilot(campaign, arms, settings, choose_machine(args), hours=args.hours, seeds=args.seeds)
    folds = {setting.name: splits[number] for setting, number in zip(settings, numbers, strict=True)}
    runs = asked_for(results_of(campaign).values(), arms, folds)
    if not runs:
        why = next(iter(problems.values()), "The time ended before that. Run it again: it continues for --hours more.")
        raise UserError(f"No training has a result. {why}")
    words = in_words(campaign, arms, Report(runs), folds)
    write_text(folder / "pilot.md", words, otherwise=ELSEWHERE)
    print(f"\n{words}\n{folder}: pilot.md, results.csv")
    for key, reason in problems.items():
        print(f"{key}: {reason}")
    return 1 if problems else 0


def _choose_folds(splits: list[Fold], asked: list[int] | None, source: str) -> list[int]:
    from nnunet_ssl.benchmark.pilot import disjoint_folds
    from nnunet_ssl.data.splits import name_folds

    if asked is None:
        numbers = disjoint_folds(splits)
        if not numbers:
            raise UserError(f"{source} has no fold with validation cases, which the pilot needs.")
        return numbers
    for number in asked:
        if not 0 <= number < len(splits):
            raise UserError(f"There is no fold {number}: {source} has {name_folds(len(splits))}.")
    if len(disjoint_folds([splits[number] for number in asked])) < len(asked):
        raise UserError(
            f"--folds {' '.join(map(str, asked))}: in {source} these folds share validation cases, or one has none. "
            "Each case may count only once. Name other folds."
        )
    return asked


def _check_unlabeled(dataset: Dataset, splits: list[Fold], numbers: list[int]) -> None:
    from nnunet_ssl.data.raw_cases import IMAGES_FOLDER
    from nnunet_ssl.data.unlabeled_cases import no_unlabeled_cases_message
    from nnunet_ssl.files import list_names

    images = list_names(dataset.raw / IMAGES_FOLDER) if dataset.raw else set()
    if any(not name.startswith(".") for name in images):
        return
    for number in numbers:
        if not splits[number].get("unlabeled"):
            raw = dataset.raw or Path("nnUNet_raw") / dataset.name
            raise UserError(no_unlabeled_cases_message(raw, dataset.preprocessed, number))
