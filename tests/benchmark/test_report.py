"""Gains, intervals and costs on numbers whose answers are known."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy import stats

from nnunet_ssl.benchmark.arms import short_name
from nnunet_ssl.benchmark.figure import _number_points
from nnunet_ssl.benchmark.progress import Progress, costs
from nnunet_ssl.benchmark.report import MEAN, Report, difference, standard_error, write_report
from nnunet_ssl.benchmark.results import ABOUT, Run, add_run, read_runs, write_runs
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.comparison import Scores
from nnunet_ssl.evaluation.folders import FolderResult
from nnunet_ssl.evaluation.metrics import CaseMetrics, CaseResult

NAN = math.nan
OLD = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def numbered(values):
    return Scores(tuple(map(str, range(np.shape(values)[1]))), np.array(values, float))


def run(arm, seed, dice, *, setting="2 labeled", **about):
    """``dice``: per case, a value per structure."""
    filled = dict.fromkeys(ABOUT, "") | {"campaign": "c", "arm": arm, "seed": str(seed), "setting": setting}
    filled |= {"training": f"{arm}; {setting}; seed {seed}", "device": "cpu"}
    cases = []
    for number, values in enumerate(dice):
        metrics = {f"s{index}": CaseMetrics(value, value, 10 - value) for index, value in enumerate(values)}
        cases.append(CaseResult(f"case {number}", metrics))
    return Run(filled | {name: str(value) for name, value in about.items()}, FolderResult(cases))


def test_standard_error_by_hand():
    # Squares about the means: 0.02 and 0.08 + 0.02, 0.02 + 0 -> 3 degrees of freedom with 2 and 3 trainings.
    ours, theirs = np.array([0.7, 0.9]), np.array([0.4, 0.5, 0.6])
    variance = (0.02 + 0.02) / 3
    assert standard_error(ours, theirs) == pytest.approx(math.sqrt(variance * (1 / 2 + 1 / 3)))
    # One training of ours: the baseline's spread counts for it too.
    assert standard_error(np.array([0.7]), theirs) == pytest.approx(math.sqrt(0.02 / 2 * (1 + 1 / 3)))


def test_interval_of_trainings_alone_is_students():
    # Every case gains the same: only trainings vary.
    baseline = numbered([[value, value + 0.1, value + 0.2] for value in (0.50, 0.52, 0.54)])
    model = numbered([[value, value + 0.1, value + 0.2] for value in (0.60, 0.61)])
    mean, low, high, pairs = difference(model, baseline)
    assert (mean, pairs) == (pytest.approx(0.085), 3)
    half = stats.t.ppf(0.975, 3) * standard_error(np.array([0.60, 0.61]), np.array([0.50, 0.52, 0.54]))
    assert low == pytest.approx(0.085 - half, rel=0.01) and high == pytest.approx(0.085 + half, rel=0.01)


def test_interval_of_cases_alone_is_the_bootstraps():
    # Trainings are all alike: only cases vary.
    gains = np.array([0.0, 0.1, 0.2, 0.3, 0.1, 0.0, 0.2, 0.1, 0.3, 0.2])
    baseline, model = numbered([[0.5] * 10] * 2), numbered([0.5 + gains] * 2)
    mean, low, high, _ = difference(model, baseline)
    half = 1.96 * gains.std() / math.sqrt(10)
    assert mean == pytest.approx(0.15)
    assert low == pytest.approx(0.15 - half, abs=0.01) and high == pytest.approx(0.15 + half, abs=0.01)


def test_the_baselines_spread_widens_the_interval_of_a_single_training():
    model = numbered([[0.7, 0.8, 0.9]])
    steady, noisy = (
        numbered([[base, base + 0.1, base + 0.2] for base in bases]) for bases in ((0.6,) * 3, (0.5, 0.6, 0.7))
    )
    widths = [high - low for _, low, high, _ in (difference(model, steady), difference(model, noisy))]
    assert widths[0] == pytest.approx(0, abs=1e-9) and widths[1] > 0.5


def test_one_training_each_has_no_interval_and_cases_without_a_value_no_pair():
    mean, low, high, pairs = difference(numbered([[0.7, NAN, 0.8]]), numbered([[0.6, 0.5, 0.6]]))
    assert mean == pytest.approx(0.15) and pairs == 2 and math.isnan(low) and math.isnan(high)
    assert difference(numbered([[NAN]]), numbered([[0.5]]))[3] == 0


def test_gains_by_structure_and_their_mean():
    runs = [run("nnUNetTrainer", 0, [(0.5, 0.7), (0.6, 0.8)]), run("nnUNetTrainer", 1, [(0.5, 0.7), (0.6, 0.8)])]
    runs += [run("Ours", 0, [(0.6, 0.7), (0.7, 0.8)])]
    report = Report(runs)
    gains = {(gain.structure, gain.arm): gain for gain in report.gains("2 labeled", "dice")}
    assert gains["s0", "Ours"].difference == pytest.approx(0.1) and gains["s1", "Ours"].difference == pytest.approx(0)
    assert gains[MEAN, "Ours"].difference == pytest.approx(0.05) and gains[MEAN, "Ours"].mean == pytest.approx(0.7)
    assert gains[MEAN, "nnUNetTrainer"].runs == 2 and gains[MEAN, "nnUNetTrainer"].pairs == 0
    distance = {gain.arm: gain for gain in report.gains("2 labeled", "hd95") if gain.structure == "s0"}
    assert distance["Ours"].difference == pytest.approx(-0.1)


def test_costs_are_relative_to_the_baseline_of_the_campaign():
    cost = {"seconds_per_step": 9, "peak_memory_mb": 100}
    runs = [run("nnUNetTrainer", 0, [(0.5,)], cpu_seconds_per_step=2, training_seconds=60, **cost)]
    runs += [run("nnUNetTrainer", 1, [(0.5,)], cpu_seconds_per_step=4, training_seconds=120, **cost)]
    runs += [run("Ours", 0, [(0.5,)], cpu_seconds_per_step=6, training_seconds=180, **cost)]
    base, ours = Report(runs).costs("2 labeled")
    assert (base.step, base.training, base.relative_step) == (3, 90, 1), "medians, of processor time on a CPU"
    assert (ours.relative_step, ours.relative_training, ours.relative_memory) == (2, 2, 1)
    on_gpu = [Run({**one.about, "device": "cuda: a GPU"}, one.result) for one in runs]
    assert Report(on_gpu).costs("2 labeled")[1].step == 9


def test_a_slow_day_does_not_make_an_arm_expensive():
    base = {"cpu_seconds_per_step": 2, "training_seconds": 1000, "reference_cpu_seconds_per_step": 2.5}
    # Twice as fast a machine: 3 s are three steps of nnUNetTrainer there, where 1.25 s make one of these.
    ours = {"cpu_seconds_per_step": 3, "training_seconds": 1500, "reference_cpu_seconds_per_step": 1.25}
    runs = [run("nnUNetTrainer", 0, [(0.5,)], **base), run("Ours", 0, [(0.5,)], **ours)]
    cost = Report(runs).costs("2 labeled")
    assert [one.relative_step for one in cost] == [1, pytest.approx(3)] and cost[1].step == 3
    assert [one.relative_training for one in cost] == [1, pytest.approx(3)]
    # A training of an older version has no reference: it is compared with the baseline's steps, of its times if it can.
    old = run("Old", 0, [(0.5,)], cpu_seconds_per_step=4, training_seconds=3000)
    assert Report([*runs, old]).costs("2 labeled")[2].relative_step == pytest.approx(4 / 2)
    before = run("nnUNetTrainer", 1, [(0.5,)], cpu_seconds_per_step=1, training_seconds=500)
    cost = Report([*runs, old, before]).costs("2 labeled")
    assert [one.relative_step for one in cost] == [1, pytest.approx(3), pytest.approx(4 / 1)]


def test_tables_without_references_stay_readable(tmp_path):
    write_runs(tmp_path / "new.csv", {"one": run("Ours", 0, [(0.5,)], training="one", reference_seconds_per_step=3)})
    lines = (tmp_path / "new.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    names = [name for name in lines[0].split(",") if not name.startswith("reference_")]
    old = [",".join(names), *(",".join(row[name] for name in names) for row in rows)]
    (tmp_path / "old.csv").write_text("\n".join(old) + "\n")
    assert read_runs(tmp_path / "new.csv")["one"].number("reference_seconds_per_step") == 3
    assert math.isnan(read_runs(tmp_path / "old.csv")["one"].number("reference_seconds_per_step"))


def test_a_warm_start_costs_what_its_stages_cost():
    done = Progress([10, 10, 10, 40], [1, 1, 1, 5], [0.1, 0.3, 0.2, 0.6], 7)
    about = costs(done, [3, 1], 4)
    assert about["training_seconds"] == 70
    assert float(about["seconds_per_step"]) == 2 and float(about["cpu_seconds_per_step"]) == pytest.approx(0.3)
    assert float(costs(done, [4], 4)["seconds_per_step"]) == 1, "without one, the median"
    done.between = 5
    assert costs(done, [3, 1], 4)["training_seconds"] == 75, "with what self-training does between its trainings"
    assert float(costs(done, [2, 2], 2)["seconds_per_step"]) == 1 + 3, "two trainings cost twice as much as one"
    done.references, done.cpu_references = [2.0, 2.0, 2.0, 8.0], [1.0, 1.0, 1.0, 4.0]
    about = costs(done, [2, 2], 2)
    assert float(about["reference_seconds_per_step"]) == 2, "one step, however many trainings"
    assert float(about["reference_cpu_seconds_per_step"]) == 1
    done.forget(3)
    assert done == Progress([10, 10, 10], [1, 1, 1], [0.1, 0.3, 0.2], 7, 5, [2.0] * 3, [1.0] * 3)


def test_campaigns_are_not_mixed():
    with pytest.raises(UserError, match="2 campaigns"):
        Report([run("nnUNetTrainer", 0, [(0.5,)]), run("Ours", 0, [(0.5,)], campaign="another")])
    with pytest.raises(UserError, match="nothing to report"):
        Report([])


def test_other_versions_and_lengths_are_seen():
    about = {"dataset": "D", "iterations": 250, "torch": "2.2", "date": "2026-01-01"}
    runs = [run("nnUNetTrainer", 0, [(0.5,)], **about), run("Ours", 0, [(0.5,)], **about)]
    assert "torch 2.2, device cpu" in Report(runs).markdown()
    runs.append(run("Ours", 1, [(0.5,)], **{**about, "torch": "2.3", "iterations": 500}))
    text = Report(runs).markdown()
    assert "torch 2.2 (2) or 2.3 (1)" in text and "Not all trainings have the same number" in text


def test_report_files(tmp_path):
    measured = {"cpu_seconds_per_step": 0.1, "training_seconds": 60, "peak_memory_mb": 100}
    dice = {"nnUNetTrainer": 0.5, "Ours": 0.55, "Ours:ramp_length=0.0": 0.45}
    runs = [
        run(arm, seed, [(value + seed / 100, 0.7)] * 3, setting=setting, **measured)
        for arm, value in dice.items()
        for seed in (0, 1)
        for setting in ("8 labeled", "2 labeled")
    ]
    files = write_report(tmp_path, Report(runs))
    text = files["md"].read_text()
    assert text.index("## 2 labeled") < text.index("## 8 labeled")
    assert re.search(r"\| s0 +\| Ours +\| +2 \| 0\.555 \| +0\.007 \| \+0\.050 +\|", text)
    rows = files["csv"].read_text().splitlines()
    assert rows[0].startswith("setting,arm,structure,metric,runs,mean") and len(rows) == 1 + 2 * 2 * 3 * 3
    assert imread(files["png"]).std() > 0


def test_names_for_figures():
    assert short_name("CrossMatchTrainer_5epochs") == "CrossMatch_5epochs"
    assert short_name("nnUNetTrainer@warm=0.5") == "nnUNetTrainer@warm=0.5"
    assert short_name("CrossMatchTrainer@warm=0.5:ramp_length=0.1") == "CrossMatch@warm=0.5:ramp_length=0.1"


def test_numbers_of_points_do_not_touch():
    figure = Figure(figsize=(4, 3))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, (cost, gain) in enumerate([(2, 0.01), (2.01, 0.0101), (2.02, 0.011), (2, 0.0099), (5, 0.03)] * 2):
        axis.plot(cost, gain, "o", label=f"[{number}]")
    figure.draw_without_rendering()
    _number_points(axis)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == [f"[{number}]" for number in range(10)]
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])


def test_table_keeps_everything(tmp_path):
    file = tmp_path / "results.csv"
    first, second = run("nnUNetTrainer", 0, [(0.5, NAN), (0.123456, 1.0)]), run("Ours", 3, [(0.25, 0.5)])
    for one in (first, second, first):
        add_run(file, one.about, one.result)
    assert list(read_runs(file)) == [first.about["training"], second.about["training"]], "each once"
    for one in (first, second):
        read = read_runs(file)[one.about["training"]]
        assert read.about == one.about
        assert str(read.result.cases) == str(one.result.cases)


def _without_line(number):
    return lambda text: "".join(line for n, line in enumerate(text.splitlines(keepends=True)) if n != number)


HARMS = {
    "cut short": (lambda text: text[:-20], "the row of case 1 is cut short"),
    "other columns": (lambda text: "a,b\n1,2\n", "no column training, case, structure and"),
    "semicolons": (lambda text: text.replace(",", ";"), "columns are separated by commas"),
    "not a number": (lambda text: text.replace("0.25", "x"), "could not convert string to float: 'x'"),
    "more than a Dice can be": (lambda text: text.replace("0.25", "7.3"), "case 0, s0 has dice 7.3, jaccard 7.3"),
    "infinite": (lambda text: text.replace("9.75", "inf"), "case 0, s0 has hd95 inf"),
    "a row that is missing": (_without_line(1), "has no row of case 0 for s0"),
    "rows that contradict each other": (
        lambda text: text + text.splitlines()[1].replace("0.25", "0.1") + "\n",
        "has case 0, s0, twice with other values",
    ),
}


@pytest.mark.parametrize(("harm", "message"), HARMS.values(), ids=HARMS)
def test_a_broken_table_is_named(tmp_path, harm, message):
    file = tmp_path / "results.csv"
    write_runs(file, {"one": run("Ours", 0, [(0.25, 0.5), (0.25, 0.75)])})
    file.write_text(harm(file.read_text()))
    with pytest.raises(UserError, match=rf"results\.csv is not a table of results.*{message}"):
        read_runs(file)


def test_a_table_may_be_sorted_and_saved_by_a_spreadsheet(tmp_path):
    file = tmp_path / "results.csv"
    runs = {arm: run(arm, 0, [(0.25, 0.5), (0.75, NAN)]) for arm in ("nnUNetTrainer", "Ours")}
    write_runs(file, {one.about["training"]: one for one in runs.values()})
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *sorted(rows, key=lambda row: row[::-1])]) + "\n", encoding="utf-8-sig")
    read = Report(list(read_runs(file).values()))
    before = Report(list(runs.values()))
    named = {(gain.arm, gain.structure): gain for gain in read.gains("2 labeled", "dice")}
    assert named.keys() == {(gain.arm, gain.structure) for gain in before.gains("2 labeled", "dice")}
    assert all(str(named[gain.arm, gain.structure]) == str(gain) for gain in before.gains("2 labeled", "dice"))


def test_a_cost_of_nothing_is_named():
    runs = [run("nnUNetTrainer", 0, [(0.5,)], cpu_seconds_per_step=0), run("Ours", 0, [(0.5,)])]
    with pytest.raises(UserError, match="column cpu_seconds_per_step contains '0', which is not a number above 0"):
        Report(runs).costs("2 labeled")


def test_tables_of_the_older_benchmark_can_be_read():
    report = Report(list(read_runs(OLD / "Dataset901_LeftAtrium-nnUNetPlans-2d_coarse-2500.csv").values()))
    gains = {gain.arm: gain for gain in report.gains("8 labeled", "dice")}
    assert gains["nnUNetTrainer"].mean == pytest.approx(0.832, abs=5e-4) and gains["nnUNetTrainer"].runs == 3
    assert gains["CrossMatch"].difference == pytest.approx(0.013, abs=5e-4)
    assert report.costs("8 labeled") == [] and "does not say what it was made with" in report.markdown()
