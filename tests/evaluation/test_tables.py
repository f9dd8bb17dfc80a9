from __future__ import annotations

import pytest

from nnunet_ssl.evaluation.metrics import CaseMetrics, CaseResult
from nnunet_ssl.evaluation.tables import format_table, mean_and_spread, summarize

NAN = float("nan")


def test_columns_are_aligned():
    table = format_table(["name", "count", "share"], [["a", 5, 0.5], ["longer", 12, NAN], ["c", None, 0.25]])
    assert table.splitlines() == [
        "name    count  share",
        "------  -----  -----",
        "a           5  0.500",
        "longer     12      -",
        "c           -  0.250",
    ]


def test_markdown():
    table = format_table(["a|b", "n"], [["x|y\nz", 1]], markdown=True)
    assert table.splitlines() == ["| a\\|b   |   n |", "| ------ | --: |", "| x\\|y z |   1 |"]


def test_no_rows():
    assert format_table(["one", "two"], []) == "one  two\n---  ---"


def test_rows_must_fit():
    with pytest.raises(ValueError, match="2 columns"):
        format_table(["one", "two"], [["only one"]])


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert mean_and_spread([1.0, NAN, 3.0], digits=1) == "2.0 ± 1.4 (1 missing)"
    assert mean_and_spread([0.5]) == "0.500"
    assert mean_and_spread([NAN, NAN]) == "- (2 missing)"


def test_summary():
    def case(name, dice, hd95):
        return CaseResult(name, {"chamber": CaseMetrics(dice, dice, hd95, hd95, hd95)})

    results = {
        "nnUNetTrainer": [case("a", 0.5, 2.0), case("b", 0.0, NAN)],
        "CrossMatchTrainer": [case("a", 0.75, 1.0), case("b", 0.75, 3.0)],
    }
    lines = summarize(results).splitlines()
    assert lines[0].split() == ["structure", "trainer", "Dice", "HD95", "(mm)", "cases"]
    assert lines[2].split() == ["chamber", "nnUNetTrainer", "0.250", "±", "0.354", "2.00", "(1", "missing)", "2"]
    assert lines[3].split() == ["chamber", "CrossMatchTrainer", "0.750", "±", "0.000", "2.00", "±", "1.41", "2"]
    assert summarize(results, markdown=True).count("\n| chamber ") == 2
