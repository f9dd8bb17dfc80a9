"""Mistakes in a call of ``nnunet-ssl benchmark``, each one message; the trainings are in tests/end_to_end."""

from __future__ import annotations

import pytest

from nnunet_ssl.cli.main import main

CALL = {
    "-d": ["997"],
    "-c": ["tiny"],
    "-tr": ["nnUNetTrainer"],
    "--labeled": ["2"],
    "--seeds": ["0"],
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"-d": ["996"]}, "996"),
        ({"-d": []}, "-d missing"),
        ({"-c": ["3d_fullres"]}, "has no configuration 3d_fullres; there are"),
        ({"-p": ["others"]}, "others.json"),
        ({"-tr": ["NoTrainer"]}, "nnU-Net does not find the trainer NoTrainer"),
        ({"-tr": ["CrossMatchTrainer:x=1"]}, "does not know"),
        ({"-tr": ["CrossMatchTrainer@warm=0.5"], "--epochs": ["1"]}, "Give a longer --epochs, or another share"),
        ({"--labeled": ["9"]}, "Asked for 9"),
        ({"--labeled": ["few"]}, "'few'"),
        ({"--labeled": []}, "Labeled cases are missing"),
        ({"--folds": ["7"]}, "There is no fold 7"),
        ({"--epochs": ["0"]}, "--epochs is 0"),
        ({"--jobs": ["0"]}, "--jobs is 0"),
        ({"--seeds": ["-1"]}, "--seeds contains -1"),
        ({"--configurations": ["nowhere.json"]}, "nowhere.json"),
        ({"--settings": ["ramp_length"]}, "give NAME=VALUE"),
    ],
    ids=str,
)
def test_mistakes_are_explained(planned_2d, tmp_path, monkeypatch, capsys, changed, message):
    for name, value in planned_2d.environment.items():
        monkeypatch.setenv(name, value)
    options = {**CALL, **changed}
    arguments = [word for option, values in options.items() if values for word in (option, *values)]
    assert main(["benchmark", *arguments, "-device", "cpu", "-o", str(tmp_path / "bench")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("nnunet-ssl benchmark: error: ")
    assert "Traceback" not in printed.err


def test_a_table_alone_needs_no_dataset(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    assert main(["benchmark", "--table", "-o", str(tmp_path)]) == 2
    assert "There is no table of results" in capsys.readouterr().err
    (tmp_path / "broken.csv").write_text("a,b\n1,2\n")
    assert main(["benchmark", "--table", str(tmp_path / "broken.csv"), "-o", str(tmp_path)]) == 2
    assert "is not a table of results" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["benchmark", "pilot"])
def test_self_training_needs_images(planned_2d, tmp_path, monkeypatch, capsys, command):
    for name, value in planned_2d.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "elsewhere"))
    more = ["--labeled", "2"] if command == "benchmark" else []
    call = [command, "-d", planned_2d.raw.name, "-c", "tiny", "-tr", "nnUNetTrainer@self-train=1", *more]
    assert main([*call, "-device", "cpu", "-o", str(tmp_path / "bench")]) == 2
    assert "self-training reads images, and there is no" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()
