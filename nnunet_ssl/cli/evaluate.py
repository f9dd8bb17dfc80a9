"""``nnunet-ssl evaluate``: the metrics of the papers' tables, per case and structure."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_ssl.cli.prediction_arguments import (
    add_label_options,
    add_processes_option,
    make_folder,
    processes,
    report_problems,
    segmentations_of,
)
from nnunet_ssl.errors import UserError

HELP = "Dice, Jaccard, HD95, ASD and ASSD of predictions, per case and class or region"

_EXPLANATION = """\
The definitions are those of MedPy, which most papers use. A surface voxel belongs to the mask, but not to its erosion
by a cross. HD95 is the 95th percentile of the distances in both directions together. ASD is the mean distance from the
prediction to the reference, ASSD the mean in both directions. Distances are in millimeters, in the files also in
voxels.

If only one of prediction and reference is empty, Dice and Jaccard are 0, and distances are missing. Missing distances
do not count as 0; the table gives their number. If both are empty, all values are missing, as in nnU-Net's own
evaluation. In images without spacing, such as PNG, a pixel is 1 mm wide.

Writes evaluation.csv and evaluation.json. Exit code 1 if a case could not be evaluated or has no prediction.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl evaluate``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("-p", required=True, type=Path, metavar="PREDICTIONS", help="folder of predictions")
    parser.add_argument("-g", required=True, type=Path, metavar="REFERENCES", help="folder of reference segmentations")
    parser.add_argument(
        "-o",
        type=Path,
        metavar="FOLDER",
        help="folder for evaluation.csv and evaluation.json (default: that of the predictions)",
    )
    parser.add_argument("--per-case", action="store_true", help="print every case, not only mean and spread")
    parser.add_argument(
        "--chill", action="store_true", help="accept references without prediction, as nnUNetv2_evaluate_folder does"
    )
    add_processes_option(parser)
    add_label_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, write the files."""
    from nnunet_ssl.evaluation.folders import evaluate_folder
    from nnunet_ssl.evaluation.metrics import METRICS
    from nnunet_ssl.evaluation.result_files import write_csv, write_json
    from nnunet_ssl.evaluation.tables import format_table, summarize

    for option, folder in (("-p", args.p), ("-g", args.g)):
        if not folder.is_dir():
            raise UserError(f"{option} {folder}: there is no folder {folder.resolve()}.")
    segmentations = segmentations_of(args, [args.p])
    workers = processes(args.np, len(segmentations.cases(args.p)))
    output = make_folder(args.o or args.p)
    result = evaluate_folder(args.p, args.g, segmentations, num_processes=workers)
    write_csv(output / "evaluation.csv", {"": result})
    write_json(output / "evaluation.json", result)
    if result.cases:
        if args.per_case:
            rows = [
                [case.case, structure, *(getattr(metrics, metric) for metric in METRICS)]
                for case in result.cases
                for structure, metrics in case.metrics.items()
            ]
            print(format_table(["case", "structure", *METRICS], rows) + "\n")
        print(summarize({"": result.cases}))
        print(f"mean ± standard deviation over the cases; {output / 'evaluation.csv'} has all")
    problems = report_problems({str(args.p): result}, chill=args.chill)
    if not result.cases:
        raise UserError("No case could be evaluated; the table above says why.")
    return 1 if problems else 0
