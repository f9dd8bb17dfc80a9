"""Make docs/leaderboard.md, its picture and README's gains from the campaigns' tables: python benchmarks/leaderboard.py

Each folder of benchmarks/results/campaign holds results.csv and campaign.json of one campaign, as ``nnunet-ssl
benchmark`` wrote them. Run it again after one of them has changed, then put the table of ``nnunet-ssl
methods --markdown`` into README.md; tests compare page, gains and README with the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
from matplotlib.figure import Figure
from small_plans import COARSER, SMALL

from nnunet_ssl.benchmark.arms import BASELINE
from nnunet_ssl.benchmark.campaign import Campaign, options_of, read_campaign
from nnunet_ssl.benchmark.report import Gain, Report
from nnunet_ssl.benchmark.results import Run, read_runs
from nnunet_ssl.cli.methods import GAINS
from nnunet_ssl.data.nnunet_files import read_json
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.files import write_text
from nnunet_ssl.text import dataset_number

HOME = Path(__file__).resolve().parent
RESULTS, PAGE = HOME / "results" / "campaign", HOME.parent / "docs" / "leaderboard.md"
OF_README = "LeftAtrium, 2 labeled"
"""Title of the column whose gains ``nnunet-ssl methods`` and README show."""

ENOUGH = 3
"""Trainings of an arm; of fewer the page says that they are too few."""


@dataclass(frozen=True)
class Column:
    """One setting of one campaign.

    Attributes:
        campaign: of the setting.
        report: on the campaign.
        setting: its name in the campaign.
        gains: in Dice, mean of structures, by arm, nnUNetTrainer's first.
    """

    campaign: Campaign
    report: Report
    setting: str
    gains: dict[str, Gain]

    @property
    def title(self) -> str:
        """Dataset and setting, without the fold where the number of labeled cases says which it is."""
        short = [re.sub(r"^fold \d+, ", "", setting) for setting in (self.setting, *self.report.settings)]
        name = short[0] if short.count(short[0]) == 2 else self.setting
        return f"{self.campaign.dataset.partition('_')[2]}, {name}"

    @property
    def spread(self) -> float:
        """Standard deviation of nnUNetTrainer's trainings; nan of one."""
        return self.gains[BASELINE].spread


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of campaigns (default: this project's)")
    parser.add_argument("-o", type=Path, default=PAGE, metavar="FILE", help="page to write (default: docs/...)")
    parser.add_argument("--gains", type=Path, default=GAINS, metavar="FILE", help=f"file for the gains on {OF_README}")
    args = parser.parse_args()
    try:
        reports = read_reports(args.results)
        write_text(args.o, make_page(reports), otherwise="Choose another file with -o.")
        write_text(args.gains, gains_of_readme(reports), otherwise="Choose another file with --gains.")
        draw(_compared(_columns(reports)), args.o.with_name("leaderboard.png"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_reports(results: Path) -> list[tuple[Campaign, Report]]:
    """All campaigns of a folder.

    Raises:
        UserError: there is none; or a table is broken, holds trainings of several campaigns, or is not that of its
            campaign.json.
    """
    files = list(results.glob("*/results.csv"))
    if not files:
        raise UserError(f"There is no campaign in {results}: no folder in it has a results.csv. Correct --results.")
    return sorted((_read(file.parent) for file in files), key=lambda one: one[0].dataset)


def _columns(reports: Sequence[tuple[Campaign, Report]]) -> list[Column]:
    return [
        Column(campaign, report, setting, report.overall(setting))
        for campaign, report in reports
        for setting in report.settings
    ]


def _compared(columns: Sequence[Column]) -> list[Column]:
    """Those with more than nnUNetTrainer."""
    return [column for column in columns if len(column.gains) > 1]


def _arms(columns: Sequence[Column]) -> list[str]:
    """All arms, nnUNetTrainer first, then as the table has them."""
    arms = dict.fromkeys(arm for column in columns for arm in column.gains)
    return sorted(arms, key=lambda arm: _rank(arm, columns))


def make_page(reports: Sequence[tuple[Campaign, Report]]) -> str:
    """The page on campaigns."""
    columns = _columns(reports)
    several = _compared(columns)
    parts = ["# Leaderboard"]
    if several:
        parts += _verdicts(several)
    runs = [run for _, report in reports for run in report.runs]
    parts.append(_origin(runs))
    if several:
        parts += [f"![Gain of each arm over {BASELINE}](leaderboard.png)", _table(several), _READ]
    alone = [column for column in columns if column not in several]
    if alone:
        parts.append("nnUNetTrainer alone: " + "; ".join(_trained_alone(column) for column in alone) + ".")
    parts += ["## What it does not show", _limits(reports, several), _READ_BELOW]
    for campaign, report in reports:
        parts += _section(campaign, report)
    return "\n\n".join(parts) + "\n"


def gains_of_readme(reports: Sequence[tuple[Campaign, Report]]) -> str:
    """The gains of the trainers that have their own settings in the column :data:`OF_README`, as JSON."""
    measured, gains = f"{OF_README}: no campaign", {}
    for column in _columns(reports):
        if column.title != OF_README:
            continue
        run = column.report.runs[0]
        measured = (
            f"{column.title}: Dice minus nnUNetTrainer's, {column.campaign.configuration}, {run.about['iterations']} "
            f"labeled iterations, {len(run.result.cases)} validation cases, interval over cases and trainings"
        )
        for arm, gain in sorted(column.gains.items()):
            # Other arms have settings or a start of their own; of one case there is no interval.
            if re.fullmatch(r"\w+", arm) and not math.isnan(gain.low):
                ends = {name: round(getattr(gain, name), 3) for name in ("difference", "low", "high")}
                gains[arm] = {**ends, "trainings": gain.runs}
    return json.dumps({"measured": measured, "gains": gains}, indent=2) + "\n"


@mpl.style.context("default")  # nnU-Net's curves change the size of all later text in a process
def draw(columns: Sequence[Column], file: Path) -> None:
    """Each arm's gain in Dice, a color per setting; hollow where there are too few trainings."""
    arms = _arms(columns)[1:]
    if not arms:
        file.unlink(missing_ok=True)
        return
    # Two settings side by side in the legend: four are wider than the figure.
    figure = Figure((8, 1.2 + 0.2 * (len(columns) // 2) + 0.16 * len(arms) * (len(columns) + 1)), layout="constrained")
    axis = figure.subplots()
    for index, column in enumerate(columns):
        color = mpl.colormaps["tab10"](index)
        title = f"{column.title} ({column.gains[BASELINE].mean:.2f})"
        for place, arm in enumerate(arms):
            gain = column.gains.get(arm)
            if gain is None:
                continue
            y = place + (index + 1) / (len(columns) + 1) - 0.5
            if not math.isnan(gain.low):
                axis.plot((gain.low, gain.high), (y, y), color=color, linewidth=1.5)
            face = color if gain.runs >= ENOUGH else "white"
            axis.plot(gain.difference, y, "o", color=color, markerfacecolor=face, markersize=6, label=title)
            title = "_"  # one entry per setting
    axis.axvline(0, color="gray", linewidth=1)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    # Of the figure: below an axis that long names of arms have moved to the right, it would be cut off.
    figure.supxlabel(
        f"Dice minus that of {BASELINE}, which is given in brackets\n"
        f"95 % interval; hollow: fewer than {ENOUGH} trainings",
        fontsize="medium",
    )
    axis.grid(axis="x", alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(file, dpi=120)


_READ = f"""\
The table gives the mean Dice over structures, validation cases and trainings. In brackets: the difference to
nnUNetTrainer, paired over the cases, and its 95 % interval over cases and trainings. An interval that contains 0 does
not show a difference. n is the number of trainings; fewer than {ENOUGH} are "too few" for a conclusion. Cost is the
time of a step divided by the time of a step of nnUNetTrainer (on a CPU, processor time). Newer trainings measure both
in one process. Older ones measured only their own step, which is divided by that of nnUNetTrainer's trainings. The
cost is empty if the machine had another speed at that time. Arms with more columns come first, then those with the
larger mean difference. [Chance](explanation/chance.md) explains why the spread of trainings matters. `@self-train=1`
is [self-training](how-to/benchmark.md#arms): its cost is that of the steps of its three trainings. The ranking, which
predicts all unlabeled cases, only counts in the training minutes below."""

_READ_BELOW = f"""\
The tables below have every structure of every setting. Above them, each version of this package has the checksum of its
source in brackets. If trainings differ in a value, each value is followed by its number of trainings, in brackets. In
the tables of costs, × of steps and trainings is relative to {BASELINE}'s steps in the same process. So it is not always
the quotient of the times in the table."""


def _read(folder: Path) -> tuple[Campaign, Report]:
    campaign, report = read_campaign(folder), Report(list(read_runs(folder / "results.csv").values()))
    written = report.runs[0].about["campaign"]
    if written != campaign.identifier:
        raise UserError(
            f"{folder}: results.csv is of the campaign {written}, campaign.json of {campaign.identifier}. Copy both "
            "from one campaign."
        )
    for setting in report.settings:
        if BASELINE not in report.in_setting(setting):
            raise UserError(f"{folder}: {setting} has no training of {BASELINE}, with which arms are compared.")
    return campaign, report


_NOT_SHOWN = "an interval that contains 0 does not show a difference: see the table"


def _verdicts(columns: Sequence[Column]) -> list[str]:
    """Who loses and who gains more than the spread of nnUNetTrainer's trainings: the first lines of the page."""
    known = [column for column in columns if not math.isnan(column.spread)]
    parts = []
    for where, sign in (("Below", -1), ("Above", 1)):
        arms: dict[str, list[str]] = {}
        for column in known:
            for arm, gain in column.gains.items():
                if sign * gain.difference > column.spread:
                    arms.setdefault(arm, []).append(f"{column.title} {gain.difference:+.3f} ({_trainings(gain)})")
        heading = f"**{where} {BASELINE} by more than {BASELINE}'s own trainings differ**"
        listed = "\n".join(f"- {arm}: {'; '.join(places)}" for arm, places in arms.items())
        parts += [f"{heading}, in Dice ({_NOT_SHOWN}):", listed] if listed else [f"{heading}: none."]
    spreads = [
        f"{column.title} {column.spread:.3f} ({column.gains[BASELINE].runs} trainings)"
        if column in known
        else f"{column.title} not known (one training), so it is not listed above"
        for column in columns
    ]
    return [*parts, f"The spread is the standard deviation of {BASELINE}'s trainings in Dice: {'; '.join(spreads)}."]


def _origin(runs: Sequence[Run]) -> str:
    dates = sorted(run.about["date"] for run in runs)
    command = "Made by `python benchmarks/leaderboard.py` from the tables of campaigns in `benchmarks/results/campaign`"
    return f"{command}: {len(runs)} trainings, {dates[0]} to {dates[-1]} UTC."


def _difference(gain: Gain) -> str:
    interval = "no interval" if math.isnan(gain.low) else f"{gain.low:+.3f} to {gain.high:+.3f}"
    return f"{gain.difference:+.3f}, {interval}"


def _trainings(gain: Gain) -> str:
    return f"n = {gain.runs}" + (", too few" if gain.runs < ENOUGH else "")


def _table(columns: Sequence[Column]) -> str:
    costs = [{cost.arm: cost.relative_step for cost in column.report.costs(column.setting)} for column in columns]
    rows: list[list[object]] = []
    for arm in _arms(columns):
        cells = [_cell(column.gains.get(arm)) for column in columns]
        known = [cost[arm] for cost in costs if not math.isnan(cost.get(arm, math.nan))]
        rows.append([arm, *cells, " to ".join(dict.fromkeys(f"{end(known):.1f}" for end in (min, max) if known))])
    return format_table(["arm", *(column.title for column in columns), "cost, ×"], rows, style="markdown")


def _rank(arm: str, columns: Sequence[Column]) -> tuple[bool, int, float]:
    differences = [column.gains[arm].difference for column in columns if arm in column.gains]
    return arm != BASELINE, -len(differences), -sum(differences) / len(differences)


def _cell(gain: Gain | None) -> str | None:
    if gain is None:
        return None
    compared = "" if math.isnan(gain.difference) else f" ({_difference(gain)})"
    return f"{gain.mean:.3f}{compared}; {_trainings(gain)}"


def _trained_alone(column: Column) -> str:
    gain = column.gains[BASELINE]
    return f"{column.title} {_cell(gain)}"


def _limits(reports: Sequence[tuple[Campaign, Report]], columns: Sequence[Column]) -> str:
    lines = []
    for campaign, report in reports:
        run = report.runs[0]
        names = ", ".join(dict.fromkeys(f"{one.about['iterations']}" for one in report.runs))
        lines.append(
            f"- {campaign.dataset}: {names} labeled iterations of a small network (`{campaign.configuration}`). "
            f"nnU-Net trains its own, larger networks for 250,000. {len(run.result.cases)} validation cases, one draw "
            "of labeled cases for each setting."
        )
    compared = sum(len(column.gains) - 1 for column in columns)
    if compared > 1:
        lines.append(
            f"- Chance in many comparisons: the table has {compared} differences. Of 20 differences by chance alone, "
            "one has an interval without 0."
        )
    lines += [
        "- The effect of tuning: each arm has the default settings, except those that it names.",
        "- Which of two methods is better: each is only compared with nnUNetTrainer.",
        "- Other organs, scanners, numbers of labels and lengths. Try your own data: [pilot](how-to/pilot.md).",
    ]
    return "\n".join(lines)


def _section(campaign: Campaign, report: Report) -> Iterator[str]:
    yield f"## {campaign.dataset}"
    yield from report.conditions()
    for setting in report.settings:
        yield f"### {campaign.dataset.partition('_')[2]}, {setting}"
        yield from report.tables(setting)
    yield (
        "To repeat a row, keep nnUNetTrainer and the row's arm after `-tr`. You need the same cases, the same folds "
        f"(`benchmarks/results/campaign/{campaign.folder.name}/campaign.json` lists their cases) and the same scans in "
        "`imagesUn` ([how many](explanation/evidence.md)). Prepare once:"
    )
    yield _code(_preparation(campaign))
    if _more_configurations(campaign) is not None:
        yield (
            f"If the plans already have another `{campaign.configuration}`, such as that of `nnunet-ssl plan-small`, "
            f"`--configurations` is refused. Rename that one in `{campaign.plans}.json` first."
        )
    yield _code([_command(campaign, report, setting) for setting in report.settings])


def _code(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for command in lines for line in command.split("\n"))


def _more_configurations(campaign: Campaign) -> Path | None:
    file = HOME / "configurations" / f"{campaign.dataset}.json"
    return file if file.is_file() and campaign.configuration in read_json(file, otherwise="Restore it.") else None


def _preparation(campaign: Campaign) -> list[str]:
    """Commands that plan and preprocess what the campaign trains on."""
    more = _more_configurations(campaign)
    number = dataset_number(campaign.dataset)
    plan = f"nnUNetv2_plan_and_preprocess -d {number} -c "
    if more is not None:
        return [plan + read_json(more, otherwise="Restore it.")[campaign.configuration]["inherits_from"]]
    if campaign.configuration not in SMALL:
        return [plan + campaign.configuration]
    commands = [plan + SMALL[campaign.configuration][0], f"python benchmarks/small_plans.py -d {number}"]
    if campaign.configuration in COARSER:
        commands.append(f"nnUNetv2_preprocess -d {number} -c {campaign.configuration}")
    return commands


def _command(campaign: Campaign, report: Report, setting: str) -> str:
    """The call of ``nnunet-ssl benchmark`` that trains all rows of a setting."""
    arms = report.in_setting(setting)
    about = report.runs[0].about
    device = about["device"].partition(":")[0]
    more = _more_configurations(campaign)
    words = ["nnunet-ssl", "benchmark", "-d", campaign.dataset, "-c", campaign.configuration, "-p", campaign.plans]
    words += ["--configurations", f"benchmarks/configurations/{more.name}"] if more is not None else []
    words += ["--compile"] if device == "cpu" and about["compiled"] == "True" else []
    words += ["-device", device, "--epochs", str(campaign.epochs), *options_of(setting)]
    words += [] if campaign.validation is None else ["--validate", str(campaign.validation)]
    seeds = sorted({int(run.about["seed"]) for runs in arms.values() for run in runs})
    words += ["--seeds", *map(str, seeds), "-o", f"repeated_{dataset_number(campaign.dataset)}"]
    threads = f"OMP_NUM_THREADS={about['threads']} " if device == "cpu" else ""
    return f"{threads}{shlex.join(words)} \\\n    -tr {shlex.join(arms)}"


if __name__ == "__main__":
    sys.exit(main())
