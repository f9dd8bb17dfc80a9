"""Mistakes in a call of ``nnunet-ssl pilot``, each one message; the trainings are in tests/end_to_end."""

from __future__ import annotations

import pytest

from nnunet_ssl.cli.main import main
from nnunet_ssl.cli.pilot import _choose_folds
from nnunet_ssl.errors import UserError

CALL = {"-d": ["997"], "-c": ["tiny"]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"-d": ["996"]}, "996"),
        ({"-c": ["3d_fullres"]}, "has no configuration 3d_fullres; there are"),
        ({"-tr": ["NoTrainer"]}, "nnU-Net does not find the trainer NoTrainer"),
        ({"-tr": ["nnUNetTrainer"]}, "Name another trainer"),
        ({"--hours": ["0"]}, "--hours is 0; give more than 0"),
        ({"--epochs": ["0"]}, "--epochs is 0"),
        ({"--seeds": ["0"]}, "--seeds is 0"),
        ({"--folds": ["9"]}, "There is no fold 9"),
        ({"--folds": ["0", "0"]}, "share validation cases"),
        ({"nnUNet_raw": ["elsewhere"]}, "There is no unlabeled case"),
    ],
    ids=str,
)
def test_mistakes_are_explained(planned_2d, tmp_path, monkeypatch, capsys, changed, message):
    for name, value in planned_2d.environment.items():
        monkeypatch.setenv(name, value)
    options = {**CALL, **changed}
    for value in options.pop("nnUNet_raw", []):
        (tmp_path / value / planned_2d.raw.name).mkdir(parents=True)
        monkeypatch.setenv("nnUNet_raw", str(tmp_path / value))
    arguments = [word for option, values in options.items() for word in (option, *values)]
    assert main(["pilot", *arguments, "-device", "cpu", "-o", str(tmp_path / "pilot")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("nnunet-ssl pilot: error: ")
    assert "Traceback" not in printed.err
    assert not (tmp_path / "pilot").exists(), "a mistake leaves nothing"


def test_a_split_file_without_folds():
    with pytest.raises(UserError, match=r"There is no fold 0: splits\.json has no folds\."):
        _choose_folds([], [0], "splits.json")
