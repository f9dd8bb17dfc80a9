"""The pilot's statistics against references and on simulated trainings whose answers are known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_ssl.benchmark.arms import Arm
from nnunet_ssl.benchmark.campaign import Setting, Training, read_campaign
from nnunet_ssl.benchmark.pilot import (
    WORTH,
    Estimate,
    asked_for,
    disjoint_folds,
    estimate,
    expected_seconds,
    in_words,
    over_folds,
    run_pilot,
    verdict,
    within_fold,
)
from nnunet_ssl.benchmark.progress import Progress, progress_file
from nnunet_ssl.benchmark.report import Report, difference
from nnunet_ssl.benchmark.results import ABOUT, Run, add_run, read_runs
from nnunet_ssl.benchmark.schedule import Machine
from nnunet_ssl.evaluation.comparison import Scores
from nnunet_ssl.evaluation.folders import FolderResult
from nnunet_ssl.evaluation.metrics import CaseMetrics, CaseResult

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
NAN = math.nan
A_GAIN = st.floats(-0.5, 0.5)
FOLDS = st.lists(st.lists(A_GAIN, min_size=1, max_size=4), min_size=2, max_size=6)


def arrays(folds):
    return [np.array(fold) for fold in folds]


def numbered(values):
    return Scores(tuple(map(str, range(np.shape(values)[1]))), np.array(values, float))


@given(FOLDS)
def test_independent_folds_are_students_t(folds):
    found = over_folds(arrays(folds), [0.0] * len(folds))
    means = [np.mean(fold) for fold in folds]
    half = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
    assert found.mean == pytest.approx(np.mean(means), abs=1e-9)
    assert found.low == pytest.approx(np.mean(means) - half, abs=1e-9)
    assert found.high == pytest.approx(np.mean(means) + half, abs=1e-9)
    assert found.cases == sum(map(len, folds)) and found.folds == len(folds)


def test_the_correction_by_hand():
    # Means 0.01, 0.02, 0.06: spread sqrt(0.0014 / 2); shares 1/4 -> variance times 1/3 + 1/4.
    found = over_folds(arrays([[0.0, 0.02], [0.02, 0.02], [0.06, 0.06]]), [0.25] * 3)
    half = 4.302652729911275 * math.sqrt(0.0014 / 2 * (1 / 3 + 1 / 4))
    assert (found.low, found.high) == (pytest.approx(0.03 - half), pytest.approx(0.03 + half))


@given(FOLDS, st.floats(-0.3, 0.3), st.floats(0.1, 3), st.floats(0, 1))
def test_intervals_move_and_stretch_with_the_gains(folds, shift, factor, share):
    one = over_folds(arrays(folds), [share] * len(folds))
    moved = over_folds([factor * fold + shift for fold in reversed(arrays(folds))], [share] * len(folds))
    for name in ("mean", "low", "high"):
        assert getattr(moved, name) == pytest.approx(factor * getattr(one, name) + shift, abs=1e-9)
    assert moved.visible == pytest.approx(factor * one.visible, abs=1e-9)


def simulate(rng, *, gain, folds, size, spread=0.02, of_case=0.03, common=0.0):
    """Folds whose trainings differ by ``spread``, all of them by ``common``, and cases by ``of_case``."""
    shared = gain + common * rng.normal()
    return [shared + spread * rng.normal() + of_case * rng.normal(size=size) for _ in range(folds)]


def test_intervals_hold_the_true_gain_as_often_as_they_say():
    rng = np.random.default_rng(0)
    # Fold means of variance 0.02² + 0.03² / 4; with a fifth of all variance in common the correction is exact.
    common = math.sqrt((0.02**2 + 0.03**2 / 4) / 4)
    for shared, share in ((0.0, 0.0), (common, 0.25)):
        held = 0
        for _ in range(600):
            found = over_folds(simulate(rng, gain=0.01, folds=5, size=4, common=shared), [share] * 5)
            held += found.low <= 0.01 <= found.high
        assert 0.925 <= held / 600 <= 0.975


def test_four_pilots_of_five_show_the_visible_gain():
    rng = np.random.default_rng(1)
    # Of the true spread of means, as visible has it of the measured one.
    spread = math.sqrt(0.02**2 + 0.03**2 / 4)
    gain = sum(stats.t.ppf(part, 4) for part in (0.975, 0.8)) * spread / math.sqrt(5)
    found = [over_folds(simulate(rng, gain=gain, folds=5, size=4), [0.0] * 5) for _ in range(600)]
    assert 0.74 <= np.mean([one.low > 0 for one in found]) <= 0.86
    assert np.median([one.visible for one in found]) == pytest.approx(gain, rel=0.15)


@given(FOLDS, st.floats(0, 1))
@settings(max_examples=30)
def test_needed_cases_are_the_fewest(folds, share):
    found = over_folds(arrays(folds), [share] * len(folds))
    size, spread = np.mean([len(fold) for fold in folds]), np.std([np.mean(fold) for fold in folds], ddof=1)

    def visible(count):
        quantiles = stats.t.ppf(0.975, count - 1) + stats.t.ppf(0.8, count - 1)
        return quantiles * spread * math.sqrt(1 / count + min(share, 1 / (count - 1)))

    fewest = next((count for count in range(2, 400) if visible(count) <= WORTH), None)
    if fewest is not None:
        assert found.needed == math.ceil(fewest * size)
    else:
        assert found.needed is None or found.needed >= 400 * size


def test_one_fold_is_the_benchmarks_difference():
    rng = np.random.default_rng(2)
    ours, theirs = (numbered(0.7 + 0.02 * rng.normal(size=(3, 1)) + 0.05 * rng.normal(size=(3, 20))) for _ in range(2))
    found = within_fold(ours, theirs)
    assert (found.mean, found.low, found.high, found.cases) == difference(ours, theirs)
    assert found.folds == 1 and found.visible > (found.high - found.low) / 2
    alone = within_fold(numbered([[0.7, 0.8]]), numbered([[0.6, 0.8]]))
    assert alone.mean == pytest.approx(0.05) and math.isnan(alone.visible) and alone.needed is None


def test_needed_cases_of_one_fold_by_hand():
    # Trainings are all alike, so cases alone count: a standard deviation of 0.1 and 2.8 standard errors.
    gains = np.array([0.1, -0.1] * 8)
    found = within_fold(numbered([0.5 + gains] * 2), numbered([[0.5] * 16] * 2))
    factor = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert found.visible == pytest.approx(factor * 0.1 / 4) and found.needed == math.ceil((factor * 0.1 / 0.02) ** 2)
    # Trainings differ by more than what is asked for.
    wide = within_fold(numbered([[0.5] * 4, [0.6] * 4]), numbered([[0.5] * 4, [0.6] * 4]))
    assert wide.needed is None and wide.visible > 0.2


@pytest.mark.parametrize(
    ("low", "high", "visible", "needed", "words"),
    [
        (0.01, 0.03, 0.02, 9, "Helps: here Ours is better"),
        (-0.03, -0.01, 0.02, 9, "Hurts: here Ours is worse"),
        (-0.01, 0.03, 0.031, 64, "about 64 labeled cases are needed; here are 10"),
        (-0.01, 0.03, 0.031, None, "more seeds rather than more cases"),
        (-0.01, 0.01, 0.015, 8, "so a gain of 0.02 is unlikely"),
        (NAN, NAN, NAN, None, "No verdict"),
    ],
)
def test_verdicts(low, high, visible, needed, words):
    text = verdict("Ours", Estimate(0.01, low, high, 10, 5, visible, needed))
    assert words in text
    assert text.startswith("No difference seen") == (low <= 0 <= high)


def test_folds_with_the_same_validation_cases_are_left():
    splits = [{"train": ["a"], "val": ["b", "c"]}, {"train": ["d"], "val": ["c"]}, {"train": ["b"], "val": []}]
    splits.append({"train": ["b"], "val": ["a"]})
    assert disjoint_folds(splits) == [0, 3]


def run(arm, setting, seed, dice, seconds=60):
    about = dict.fromkeys(ABOUT, "") | {"training": f"{arm}; {setting}; seed {seed}", "campaign": "c", "arm": arm}
    about |= {"setting": setting, "seed": str(seed), "device": "cpu", "dataset": "D", "date": "2026-01-01 00:00"}
    about |= {"iterations": "500", "training_seconds": str(seconds), "validation_seconds": "10"}
    cases = [CaseResult(name, {"a": CaseMetrics(dice=value), "b": CaseMetrics(dice=1)}) for name, value in dice.items()]
    return Run(about, FolderResult(cases))


FOLD = {
    "fold 0, 2 labeled": {"train": ["c", "d"], "val": ["a", "b"]},
    "fold 1, 2 labeled": {"train": ["a", "b"], "val": ["c"], "unlabeled": ["d"]},
}


def two_folds(gains):
    """nnUNetTrainer at 0.5, Ours above it by ``gains`` in the cases a, b of fold 0 and c of fold 1, twice."""
    runs = []
    for number, (setting, names) in enumerate(zip(FOLD, (("a", "b"), ("c",)), strict=True)):
        for seed in (0, 1):
            runs.append(run("nnUNetTrainer", setting, seed, dict.fromkeys(names, 0.5)))
            found = {name: 0.5 + gains[name] + (0.1 if seed else -0.1) for name in names}
            runs.append(run("Ours", setting, seed, found, seconds=180 + number))
    return runs


def test_estimate_of_trainings_in_two_folds():
    # Means of structures: half of what the one structure gains. Seeds are averaged.
    found = estimate(Report(two_folds({"a": 0.02, "b": 0.06, "c": 0.12})), FOLD, "Ours")
    expected = over_folds(arrays([[0.01, 0.03], [0.06]]), [2 / 2, 1 / 3])
    assert found is not None and found.mean == pytest.approx(0.04)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (found.cases, found.folds) == (3, 2)
    only = [one for one in two_folds({"a": 0.02, "b": 0.06, "c": 0.12}) if one.setting == "fold 0, 2 labeled"]
    assert estimate(Report(only), FOLD, "Ours").folds == 1


def test_a_call_with_other_folds_or_arms_than_before_reports_its_own():
    runs = two_folds({"a": 0.02, "b": 0.06, "c": 0.12})
    runs += [run(arm, "fold 2, 2 labeled", 0, {"d": 0.5}) for arm in ("nnUNetTrainer", "Ours")]
    runs += [run("Before", setting, 0, {"a": 0.5}) for setting in FOLD]
    kept = asked_for(runs, ARMS[:2], FOLD)
    assert {one.setting for one in kept} == set(FOLD) and {one.about["arm"] for one in kept} == {
        "nnUNetTrainer",
        "Ours",
    }
    assert estimate(Report(kept), FOLD, "Ours").cases == 3


def campaign_in(folder, epochs=2):
    content = {"identifier": "c", "date": "2026-01-01 00:00", "dataset": "D", "plans": "P", "configuration": "tiny"}
    folder.mkdir(exist_ok=True)
    (folder / "campaign.json").write_text(json.dumps({**content, "epochs": epochs, "validation": None}))
    return read_campaign(folder)


ARMS = [Arm("nnUNetTrainer", "nnUNetTrainer"), Arm("Ours", "Ours"), Arm("Later", "Later")]


def test_the_report_in_words(tmp_path):
    report = Report(two_folds({"a": 0.30, "b": 0.32, "c": 0.31}))
    words = in_words(campaign_in(tmp_path), ARMS, report, FOLD)
    assert words.startswith("# Pilot: Ours, Later against nnUNetTrainer\n\nD, ")
    assert "## Ours\n\nGain in Dice +0.155, 95 % interval +0.155 to +0.155; 3 cases in 2 folds." in words
    assert "**Helps: here Ours is better than nnUNetTrainer by more than chance can explain.**" in words
    assert "## Later\n\nNo fold has trainings of both yet. Run it again with more hours." in words
    assert "500 labeled iterations. A full training has 250000" in words
    # 60 and 180.5 seconds for 2 epochs; 1000 take 500 times as long.
    assert "- nnUNetTrainer: 8.3 hours\n- Ours: 25.1 hours" in words


def test_what_does_not_fit_the_hours_is_not_begun(tmp_path):
    campaign = campaign_in(tmp_path)
    for one in two_folds(dict.fromkeys("abc", 0.1)):
        add_run(campaign.results, one.about, one.result)
    places = [Setting(name, number, 2) for number, name in enumerate(FOLD)]
    planned = [Training(arm, places[0], 2) for arm in ARMS[:2]]
    assert expected_seconds(campaign, planned, 1) == pytest.approx(70 + 190.5)
    assert expected_seconds(campaign, planned, 2) == pytest.approx((70 + 190.5) / 2)
    assert expected_seconds(campaign, [*planned, Training(ARMS[2], places[0], 0)], 1) == 0, "not known yet"
    progress_file(campaign.task(planned[0])).parent.mkdir()
    progress_file(campaign.task(planned[0])).write_text(json.dumps(asdict(Progress([1.0], [1.0], [1.0], 1.0))))
    assert expected_seconds(campaign, planned, 1) == pytest.approx(35 + 190.5), "one of its two epochs is done"
    machine = Machine("cpu", 1, (), 1, 1, False)
    assert run_pilot(campaign, ARMS[:2], places, machine, hours=200 / 3600, seeds=3) == {}
    assert run_pilot(campaign, ARMS[:2], places, machine, hours=1, seeds=2) == {}, "these are all done"
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("iterations", "setting", "arm", "words"),
    [
        (5000, "8 labeled", "CrossMatch", "chance alone can explain +0.032. Four out of five such pilots would detect"),
        (5000, "2 labeled", "CrossMatch", "No verdict"),
        (2500, "2 labeled", "mutual", "so a gain of 0.02 is unlikely"),
        (2500, "8 labeled", "SimCVD", "more seeds rather than more cases"),
    ],
)
def test_the_left_atrium_where_the_answer_is_known(iterations, setting, arm, words):
    """At most three trainings of each arm, whose spread is 0.01: docs/explanation/evidence.md."""
    runs = read_runs(RESULTS / f"Dataset901_LeftAtrium-nnUNetPlans-2d_coarse-{iterations}.csv").values()
    report = Report([run for run in runs if run.setting == setting])
    found = estimate(report, {}, arm)
    assert found is not None and words in verdict(arm, found)
    assert estimate(report, {}, "an arm that was not trained") is None
