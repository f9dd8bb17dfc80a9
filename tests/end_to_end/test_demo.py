from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from method_steps import BY_NAME

from nnunet_ssl.cli import demo, demo_steps
from nnunet_ssl.cli.lookup import trainer_descriptions, trainers_folder
from nnunet_ssl.cli.main import main
from nnunet_ssl.evaluation.comparison import PairedDifference
from nnunet_ssl.files import lock

METHODS = sorted(BY_NAME)


def run_demo(*arguments, cwd):
    """``nnunet-ssl demo`` in a process of its own, with nnU-Net folders of a user that must stay untouched."""
    # The whole path in its order: site-packages alone would come before the standard library.
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (cwd / "user" / name).mkdir(parents=True, exist_ok=True)
        environment[name] = str(cwd / "user" / name)
    command = [sys.executable, "-m", "nnunet_ssl.cli.main", "demo", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.slow
def test_demo_of_all_trainers(tmp_path):
    trainers = ("nnUNetTrainer", *METHODS)
    finished = run_demo("-o", "out", "--all", "--epochs", "4", cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = re.findall(r"^(chamber) +(\S+) +(\d\.\d+) ± \d\.\d+ +(.*?) +24$", finished.stdout, re.MULTILINE)
    assert [row[:2] for row in rows] == [("chamber", trainer) for trainer in trainers]
    assert "320 labeled iterations each" in finished.stdout
    assert all(0 <= float(dice) <= 1 for _, _, dice, _ in rows)
    assert all(float(dice) > 0.5 for _, _, dice, _ in rows)
    assert all(re.match(r"\d+\.\d\d", hd95) for _, _, _, hd95 in rows)

    out = tmp_path / "out"
    shown = [Path(path) for path in re.findall(r"^(?:picture|curves|table) +(.+)$", finished.stdout, re.MULTILINE)]
    assert [path.name for path in shown] == [
        "overlay.png",
        "progress.png",
        *["progress.png", "progress_ssl.png"] * len(METHODS),
        "summary.md",
    ]
    assert all(path.is_file() for path in shown)
    for trainer in (f"{name}_demo" for name in trainers):
        assert len(list((out / "predictions" / trainer).glob("*.nii.gz"))) == 24
        checkpoint = out / "nnUNet_results" / "Dataset001_Phantom" / f"{trainer}__nnUNetPlans__demo" / "fold_0"
        assert (checkpoint / "checkpoint_final.pth").is_file()
    assert all(list(folder.iterdir()) == [] for folder in (tmp_path / "user").iterdir()), "the user's folders"

    again = run_demo("-o", "out", "--all", "--epochs", "4", cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("already done") == 4 + 2 * len(trainers), "everything but the evaluation"
    assert all(line in again.stdout for line in finished.stdout.splitlines() if line.startswith("chamber"))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls ``nnunet-ssl demo`` in the folder, which must end with exit code 2; gives what it says."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> str:
        try:
            code = main(["demo", *arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        assert code == 2
        return capsys.readouterr().err

    return run


SETTINGS = {"trainer": "UniMatchTrainer", "seed": 0, "epochs": demo.EPOCHS}


def test_refuses_a_folder_that_it_did_not_make(tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    said = refused("-o", "out", "--overwrite")
    assert "exists, but not from a demo" in said
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_refuses_to_continue_a_demo_with_other_settings(tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text(json.dumps(SETTINGS | {"seed": 1}))
    said = refused("-o", "out", "--seed", "2")
    assert "other settings" in said and "--overwrite" in said


def test_refuses_to_compare_all_in_the_folder_of_one(tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text(json.dumps(SETTINGS))
    said = refused("-o", "out", "--all")
    assert "other settings" in said and "--overwrite" in said


def test_one_trainer_or_all(tmp_path, refused):
    said = refused("--all", "--trainer", "SimCVDTrainer")
    assert "not allowed with argument" in said
    assert not (tmp_path / "nnunet_ssl_demo").exists()


@pytest.mark.parametrize(("option", "methods"), [("--all", METHODS), *((f"-tr={name}", [name]) for name in METHODS)])
def test_steps(tmp_path, monkeypatch, capsys, option, methods):
    """The demo without what its steps do."""
    evaluated, called = [], []
    monkeypatch.setattr(demo_steps.Steps, "function", lambda steps, name, what, action: called.append(name))
    monkeypatch.setattr(demo_steps.Steps, "command", lambda steps, name, arguments: called.append(name))
    monkeypatch.setattr(
        demo_steps.Steps,
        "chains",
        lambda steps, chains, at_once, epochs: called.extend((at_once, epochs, *(list(chain) for chain in chains))),
    )
    monkeypatch.setattr(
        demo,
        "_evaluate",
        lambda folder, dataset, trainers, iterations: (
            evaluated.extend(trainers) or ("table", "gains", folder / "overlay.png")
        ),
    )
    assert main(["demo", option, "-np", "2", "-o", str(tmp_path / "out")]) == 0
    chains = [[f"{step}_{name}_demo" for step in ("train", "predict")] for name in ["nnUNetTrainer", *methods]]
    assert called == ["phantoms", "plan", "configuration", "preprocess", 2, demo.EPOCHS, *chains]
    total = 5 + 2 * len(chains)
    assert f"[1/{total}] evaluate" in capsys.readouterr().out, "the one step that is left"
    assert evaluated == ["nnUNetTrainer", *methods]
    modules = {path.stem: path.read_text() for path in (tmp_path / "out" / "trainers").glob("*.py")}
    assert set(modules) == {f"{name}_demo" for name in ["nnUNetTrainer", *methods]}
    assert all(f"import {name.removesuffix('_demo')}\n" in text for name, text in modules.items())


def test_all_is_every_trainer_of_the_folder():
    assert list(trainer_descriptions(trainers_folder())) == METHODS


def test_an_unknown_trainer_is_refused_with_the_known_ones(tmp_path, refused):
    said = refused("--trainer", "NoSuchTrainer")
    assert "no trainer NoSuchTrainer" in said and ", ".join(METHODS) in said
    assert not (tmp_path / "nnunet_ssl_demo").exists(), "the right call works at once"


@pytest.mark.parametrize(("option", "value"), [("--epochs", "0"), ("-np", "0"), ("--seed", "-1")])
def test_a_wrong_number_writes_nothing(tmp_path, option, value, refused):
    said = refused(option, value)
    assert f"{option} is {value}" in said
    assert not (tmp_path / "nnunet_ssl_demo").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("-tr", "nnUNetTrainer"), "compare with nnUNetTrainer"), (("-o", f"a{os.pathsep}b"), "nnUNet_extTrainer")],
)
def test_what_cannot_work_writes_nothing(tmp_path, arguments, message, refused):
    said = refused(*arguments)
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path, refused):
    (tmp_path / "file").touch()
    said = refused("-o", "file/out")
    assert f"{tmp_path / 'file' / 'out'}" in said
    assert "cannot be written" in said


def test_one_demo_at_a_time_in_a_folder(tmp_path):
    with lock(tmp_path / "out" / "demo.lock"):
        finished = run_demo("-o", "out", cwd=tmp_path)
    assert finished.returncode == 2 and "Another demo runs in" in finished.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["demo.lock"]


def test_the_gain_in_words():
    pair = PairedDifference(mean=0.0612, low=0.021, high=0.1, p_value=0.01, cases=8)
    assert demo._gain("UniMatchTrainer", pair) == (
        "UniMatchTrainer: 0.061 Dice more than nnUNetTrainer on average "
        "(95 % interval over 8 test cases +0.021 to +0.100)."
    )
    unclear = demo._gain("UniMatchTrainer", replace(pair, mean=-0.01, low=-0.04))
    assert "0.010 Dice less than nnUNetTrainer" in unclear and "does not show a difference" in unclear


@pytest.mark.parametrize(
    ("patch_size", "strides", "expected"),
    [
        ([128, 128], [[1, 1], [2, 2], [2, 2], [2, 2]], [64, 64]),
        ([26, 40], [[1, 1], [2, 2]], [26, 40]),
        ([300, 52], [[1, 1], [2, 2], [2, 2], [2, 1]], [64, 52]),
    ],
)
def test_configuration_fits_the_plan_it_inherits_from(patch_size, strides, expected):
    options = {"n_stages": len(strides), "strides": strides, "kernel_sizes": [[3] * len(patch_size)] * len(strides)}
    parent = {"patch_size": patch_size, "architecture": {"network_class_name": "Net", "arch_kwargs": options}}
    configuration = demo.demo_configuration(parent)
    assert configuration["inherits_from"] == "2d" and configuration["patch_size"] == expected
    made = configuration["architecture"]["arch_kwargs"]
    stages = made["n_stages"]
    assert stages == min(4, len(strides))
    assert [len(made[key]) for key in ("strides", "kernel_sizes", "features_per_stage")] == [stages] * 3
    assert len(made["n_conv_per_stage_decoder"]) == stages - 1
    assert options["n_stages"] == len(strides), "the parent stays as it was"
