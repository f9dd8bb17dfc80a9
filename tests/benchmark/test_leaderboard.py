"""docs/leaderboard.md: equal to the campaigns' tables; what it says of tables whose answers are known."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import matplotlib
import pytest

from nnunet_ssl.benchmark.results import ABOUT, Run, write_runs
from nnunet_ssl.cli.main import build_parser
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.folders import FolderResult
from nnunet_ssl.evaluation.metrics import CaseMetrics, CaseResult

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def leaderboard(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import leaderboard

    return leaderboard


def campaign(folder, dice, *, dataset, configuration="2d_small", identifier="c", validation=None, setting="2 labeled"):
    """A campaign's two files; ``dice``: by arm, a mean per training, which each of four cases varies a little."""
    folder.mkdir(parents=True)
    content = {"identifier": identifier, "date": "2026-01-01 00:00", "dataset": dataset, "plans": "nnUNetPlans"}
    content |= {"configuration": configuration, "epochs": 5, "validation": validation}
    (folder / "campaign.json").write_text(json.dumps(content))
    runs = {}
    for arm, means in dice.items():
        for seed, mean in enumerate(means):
            cases = [
                CaseResult(f"case {number}", {"organ": CaseMetrics(mean + 0.001 * number, mean, 5.0)})
                for number in range(4)
            ]
            key = f"{arm}; {setting}; seed {seed}"
            about = dict.fromkeys(ABOUT, "1") | {"training": key, "campaign": identifier, "arm": arm, "seed": str(seed)}
            about |= {"setting": setting, "dataset": dataset, "device": "cpu", "date": "2026-01-02 00:00"}
            about |= {"compiled": "True", "iterations": "1250", "configuration": configuration, "plans": "nnUNetPlans"}
            about["cpu_seconds_per_step"] = "0.1" if arm == "nnUNetTrainer" else "0.25"
            runs[key] = Run(about, FolderResult(cases))
    write_runs(folder / "results.csv", runs)


BASE = {"nnUNetTrainer": [0.79, 0.80, 0.81]}


def test_the_page_is_made_from_the_tables(leaderboard):
    page = leaderboard.PAGE.read_text(encoding="utf-8")
    assert page == leaderboard.make_page(leaderboard.read_reports(leaderboard.RESULTS)), (
        "run python benchmarks/leaderboard.py"
    )


def test_the_gains_of_the_readme_are_made_from_the_tables(leaderboard, tmp_path):
    made = leaderboard.gains_of_readme(leaderboard.read_reports(leaderboard.RESULTS))
    assert leaderboard.GAINS.read_text(encoding="utf-8") == made, "run python benchmarks/leaderboard.py"

    arms = BASE | {"Good": [0.9, 0.9, 0.9], "Good:ramp_length=0.2": [0.8], "Once": [0.5]}
    campaign(tmp_path / "a", arms, dataset="Dataset001_LeftAtrium")
    campaign(tmp_path / "b", BASE | {"Good": [0.1]}, dataset="Dataset002_Other")
    made = json.loads(leaderboard.gains_of_readme(leaderboard.read_reports(tmp_path)))
    assert made["gains"].keys() == {"Good", "Once"} and "1250 labeled iterations" in made["measured"]
    assert (made["gains"]["Good"]["difference"], made["gains"]["Good"]["trainings"]) == (0.1, 3)
    once = made["gains"]["Once"]
    assert once["trainings"] == 1 and once["low"] < once["difference"] == -0.3 < once["high"]


def test_who_loses_is_named_first(leaderboard, tmp_path):
    campaign(tmp_path / "a", BASE | {"Worse": [0.78] * 3, "Better": [0.82] * 3, "Level": [0.805]}, dataset="D_One")
    campaign(tmp_path / "b", BASE | {"Better": [0.77]}, dataset="D_Two", identifier="d", setting="fold 1, 6 labeled")
    page = leaderboard.make_page(leaderboard.read_reports(tmp_path))
    heading, below, other, above, spread = page.split("\n\n")[1:6]
    assert heading == (
        "**Below nnUNetTrainer by more than nnUNetTrainer's own trainings differ**, in Dice (an interval that "
        "contains 0 does not show a difference: see the table):"
    )
    assert below == "- Worse: One, 2 labeled -0.020 (n = 3)\n- Better: Two, 6 labeled -0.030 (n = 1, too few)"
    assert other.startswith("**Above") and above == "- Better: One, 2 labeled +0.020 (n = 3)"
    assert "One, 2 labeled 0.010 (3 trainings)" in spread
    campaign(tmp_path / "c", {"nnUNetTrainer": [0.8], "Worse": [0.5]}, dataset="D_Three", identifier="e")
    parts = leaderboard.make_page(leaderboard.read_reports(tmp_path)).split("\n\n")
    assert parts[2] == below and "Three, 2 labeled not known" in parts[5], "one training has no spread"


def test_one_table_across_datasets(leaderboard, tmp_path):
    campaign(tmp_path / "a", BASE | {"Worse": [0.78] * 3, "Better": [0.82] * 3, "Rare": [0.9]}, dataset="D_One")
    campaign(tmp_path / "b", BASE | {"Worse": [0.79] * 2, "Better": [0.83] * 3}, dataset="D_Two", identifier="d")
    campaign(tmp_path / "c", BASE, dataset="D_Three", identifier="e", setting="fold 0, 14 labeled")
    page = leaderboard.make_page(leaderboard.read_reports(tmp_path))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert lines[0] == ["arm", "One, 2 labeled", "Two, 2 labeled", "cost, ×"], "by dataset"
    assert [line[0] for line in lines[2:6]] == ["nnUNetTrainer", "Better", "Worse", "Rare"], "a column is missing: last"
    assert lines[2][1:] == ["0.802; n = 3", "0.802; n = 3", "1.0"]
    assert re.fullmatch(r"0\.822 \(\+0\.020, \+0\.0\d\d to \+0\.0\d\d\); n = 3", lines[3][1])
    assert lines[4][2].endswith("; n = 2, too few") and lines[5][2] == "-" and lines[5][3] == "2.5"
    assert "nnUNetTrainer alone: Three, 14 labeled 0.802; n = 3." in page
    assert "the table has 5 differences" in page and "25 trainings" not in page


