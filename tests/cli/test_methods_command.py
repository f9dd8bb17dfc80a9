"""``nnunet-ssl methods``, and README's table, which it makes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from method_steps import METHODS

from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.cli.main import main
from nnunet_ssl.cli.methods import every_method, measured_costs, measured_gains
from nnunet_ssl.trainer_lookup import RECOMMENDED

README = Path(__file__).resolve().parents[2] / "README.md"


def printed(capsys, *arguments: str) -> str:
    assert main(["methods", *arguments]) == 0
    return capsys.readouterr().out


def test_the_readme_has_the_table(capsys):
    table = printed(capsys, "--markdown")
    readme = README.read_text(encoding="utf-8")
    assert table in readme, "README.md should have the table that nnunet-ssl methods --markdown prints"
    rows = re.findall(r"^\| `(\w+Trainer)`", readme, re.MULTILINE)
    assert rows == sorted(method.name for method in METHODS)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_all_is_said_of_every_trainer(method, capsys):
    text = printed(capsys, method.name)
    words = " ".join(text.split())
    described = every_method()[method.name]
    assert described.name and described.idea and described.year and described.link.startswith("https://")
    assert not described.idea.endswith(".") and re.fullmatch(r"\w[\w-]*( et al\.| and \w+)? \d{4}", described.citation)
    assert f"{described.name}: {described.idea}" in words and f"Source: {described.source}" in words
    for option in dataclasses.fields(method.trainer.settings_class):
        assert f"{option.name} = {json.dumps(option.default)} (" in words
        assert " ".join(option.metadata["help"].split()) in words


def test_without_names_all_are_listed(capsys):
    lines = printed(capsys).splitlines()
    assert [line for line in lines if re.fullmatch(r"\w+Trainer", line)] == list(every_method())
    assert list(every_method()) == sorted(path.stem for path in trainers_folder().glob("*.py"))


def test_a_trainer_that_there_is_not(capsys):
    assert main(["methods", "NoTrainer"]) == 2
    assert "no trainer NoTrainer" in (error := capsys.readouterr().err) and "CrossMatchTrainer" in error


def test_the_readme_names_the_recommended_trainers_gain():
    gain = measured_gains()["gains"][RECOMMENDED]
    readme = " ".join(README.read_text(encoding="utf-8").split())
    assert f"% interval of the gain {gain['low']:.3f} to {gain['high']:.3f})" in readme


def test_gains_are_of_trainers_that_there_are(capsys):
    gains = measured_gains()["gains"]
    assert gains.keys() <= every_method().keys() and RECOMMENDED in gains
    assert all(gain["low"] <= gain["difference"] <= gain["high"] for gain in gains.values())
    best = gains[RECOMMENDED]
    said = f"gain {best['difference']:+.3f} Dice, 95 % interval {best['low']:+.3f} to {best['high']:+.3f}, "
    assert f"{said}{best['trainings']} trainings\n" in printed(capsys, RECOMMENDED)
    assert f"| {best['difference']:+.3f} ({best['trainings']}) |" in printed(capsys, RECOMMENDED, "--markdown")
    unmeasured = next(name for name in every_method() if name not in gains)
    assert "gain not measured" in printed(capsys, unmeasured)
    assert " | – | " in printed(capsys, unmeasured, "--markdown")


def test_costs_are_of_trainers_that_there_are_and_of_both_memory_modes():
    costs = measured_costs()
    assert set(costs) == {"step", "memory"}
    for of_kind in costs.values():
        assert of_kind["measured"]
        assert set(of_kind["ratios"]) <= set(every_method())
        for ratios in of_kind["ratios"].values():
            assert set(ratios) == {"split", "stacked"} and all(ratio > 1 for ratio in ratios.values())
