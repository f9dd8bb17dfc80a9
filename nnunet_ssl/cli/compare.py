"""``nnunet-ssl compare``: several models on the same cases, with paired differences."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.cli.lookup import dataset_folder, trained_model
from nnunet_ssl.cli.prediction_arguments import (
    add_label_options,
    add_processes_option,
    make_folder,
    named_folders,
    processes,
    report_problems,
    segmentations_of,
)
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.evaluation.folders import FolderResult

FEW_CASES = 10
"""Pairs below which the tables are followed by what so few cannot show."""

HELP = "compare trainers on the same cases: spread, paired differences, confidence intervals, figure"

_EXPLANATION = """\
Examples:

  nnunet-ssl compare -d 901 -c 3d_fullres -f 0 -tr nnUNetTrainer UniMatchTrainer
  nnunet-ssl compare -g labelsTs nnU-Net=predictions/a nnU-Net=predictions/b UniMatch=predictions/c

The first compares the validation predictions of trained models, the second any folders. Folders of one name that hold
the same cases are runs (trainings with other seeds); folders with other cases (folds) are joined to one run.

The first name is the baseline. A difference is the mean over the cases of the means over the runs; its interval is a
95 % bootstrap over cases and runs; p is Wilcoxon's signed-rank test over the cases, two-sided, and not corrected for
the number of comparisons. Pairs of which one has no distance are left out; 'pairs' counts the others. Where a structure
is in neither reference nor prediction, Dice and Jaccard are 1 here, and missing in evaluate.

--best NAME=FOLDER names predictions of the same cases with checkpoint_best. The column 'best - last' then shows how
much the choice of a checkpoint changes the result: where the best one was chosen on these very cases, that is no gain.

With -o: comparison.csv (all values), comparison.md, comparison.tex (booktabs) and comparison.png.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl compare``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="NAME=FOLDER",
        help="predictions; the first name is the baseline; folders of one name with the same cases are runs, with "
        "other cases (folds) are joined",
    )
    parser.add_argument(
        "-g", type=Path, metavar="REFERENCES", help="reference segmentations (default: gt_segmentations of -d)"
    )
    parser.add_argument(
        "-tr",
        nargs="+",
        default=[],
        metavar="TRAINER",
        help="compare validation predictions of these trained models; also give -d and -c",
    )
    parser.add_argument("-c", metavar="CONFIGURATION", help="configuration of the trained models")
    parser.add_argument("-f", nargs="+", default=["0"], metavar="FOLD", help="folds of the trained models (default: 0)")
    parser.add_argument(
        "-p",
        default="nnUNetPlans",
        metavar="PLANS",
        help="plans identifier of the trained models (default: %(default)s)",
    )
    parser.add_argument(
        "--best",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="predictions of the same cases with checkpoint_best, for the column 'best - last'",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["dice", "hd95"],
        metavar="METRIC",
        help="any of dice jaccard hd95 asd assd hd95_voxels asd_voxels assd_voxels; the first is drawn "
        "(default: dice hd95)",
    )
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="folder for comparison.csv, .md, .tex (booktabs) and .png"
    )
    parser.add_argument(
        "--chill", action="store_true", help="as in nnUNetv2_evaluate_folder: references without prediction are fine"
    )
    add_processes_option(parser)
    add_label_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate all folders, print a table per metric, write the files."""
    from nnunet_ssl.evaluation.comparison import compare, join_runs
    from nnunet_ssl.evaluation.folders import FolderResult, evaluate_folder
    from nnunet_ssl.evaluation.metrics import METRICS
    from nnunet_ssl.evaluation.tables import format_table

    unknown = [metric for metric in args.metrics if metric not in METRICS]
    if unknown:
        raise UserError(f"--metrics {' '.join(unknown)}: there are {', '.join(METRICS)}.")
    validations = _validations(args)
    folders, best = _named_models(args, validations)
    everything = [path for paths in (*folders.values(), *best.values()) for path in paths]
    segmentations = segmentations_of(args, everything)
    references = _references(args)
    workers = processes(args.np, sum(len(segmentations.cases(path)) for path in everything))
    if args.o:
        make_folder(args.o)

    by_folder: dict[str, FolderResult] = {}

    def evaluate(paths: Sequence[Path]) -> list[FolderResult]:
        for path in paths:
            by_folder[str(path)] = evaluate_folder(path, references, segmentations, num_processes=workers)
        return join_runs([by_folder[str(path)] for path in paths])

    models = {name: evaluate(paths) for name, paths in folders.items()}
    best_runs = {name: evaluate(paths) for name, paths in best.items()}
    found = {path: FolderResult(failed=result.failed) for path, result in by_folder.items()}
    for name, runs in [*models.items(), *((f"{name}, best", runs) for name, runs in best_runs.items())]:
        # The validation of some folds never has all the references.
        if name not in validations:
            found |= {f"{name}, run {number}": FolderResult(missing=run.missing) for number, run in enumerate(runs, 1)}
    problems = report_problems(found, chill=args.chill)
    _check_cases(models)

    structures = list(segmentations.labels)
    tables = []
    for metric in args.metrics:
        header, rows = compare(models, structures, metric, best=best_runs)
        print(f"\n{metric}\n{format_table(header, rows)}")
        tables.append((metric, header, rows))
    notes = limits_of(models)
    print("".join(f"\n{note}" for note in notes))
    if args.o:
        _write(args.o, models, best_runs, structures, tables, notes)
    return 1 if problems else 0


def _named_models(
    args: argparse.Namespace, validations: dict[str, list[Path]]
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """The models' folders of predictions by name, and those with the best checkpoint."""
    folders = dict(validations)
    for name, paths in named_folders(args.folders, "NAME=FOLDER").items():
        folders[name] = folders.get(name, []) + paths
    if len(folders) < 2:
        raise UserError("Name at least two models, as NAME=FOLDER or with -d, -c and -tr.")
    best = named_folders(args.best, "--best")
    strangers = [name for name in best if name not in folders]
    if strangers:
        raise UserError(f"--best names {', '.join(strangers)}; the models are {', '.join(folders)}.")
    return folders, best


