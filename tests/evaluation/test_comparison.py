from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from nnunet_ssl.evaluation.comparison import Scores, compare, join_runs, paired_difference, scores
from nnunet_ssl.evaluation.folders import FolderResult
from nnunet_ssl.evaluation.metrics import CaseMetrics, CaseResult
from nnunet_ssl.evaluation.pictures import save_comparison

NAN = math.nan


def run(**dice):
    return FolderResult(
        [CaseResult(case, {"one": CaseMetrics(value, value, 10 * value)}) for case, value in dice.items()]
    )


def numbered(values):
    return Scores(tuple(map(str, range(np.shape(values)[1]))), np.array(values, float))


def test_means_and_spreads_by_hand():
    found = scores([run(a=0.2, b=0.6, c=0.9), run(a=0.4, b=1.0)], ["a", "b", "c"], "one", "dice")
    np.testing.assert_allclose(found.by_case(), [0.3, 0.8, NAN])
    assert found.mean == pytest.approx(0.55) and found.median == pytest.approx(0.55)
    assert found.spread_of_cases == pytest.approx(np.std([0.3, 0.8], ddof=1))
    assert found.spread_of_runs == pytest.approx(np.std([0.4, 0.7], ddof=1)), "c does not count: one run lacks it"
    assert found.missing == 1
    assert scores([run(a=0.2)], ["a"], "one", "hd95").mean == pytest.approx(2.0)


def test_folds_are_joined_and_repetitions_are_runs():
    folds = [run(a=0.1, b=0.2), run(c=0.3), run(a=0.4, b=0.5), run(c=0.6)]
    runs = join_runs(folds)
    assert [one.values("one", "dice") for one in runs] == [
        {"a": 0.1, "b": 0.2, "c": 0.3},
        {"a": 0.4, "b": 0.5, "c": 0.6},
    ]
    assert len(folds[0].cases) == 2, "the folders' own results stay as they were"


def test_cases_are_those_that_means_are_over():
    models = {"base": [run(a=0.5, b=0.7), run(b=0.5, c=0.5)], "ours": [run(a=0.6, b=0.8)]}
    header, rows = compare(models, ["one"], "dice")
    base = dict(zip(header, rows[0], strict=True))
    assert (base["runs"], base["cases"], base["mean"]) == (2, 1, pytest.approx(0.6))


def test_difference_by_hand():
    model, baseline = numbered([[0.9, 0.8, 0.5, NAN]]), numbered([[0.5, 0.6, 0.5, 0.5]])
    pair = paired_difference(model, baseline)
    assert pair.mean == pytest.approx(0.2) and pair.cases == 3
    assert 0 <= pair.low < 0.2 < pair.high <= 0.4


def test_one_case_more_is_not_compared():
    with pytest.raises(ValueError, match="different cases"):
        paired_difference(numbered([[1.0]]), numbered([[1.0, 2.0]]))


def test_nothing_to_pair_and_a_single_pair():
    none = paired_difference(numbered([[NAN]]), numbered([[1.0]]))
    assert none.cases == 0 and math.isnan(none.mean) and math.isnan(none.p_value)
    one = paired_difference(numbered([[0.75, NAN]]), numbered([[0.5, 0.5]]))
    assert (one.cases, one.mean) == (1, 0.25) and math.isnan(one.low) and math.isnan(one.p_value)
    models = {"base": [run(a=0.5)], "ours": [run(a=0.75)]}
    rows = compare(models, ["one"], "dice")[1]
    assert rows[1][-4:-1] == ["+0.250", None, pytest.approx(NAN, nan_ok=True)], "shown as dashes"


