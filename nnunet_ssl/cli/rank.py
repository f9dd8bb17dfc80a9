"""``nnunet-ssl rank``: what to label next, and which pseudo-labels several models agree on."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.cli.lookup import check_fold_name, dataset_folders, device_name, find_trainer, nnunet_folder, plan_again
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import planning_command, some_of

if TYPE_CHECKING:
    import torch

    from nnunet_ssl.data.queue import Model, Queue, Row
    from nnunet_ssl.data.splits import Fold
    from nnunet_ssl.ranking.cases import UnlabeledCases
    from nnunet_ssl.ranking.models import Wanted
    from nnunet_ssl.ranking.run import Ranking
    from nnunet_ssl.ranking.scores import LabeledRange

HELP = "predict unlabeled cases with several models, and rank them by how far the models agree"

_EXPLANATION = """\
Example:

  nnunet-ssl rank -d 901 -c 3d_fullres -tr CrossMatchTrainer nnUNetTrainer -f 0 1 2 3 4 -o queue

Predicts the cases of imagesUn, and those whose labels the named folds hide, with every fold of every trainer. Writes
per case the consensus of the models, where they disagree and how uncertain they are, a table (cases.csv) and a page to
look at (index.html). The first case in the table is the one to label next.

A run that was stopped goes on where it was. With other --reliable or --first, only table and page are written again.

Exit code 1 if a case could not be predicted; the others are.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl rank``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset's number or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument("-tr", required=True, nargs="+", metavar="TRAINER", help="trainers whose models predict")
    parser.add_argument(
        "-f", nargs="+", metavar="FOLD", default=["0", "1", "2", "3", "4"], help="folds (default: 0 1 2 3 4)"
    )
    parser.add_argument(
        "--models-of",
        metavar="NEW",
        help="the models are those of this dataset, which nnunet-ssl self-train has made of DATASET",
    )
    parser.add_argument(
        "-chk", metavar="CHECKPOINT", default="checkpoint_final.pth", help="checkpoint (default: %(default)s)"
    )
    parser.add_argument("-o", type=Path, required=True, metavar="QUEUE", help="folder to make, or to go on in")
    parser.add_argument(
        "--reliable",
        type=float,
        default=0.9,
        metavar="DICE",
        help="from this agreement on, a case is reliable (default: %(default)s)",
    )
    parser.add_argument(
        "--first",
        type=float,
        default=0.7,
        metavar="DICE",
        help="below this agreement, a case is one to label first (default: %(default)s)",
    )
    parser.add_argument(
        "--disable_tta", action="store_true", help="no mirroring, as for nnUNetv2_predict: faster, less accurate"
    )
    parser.add_argument(
        "-device", choices=("cpu", "cuda", "mps"), help="device (default: cuda where there is one, else cpu)"
    )