def _references(args: argparse.Namespace) -> Path:
    if args.g is not None:
        return args.g
    if not args.d:
        raise UserError("Give the folder of the reference segmentations with -g, or the dataset with -d.")
    return dataset_folder(args.d, "gt_segmentations") / "gt_segmentations"


def _check_cases(models: dict[str, list[FolderResult]]) -> None:
    """Whether there is something to compare; tells where the models have different cases."""
    from nnunet_ssl.evaluation.comparison import common_cases

    empty = [name for name, runs in models.items() if not any(one.cases for one in runs)]
    if empty:
        raise UserError(f"No case of {', '.join(empty)} could be evaluated; the table above says why.")
    cases = {name: common_cases(runs) for name, runs in models.items()}
    baseline = next(iter(cases))
    apart = [name for name in cases if not cases[name] & cases[baseline]]
    if apart:
        raise UserError(
            f"{', '.join(apart)} and {baseline} have no case in common that all their runs have, so there is nothing "
            "to compare. Predict the same cases, or name folders of the same folds."
        )
    if any(one != cases[baseline] for one in cases.values()):
        print("\nNot all have the same cases: each mean is over a model's own, each difference over those in common.")


def limits_of(models: dict[str, list[FolderResult]]) -> list[str]:
    """What the tables cannot show, for few cases and few trainings.

    The smallest two-sided p of the signed-rank test on n pairs is 2 / 2ⁿ, where all differences have one sign.
    """
    from nnunet_ssl.evaluation.comparison import common_cases

    baseline, *others = (common_cases(runs) for runs in models.values())
    pairs = min(len(baseline & cases) for cases in others)
    notes = []
    if 2 <= pairs < FEW_CASES:
        notes.append(
            f"Few cases: with {pairs} pairs p cannot be below {2 / 2**pairs:.2g}, however large the difference is. An "
            "interval from so few cases is too narrow."
        )
    if all(len(runs) == 1 for runs in models.values()):
        notes.append(
            "One training each: the intervals hold the chance of the cases, not that of trainings. Another training "
            "with the same settings may differ as much. Compare several: give their folders under one name."
        )
    return notes


def _write(
    folder: Path,
    models: dict[str, list[FolderResult]],
    best_runs: dict[str, list[FolderResult]],
    structures: list[str],
    tables: Sequence[tuple[str, list[str], list[list[Any]]]],
    notes: Sequence[str],
) -> None:
    """Write values, tables (metric, header, rows), what they cannot show, and the figure of the first metric."""
    from nnunet_ssl.evaluation.pictures import save_comparison
    from nnunet_ssl.evaluation.result_files import write_csv
    from nnunet_ssl.evaluation.tables import format_table
    from nnunet_ssl.files import ELSEWHERE, write_text

    rows_of = {f"{name} run {number}": run for name, runs in models.items() for number, run in enumerate(runs)}
    for name, runs in best_runs.items():
        rows_of |= {f"{name} best, run {number}": run for number, run in enumerate(runs)}
    write_csv(folder / "comparison.csv", rows_of, key="model")
    markdown = [f"{metric}\n\n{format_table(header, rows, style='markdown')}\n" for metric, header, rows in tables]
    write_text(folder / "comparison.md", "\n".join([*markdown, *(f"{note}\n" for note in notes)]), otherwise=ELSEWHERE)
    latex = [f"% {metric}\n{format_table(header, rows, style='latex')}\n" for metric, header, rows in tables]
    write_text(folder / "comparison.tex", "\n".join(latex), otherwise=ELSEWHERE)
    save_comparison(folder / "comparison.png", models, structures, tables[0][0])
    print(f"\n{folder}: comparison.csv, comparison.md, comparison.tex, comparison.png")


def _validations(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Folders of the validation predictions of trained models."""
    if not args.tr:
        return {}
    if not (args.d and args.c):
        raise UserError("-tr names trained models: give their dataset and configuration too, with -d and -c.")
    folders: dict[str, list[Path]] = {}
    for trainer in args.tr:
        model = trained_model(args.d, trainer, args.p, args.c)
        for fold in args.f:
            validation = model / f"fold_{fold}" / "validation"
            # What nnU-Net writes last.
            if not (validation / "summary.json").is_file():
                raise UserError(
                    f"There is no finished validation in {validation}: nnU-Net makes it after the training, or with "
                    f"nnUNetv2_train {args.d} {args.c} {fold} -tr {trainer} -p {args.p} --val"
                )
            folders.setdefault(trainer, []).append(validation)
    return folders
