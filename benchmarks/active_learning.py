"""Which cases should a person label next: those that ``nnunet-ssl rank`` puts first, or any?

    python benchmarks/active_learning.py --raw nnUNet_raw/Dataset902_Hippocampus -o FOLDER -device cpu

Starts from the 4 labeled cases of a fold; its other training cases have hidden labels, which play the person. In each
repetition, two trainings that differ by chance alone rank these cases. Then 8 of them get labels, the first of the
queue in one arm, any in the other, and nnUNetTrainer is trained again. All steps are commands of nnU-Net and of this
package. Prints the mean Dice over the fold's validation cases, on which nothing is chosen. Run again, it goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from few_labels import make_dataset

from nnunet_ssl.cli.lookup import find_program
from nnunet_ssl.data.queue import ROWS_FILE
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.files import write_text

NUMBER, CONFIGURATION = "952", "3d_small"
CONFIGURATIONS = Path(__file__).parent / "configurations" / "Dataset902_Hippocampus.json"
# Two folds with the same cases: two trainings that differ by chance alone.
FOLDS = ("0", "1")
ARMS = ("first of the queue", "any")


@dataclass(frozen=True)
class Home:
    """A folder with nnU-Net's three, for one dataset."""

    folder: Path
    dataset: str

    @property
    def raw(self) -> Path:
        """Of the dataset, in nnUNet_raw."""
        return self.folder / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        """Of the dataset, in nnUNet_preprocessed."""
        return self.folder / "nnUNet_preprocessed" / self.dataset

    def results(self, trainer: str, fold: str) -> Path:
        """Of one training."""
        name = f"{trainer}__nnUNetPlans__{CONFIGURATION}"
        return self.folder / "nnUNet_results" / self.dataset / name / f"fold_{fold}"

    def run(self, *command: object, again: Sequence[str] = ()) -> None:
        """Run a command once, with the options ``again`` if a kill cut it off; log.txt has what it printed."""
        words = list(map(str, command))
        done = self.folder / "done.txt"
        line = shlex.join(word.replace(str(self.folder), "FOLDER") for word in words)
        if done.is_file() and line in done.read_text().splitlines():
            return
        print(f"{self.folder.name}: {line}", flush=True)
        environment = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
        environment |= {name: str(self.folder / name) for name in _FOLDERS}
        log = self.folder / "log.txt"
        with log.open("a") as output:
            code = subprocess.run(
                [find_program(words[0]), *words[1:], *again], env=environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode
        if code:
            raise SystemExit(f"{words[0]} ended with {code}; see the end of {log}")
        with done.open("a") as file:
            print(line, file=file)


_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, metavar="FOLDER", help="the dataset, with splits_final.json")
    parser.add_argument("--fold", type=int, default=1, help="whose unlabeled list is the pool (default: 1)")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="everything goes there")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--label", type=int, default=8, metavar="N", help="how many cases get labels (default: 8)")
    parser.add_argument("-tr", default="nnUNetTrainer_10epochs", help="default: %(default)s")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"))
    args = parser.parse_args()
    fold = read_splits(args.raw / "splits_final.json")[args.fold]
    start = plan(args.o.resolve() / "start", args.raw.resolve(), fold)
    for repetition in range(args.repetitions):
        repeat(start, args.raw.resolve(), fold["unlabeled"], repetition, args)
    text = report(start, args)
    print(f"\n{text}")
    write_text(args.o / "table.md", f"{text}\n")


def plan(folder: Path, source: Path, fold: Mapping[str, Sequence[str]]) -> Home:
    """The labeled cases and the validation cases with labels, the pool without; planned and preprocessed."""
    home = Home(folder, f"Dataset{NUMBER}_{source.name.partition('_')[2]}")
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    make_dataset(source, home.raw, fold, folds=len(FOLDS))
    home.run("nnUNetv2_plan_and_preprocess", "-d", NUMBER, "-c", "3d_fullres", "-np", 2, "-npfp", 2)
    file = home.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    if CONFIGURATION not in plans["configurations"]:
        plans["configurations"][CONFIGURATION] = json.loads(CONFIGURATIONS.read_text())[CONFIGURATION]
        write_text(file, json.dumps(plans, indent=2))
    home.run("nnunet-ssl", "preprocess", "-d", NUMBER, "-c", CONFIGURATION)
    return home


def repeat(start: Home, source: Path, pool: Sequence[str], repetition: int, args: argparse.Namespace) -> None:
    """Train, rank, label, train again in both arms."""
    base = _copy(start, f"{repetition}_ranking")
    for fold in FOLDS:
        _train(base, fold, args)
    queue = base.folder / "queue"
    base.run(
        *("nnunet-ssl", "rank", "-d", NUMBER, "-c", CONFIGURATION, "-tr", args.tr, "-f", *FOLDS),
        *("-o", queue, "-device", args.device),
    )
    with (queue / ROWS_FILE).open(newline="") as rows:
        first = [row["case"] for row in csv.DictReader(rows)][: args.label]
    any_ = random.Random(repetition).sample(sorted(pool), args.label)
    for arm, cases in zip(ARMS, (first, any_), strict=True):
        home = _copy(start, _folder(repetition, arm))
        home.run("nnunet-ssl", "accept", "-d", NUMBER, "--labels", source / "labelsTr", *sorted(cases))
        _train(home, FOLDS[0], args)


def _copy(start: Home, name: str) -> Home:
    home = Home(start.folder.with_name(name), start.dataset)
    if not home.folder.is_dir():
        unfinished = home.folder.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(start.folder, unfinished)
        unfinished.rename(home.folder)
    return home


def _train(home: Home, fold: str, args: argparse.Namespace) -> None:
    begun = any(home.results(args.tr, fold).glob("checkpoint_*.pth"))
    home.run(
        *("nnUNetv2_train", NUMBER, CONFIGURATION, fold, "-tr", args.tr, "-device", args.device),
        again=["--c"] if begun else [],
    )


def _summary(home: Home, fold: str, args: argparse.Namespace) -> Path:
    return home.results(args.tr, fold) / "validation" / "summary.json"


def _folder(repetition: int, arm: str) -> str:
    return f"{repetition}_{arm.replace(' ', '_')}"


def report(start: Home, args: argparse.Namespace) -> str:
    """Mean Dice before and after, and what the queue gained over any cases."""

    def dice(name: str, fold: str) -> float:
        home = Home(start.folder.with_name(name), start.dataset)
        return float(json.loads(_summary(home, fold, args).read_text())["foreground_mean"]["Dice"])

    rows, gains = [], []
    for repetition in range(args.repetitions):
        before = [dice(f"{repetition}_ranking", fold) for fold in FOLDS]
        after = [dice(_folder(repetition, arm), FOLDS[0]) for arm in ARMS]
        gains.append(after[0] - after[1])
        rows.append([str(repetition), " / ".join(f"{one:.3f}" for one in before), *(f"{one:.3f}" for one in after)])
        rows[-1].append(f"{gains[-1]:+.3f}")
    head = ["repetition", "before", *(f"{args.label} more: {arm}" for arm in ARMS), "difference"]
    spread = f", standard deviation {statistics.stdev(gains):.3f}" if len(gains) > 1 else ""
    return f"{format_table(head, rows, style='markdown')}\n\nMean difference {statistics.mean(gains):+.3f}{spread}"


if __name__ == "__main__":
    main()
