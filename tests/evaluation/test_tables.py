from __future__ import annotations

import re

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
    table = format_table(["a|b", "n"], [["x|y\nz", 1]], style="markdown")
    assert table.splitlines() == ["| a\\|b   |   n |", "| ------ | --: |", "| x\\|y z |   1 |"]


def test_latex():
    table = format_table(["a_b", "n"], [["50 % ± 1", 1], ["< 0.001", 2], ["x & y\\", None]], style="latex")
    assert table.splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a\_b                   &   n \\",
        r"\midrule",
        r"50 \% $\pm$ 1          &   1 \\",
        r"$<$ 0.001              &   2 \\",
        r"x \& y\textbackslash{} &   - \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


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
    cells = [[cell.strip() for cell in re.split(r"\s{2,}", line)] for line in lines]
    assert cells[0] == ["structure", "name", "Dice", "Jaccard", "HD95 (mm)", "ASD (mm)", "ASSD (mm)", "cases"]
    one, other = "2.00 (1 missing)", "2.00 ± 1.41"
    assert cells[2] == ["chamber", "nnUNetTrainer", "0.250 ± 0.354", "0.250 ± 0.354", one, one, one, "2"]
    assert cells[3] == ["chamber", "CrossMatchTrainer", "0.750 ± 0.000", "0.750 ± 0.000", other, other, other, "2"]
    alone = summarize({"": results["nnUNetTrainer"]}).splitlines()
    assert alone[0].split()[:2] == ["structure", "Dice"] and alone[2].split()[:2] == ["chamber", "0.250"]
    assert summarize(results, style="markdown").count("\n| chamber ") == 2