def test_a_row_is_repeated_by_the_command_that_the_page_gives(leaderboard, tmp_path):
    arm = 'CrossMatchTrainer:ramp_length=0.2,memory_mode="split"'
    campaign(tmp_path / "a", BASE | {arm: [0.8]}, dataset="Dataset903_ACDC", validation=12, setting="fold 1, 6 labeled")
    campaign(tmp_path / "b", BASE, dataset="Dataset901_LeftAtrium", configuration="2d_coarse", identifier="d")
    page = leaderboard.make_page(leaderboard.read_reports(tmp_path))
    commands = re.findall(r"^    OMP_NUM_THREADS=1 nnunet-ssl (benchmark .*\\\n.*)$", page, re.MULTILINE)
    second, first = (build_parser().parse_args(shlex.split(one.replace("\\\n", ""))) for one in commands)
    assert (first.d, first.c, first.p) == ("Dataset903_ACDC", "2d_small", "nnUNetPlans")
    assert (first.epochs, first.device) == (5, "cpu")
    assert first.tr == ["nnUNetTrainer", arm] and first.seeds == [0, 1, 2] and first.compile
    assert (first.folds, first.labeled, first.validate) == ([1], [], 12)
    assert (PROJECT / first.configurations).is_file()
    assert (second.labeled, second.folds, second.validate, second.configurations) == (["2"], [], None, None)
    assert (first.o.name, second.o.name) == ("repeated_903", "repeated_901"), "a folder holds one campaign"
    assert "    python benchmarks/small_plans.py -d 901\n    nnUNetv2_preprocess -d 901 -c 2d_coarse\n" in page
    assert "    nnUNetv2_plan_and_preprocess -d 903 -c 2d\n" in page, "nnU-Net takes no name there"
    assert page.count("If the plans already have another `2d_small`") == 1


def test_only_tables_of_one_campaign_are_taken(leaderboard, tmp_path, monkeypatch, capsys):
    campaign(tmp_path / "a", {"Other": [0.8]}, dataset="D_One")
    with pytest.raises(UserError, match="no training of nnUNetTrainer"):
        leaderboard.read_reports(tmp_path)
    (tmp_path / "a" / "results.csv").unlink()
    with pytest.raises(UserError, match=r"There is no campaign in .*: no folder in it has a results\.csv"):
        leaderboard.read_reports(tmp_path)
    campaign(tmp_path / "b", BASE, dataset="D_One")
    file = tmp_path / "b" / "campaign.json"
    file.write_text(file.read_text().replace('"identifier": "c"', '"identifier": "x"'))
    files = ["--gains", str(tmp_path / "gains.json"), "-o", str(tmp_path / "page.md")]
    monkeypatch.setattr("sys.argv", ["leaderboard.py", "--results", str(tmp_path), *files])
    assert leaderboard.main() == 2
    assert "results.csv is of the campaign c, campaign.json of x" in capsys.readouterr().err
    file.write_text(file.read_text().replace('"identifier": "x"', '"identifier": "c"'))
    assert leaderboard.main() == 0
    assert (tmp_path / "page.md").read_text().startswith("# Leaderboard\n\n")


def test_the_picture_shows_every_gain(leaderboard, tmp_path, monkeypatch):
    assert (leaderboard.PAGE.parent / "leaderboard.png").is_file(), "docs/leaderboard.md shows it"
    campaign(tmp_path / "a", BASE | {"Good": [0.8, 0.8, 0.8], "Once": [0.5]}, dataset="D_One")
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, x, y, *form, **style: drawn.append((x, style)))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    reports = leaderboard.read_reports(tmp_path)
    leaderboard.draw(leaderboard._columns(reports), tmp_path / "picture.png")
    gains = reports[0][1].overall(reports[0][1].settings[0])
    points = {round(float(x), 6): style["markerfacecolor"] for x, style in drawn if "markerfacecolor" in style}
    assert points.keys() == {round(gains[name].difference, 6) for name in ("Good", "Once")}
    assert points[round(gains["Once"].difference, 6)] == "white" != points[round(gains["Good"].difference, 6)]


def test_nothing_is_cut_off_with_four_settings_and_long_names(leaderboard, tmp_path, monkeypatch):
    dice = BASE | {"nnUNetTrainer@self-train=2": [0.8, 0.8, 0.8]}
    for number in range(4):
        setting = {"dataset": f"Dataset90{number}_ALongerName", "setting": f"fold {number}, {number + 4} labeled"}
        campaign(tmp_path / f"{number}", dice, identifier=f"c{number}", **setting)
    drawn = []

    def look(figure, *_, **__):
        figure.draw_without_rendering()
        drawn.append((figure.get_tightbbox().extents, figure.get_size_inches()))
        assert len(figure.legends[0].get_texts()) == 4

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", look)
    columns = leaderboard._columns(leaderboard.read_reports(tmp_path))
    with matplotlib.rc_context({"font.size": 60.0}):
        leaderboard.draw(columns, tmp_path / "picture.png")
    ((left, bottom, right, top), (width, height)) = drawn[0]
    assert left >= 0 and right <= width and bottom >= 0 and top <= height