def test_a_structure_found_where_there_is_none_counts():
    models = {"base": [run(a=0.8, b=NAN)], "ours": [run(a=0.8, b=0.0)]}
    header, rows = compare(models, ["one"], "dice")
    ours = dict(zip(header, rows[1], strict=True))
    assert (ours["difference"], ours["pairs"], ours["missing"]) == ("-0.500", 2, 0)
    assert compare(models, ["one"], "hd95")[1][1][-1] == 1, "a distance stays missing"


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(2, 8), st.floats(-0.5, 0.5), st.integers(0, 99))
def test_constant_shift(runs, cases, shift, seed):
    """A model that is better by the same amount in each case: no spread is left in the pairs."""
    baseline = np.random.default_rng(seed).random((1, cases)).repeat(runs, axis=0)
    pair = paired_difference(numbered(baseline + shift), numbered(baseline))
    assert (pair.mean, pair.low, pair.high) == pytest.approx((shift, shift, shift), abs=1e-9)
    back = paired_difference(numbered(baseline), numbered(baseline + shift))
    assert back.mean == pytest.approx(-pair.mean, abs=1e-12)


def test_same_scores_show_no_difference():
    same = numbered(np.random.default_rng(0).random((2, 9)))
    pair = paired_difference(same, same)
    assert pair.mean == 0 and pair.p_value == 1 and pair.low <= 0 <= pair.high
    runs = np.random.default_rng(0).random((3, 9))
    assert paired_difference(numbered(runs), numbered(runs[[2, 0, 1]])).p_value == 1, "rounding is no difference"


def test_interval_holds_the_spread_of_trainings():
    """Runs that differ widen the interval, although the differences between the means of the cases stay the same."""
    cases = np.linspace(0.4, 0.9, 16)
    baseline = numbered([cases, cases])
    alike, apart = numbered([cases + 0.05, cases + 0.05]), numbered([cases - 0.05, cases + 0.15])
    narrow, wide = paired_difference(alike, baseline), paired_difference(apart, baseline)
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > narrow.high - narrow.low + 0.1


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth, hits = 0.03, 0
    for _ in range(150):
        cases = rng.normal(0.8, 0.1, 30)
        differences = rng.normal(truth, 0.05, 30)
        pair = paired_difference(numbered([cases + differences]), numbered([cases]))
        hits += pair.low <= truth <= pair.high
    assert 0.87 <= hits / 150 <= 0.99


def test_p_value_is_small_for_a_steady_gain_and_large_for_none():
    rng = np.random.default_rng(2)
    baseline = rng.random((1, 20))
    assert paired_difference(numbered(baseline + rng.random((1, 20))), numbered(baseline)).p_value < 0.001
    balanced = np.array([[1, -2, -3, 4, 5, -6, -7, 8]]) / 100
    assert paired_difference(numbered(0.5 + balanced), numbered(np.full((1, 8), 0.5))).p_value > 0.9


def test_table():
    models = {"base": [run(a=0.5, b=0.7), run(a=0.5, b=0.7)], "ours": [run(a=0.6, b=0.8)]}
    header, rows = compare(models, ["one"], "dice", best={"ours": [run(a=0.7, b=0.9)]})
    base, ours = (dict(zip(header, row, strict=True)) for row in rows)
    assert (base["runs"], base["cases"], base["difference"], base["best - last"]) == (2, 2, "baseline", None)
    assert (ours["runs"], ours["difference"], ours["pairs"], ours["best - last"]) == (1, "+0.100", 2, "+0.100")
    assert ours["mean"] == pytest.approx(0.7) and "best - last" not in compare(models, ["one"], "dice")[0]


def test_figure(tmp_path):
    models = {"base": [run(a=0.5, b=0.7)], "ours": [run(a=0.6, b=NAN, c=0.9)]}
    save_comparison(tmp_path / "a.png", models, ["one"], "dice")
    pixels = imread(tmp_path / "a.png")[:, :, :3]
    for color in ((255, 90, 79), (41, 182, 246)):
        assert (np.abs(pixels - np.array(color) / 255).max(axis=-1) < 0.02).sum() > 20, "a dot of each model"