@dataclass(frozen=True)
class _Dataset:
    raw: Path
    preprocessed: Path
    results: Path
    description: dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Rank, and print what was found."""
    folds, trainers = _checked(args)
    dataset = _find_dataset(args.d)

    import torch

    from nnunet_ssl.ranking.cases import find_unlabeled
    from nnunet_ssl.ranking.folder import agree, open_folder, read_done
    from nnunet_ssl.ranking.models import Wanted, check_alike, check_there
    from nnunet_ssl.ranking.run import Ranking, Thresholds

    trained = dataset if args.models_of is None else _find_dataset(args.models_of)
    wanted = Wanted(trained.results, trainers, args.p, args.c, folds, args.chk)
    check_there(wanted)
    for trainer in trainers:
        find_trainer(trainer)
    check_alike(wanted, dataset.description)
    device = torch.device(device_name(args.device))
    models, named = _models(wanted, dataset, trained)
    found = find_unlabeled(dataset.raw, dataset.description, named, models)
    queue = _queue(args, dataset, found, models)
    with open_folder(args.o):
        queue = agree(args.o, queue)
        print(*found.notes, sep="\n", end="\n" if found.notes else "", flush=True)
        ranking = Ranking(
            args.o,
            dataset.raw,
            queue,
            read_done(args.o, queue),
            _ranges(args.o, dataset, queue),
            Thresholds(args.reliable, args.first),
            dict(found.problems),
        )
        try:
            _predict(ranking, wanted, dataset, device)
        except BaseException:
            # What was done before an interruption can be looked at.
            if ranking.done:
                with suppress(UserError):
                    ranking.publish()
            raise
        _report(ranking, ranking.publish())
    return 1 if ranking.problems else 0


def _checked(args: argparse.Namespace) -> tuple[list[int | str], list[str]]:
    for fold in args.f:
        check_fold_name(fold)
    if Path(args.chk).name != args.chk:
        raise UserError(f"-chk is {args.chk!r}; it must be the name of a file in the folds' folders.")
    if not 0 <= args.first <= args.reliable <= 1:
        raise UserError(
            f"--first is {args.first:g} and --reliable {args.reliable:g}; give Dice from 0 to 1, --first the lower one."
        )
    folds: list[int | str] = [fold if fold == "all" else int(fold) for fold in args.f]
    return list(dict.fromkeys(folds)), list(dict.fromkeys(args.tr))


def _find_dataset(dataset: str) -> _Dataset:
    results = nnunet_folder("nnUNet_results", "nnU-Net keeps trained models there.")
    to_plan = f"Plan the dataset: {planning_command(dataset)}."
    folders = dataset_folders(dataset, otherwise=to_plan)

    from nnunet_ssl.data.nnunet_files import read_dataset_json

    description = read_dataset_json(folders.raw / "dataset.json", otherwise=plan_again(dataset))
    return _Dataset(folders.raw, folders.preprocessed, results / folders.raw.name, description)


def _models(wanted: Wanted, dataset: _Dataset, trained: _Dataset) -> tuple[list[Model], list[Fold]]:
    """The models, and the folds of the ranked dataset whose hidden cases they may rank."""
    from nnunet_ssl.data.splits import current_splits, labeled_cases
    from nnunet_ssl.ranking.models import describe
    from nnunet_ssl.ranking.rounds import source_folds, students

    labeled = labeled_cases(trained.preprocessed, trained.raw)
    splits, _ = current_splits(trained.preprocessed, trained.raw, labeled)
    models = describe(wanted, splits, labeled)
    if trained.raw == dataset.raw:
        return models, [splits[fold] for fold in wanted.folds if isinstance(fold, int)]
    roots = dataset.raw.parent, dataset.preprocessed.parent
    models = students(models, trained.raw.name, dataset.raw.name, *roots)
    splits, _ = current_splits(dataset.preprocessed, dataset.raw, labeled_cases(dataset.preprocessed, dataset.raw))
    return models, source_folds(wanted.folds, trained.raw.name, splits, *roots)


def _queue(args: argparse.Namespace, dataset: _Dataset, found: UnlabeledCases, models: list[Model]) -> Queue:
    from nnunet_ssl.data.queue import Queue
    from nnunet_ssl.data.unlabeled_cases import no_unlabeled_cases_message

    if not found.images:
        reasons = [f"{case}: {reason}" for case, reason in found.problems.items()]
        cannot = f" Cannot be used: {some_of(reasons, 5)}." if reasons else ""
        raise UserError(no_unlabeled_cases_message(dataset.raw, dataset.preprocessed) + cannot)
    order = dataset.description.get("regions_class_order")
    return Queue(
        dataset=dataset.raw.name,
        configuration=args.c,
        plans=args.p,
        file_ending=dataset.description["file_ending"],
        labels=dataset.description["labels"],
        regions_class_order=None if order is None else tuple(order),
        cases=found.images,
        models=tuple(models),
        mirroring=not args.disable_tta,
    )


def _ranges(folder: Path, dataset: _Dataset, queue: Queue) -> Mapping[str, LabeledRange]:
    from nnunet_ssl.evaluation.segmentations import Segmentations
    from nnunet_ssl.ranking.cases import labeled_ranges
    from nnunet_ssl.ranking.folder import read_ranges, write_ranges

    ranges = read_ranges(folder)
    if ranges is None:
        segmentations = Segmentations.from_dataset_json(dataset.raw / "dataset.json")
        ranges, unread = labeled_ranges(dataset.raw, dataset.description, segmentations, queue.models)
        for case, reason in unread.items():
            print(f"The labels of {case} do not count: {reason}", flush=True)
        write_ranges(folder, ranges)
    return ranges


def _predict(ranking: Ranking, wanted: Wanted, dataset: _Dataset, device: torch.device) -> None:
    to_do = ranking.to_do()
    total, count = len(ranking.queue.cases), len(ranking.queue.models)
    if not to_do:
        print(f"All {total} case(s) are predicted already.", flush=True)
        return
    before = f"; {total - len(to_do)} are done already" if len(to_do) < total else ""
    print(f"Predicting {len(to_do)} case(s) with {count} model(s) on {device.type}{before}", flush=True)

    from nnunet_ssl.ranking.prediction import Ensemble

    folders = {wanted.folder(trainer): wanted.folds for trainer in wanted.trainers}
    mirroring = ranking.queue.mirroring
    ensemble = Ensemble(folders, wanted.checkpoint, dataset.preprocessed, device=device, mirroring=mirroring)
    ranking.predict(ensemble, to_do, device)


def _report(ranking: Ranking, rows: list[Row]) -> None:
    from nnunet_ssl.data.queue import FIRST, VERDICTS
    from nnunet_ssl.ranking.run import REPLACED_FOLDER

    counts = Counter(row.verdict for row in rows)
    print(f"{len(rows)} case(s): {', '.join(f'{counts[verdict]} {verdict}' for verdict in VERDICTS)}")
    for row in rows[:5]:
        print(f"  {row.case}: {row.verdict} ({row.reason})")
    for case, reason in ranking.problems.items():
        print(f"{case} was not predicted: {reason}")
    if ranking.replaced:
        print(
            f"Predicted again: {some_of(ranking.replaced)}. Their earlier consensus is in "
            f"{ranking.folder / REPLACED_FOLDER}."
        )
    if rows and not counts[FIRST] and len(ranking.queue.models) > 1:
        print("No Dice is below --first. The first case in the table is the one that the models agree least on.")
    spent = ranking.seconds.predicting + ranking.seconds.other
    if spent:
        share = ranking.seconds.other / spent
        print(f"{spent:.0f} s, {share:.1%} of it for everything but the predictions")
    print(f"Table: {ranking.folder / 'cases.csv'}\nPage:  {ranking.folder / 'index.html'}")
