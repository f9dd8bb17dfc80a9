"""``nnunet-ssl benchmark``: trainers compared on equal terms, with seeds, costs and intervals."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_ssl.cli.campaigns import add_machine_arguments, check_arms, check_numbers, choose_machine, find_dataset
from nnunet_ssl.errors import UserError

HELP = "train several trainers several times on equal terms, and report gains, intervals and costs"

_EXPLANATION = """\
Examples:

  nnunet-ssl benchmark -d 901 -c 2d -tr nnUNetTrainer CrossMatchTrainer --labeled 2 8 --seeds 0 1 2 --epochs 10 -o bench
  nnunet-ssl benchmark -o bench --table

The first command trains nnUNetTrainer and CrossMatchTrainer with 2 and with 8 labeled cases, three times each, and
writes bench/report.md, report.csv and report.png. All arms have the same labeled cases, plans and labeled iterations.
The final checkpoint is evaluated. After a stop, run it again to continue. With more arms, labels or seeds, it adds
these. Two such commands share the work, also on two machines with one file system. The second command only reports.

An arm is a trainer, or a trainer with settings: MutualReliableTrainer:mutual_weight=0.0,ramp_length=0.1.
CrossMatchTrainer@warm=0.5 trains nnUNetTrainer for half of the epochs, then CrossMatchTrainer from its weights for the
other half. With nnUNetTrainer@self-train=1, two trainings of nnUNetTrainer rank the unlabeled cases, and a third one
learns also from the half on which they agree most.

--labeled draws cases of fold 0 (or --draw-fold) as 'nnunet-ssl split' does, with seed 0. --folds uses folds of
splits_final.json unchanged. If splits_final.json lacks a fold that is needed, the command appends it. It changes
nothing else in the dataset.

Exit code 1 if a training ended without a result. The other trainings are still done.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl benchmark``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument(
        "-o",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of the campaign (one dataset, configuration and length); all files go there",
    )
    parser.add_argument("-d", metavar="DATASET", help="dataset's number or name; planned and preprocessed")
    parser.add_argument("-c", metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument(
        "-tr",
        nargs="+",
        default=[],
        metavar="ARM",
        help="trainers, optionally with settings (TRAINER:NAME=VALUE,NAME=VALUE), a warm start (TRAINER@warm=SHARE) or "
        "rounds of self-training (TRAINER@self-train=ROUNDS); "
        "they are compared with nnUNetTrainer if it is among them, or else with the first",
    )
    _add_case_arguments(parser)
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="seeds; each arm is trained once for each (default: 0 1 2)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=10,
        metavar="N",
        help="length of each training, in nnU-Net's epochs of 250 labeled iterations (default: 10)",
    )
    parser.add_argument(
        "--validate", type=int, metavar="N", help="validate on the first N validation cases by name (default: all)"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings for every arm that has them; an arm's own settings override them",
    )
    parser.add_argument(
        "--configurations", type=Path, metavar="FILE", help="JSON with more configurations, written as in the plans"
    )
    add_machine_arguments(parser)
    parser.add_argument(
        "--table",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="CSV",
        help="do not train; only report the results of the campaign or of this table",
    )


def _add_case_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labeled",
        nargs="+",
        default=[],
        metavar="N",
        help="numbers of labeled cases, or percentages such as 10%%; the cases are drawn as split does with seed 0",
    )
    parser.add_argument(
        "--draw-fold", type=int, default=0, metavar="FOLD", help="fold from which they are drawn (default: 0)"
    )
    parser.add_argument(
        "--folds",
        type=int,
        nargs="+",
        default=[],
        metavar="FOLD",
        help="folds of splits_final.json to use unchanged",
    )


def run(args: argparse.Namespace) -> int:
    """Train what is missing, then report."""
    from nnunet_ssl.benchmark.report import Report, write_report
    from nnunet_ssl.benchmark.results import read_runs

    folder = args.o.resolve()
    problems = {}
    table = folder / "results.csv"
    if args.table is None:
        problems = _train(args, folder)
        if problems and not table.is_file():
            raise UserError(f"No training has a result. {next(iter(problems.values()))}")
    elif args.table != Path():
        table = args.table
    report = Report(list(read_runs(table).values()))
    files = write_report(folder, report)
    source = f", {table.name}" if table.parent == folder else f"; from {table}"
    print(f"\n{report.markdown()}\n{folder}: {', '.join(file.name for file in files.values())}{source}")
    for key, reason in problems.items():
        print(f"{key}: {reason}")
    return 1 if problems else 0


def _train(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    _check_numbers(args)
    dataset = find_dataset(args.d, folder)

    from nnunet_ssl.benchmark.arms import parse_arms
    from nnunet_ssl.benchmark.campaign import open_campaign, plan_settings, plan_trainings
    from nnunet_ssl.benchmark.schedule import run_trainings

    arms = parse_arms(args.tr, args.settings)
    check_arms(arms, dataset, args.epochs)
    campaign = open_campaign(
        folder,
        preprocessed_folder=dataset.preprocessed,
        plans=args.p,
        configuration=args.c,
        epochs=args.epochs,
        validation=args.validate,
        configurations=args.configurations,
    )
    settings = plan_settings(
        campaign,
        preprocessed_folder=dataset.preprocessed,
        raw_folder=dataset.raw,
        labeled=args.labeled,
        folds=args.folds,
        draw_fold=args.draw_fold,
    )
    trainings = plan_trainings(arms, settings, list(dict.fromkeys(args.seeds)))
    return run_trainings(campaign, trainings, choose_machine(args))


def _check_numbers(args: argparse.Namespace) -> None:
    missing = [option for option, value in (("-d", args.d), ("-c", args.c), ("-tr", args.tr)) if not value]
    if missing:
        raise UserError(
            f"{', '.join(missing)} missing: give dataset, configuration and trainers. To report only, give --table."
        )
    if not args.labeled and not args.folds:
        raise UserError(
            "Labeled cases are missing: give numbers with --labeled, or folds of splits_final.json with --folds."
        )
    check_numbers(epochs=args.epochs, jobs=args.jobs, validate=args.validate)
    if min(args.seeds) < 0:
        raise UserError(f"--seeds contains {min(args.seeds)}; give 0 or more.")
