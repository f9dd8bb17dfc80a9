from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from method_steps import BY_NAME
from tqdm import tqdm

from nnunet_ssl.cli import demo, demo_steps
from nnunet_ssl.cli.lookup import find_program, trainer_descriptions, trainers_folder
from nnunet_ssl.cli.main import main
from nnunet_ssl.errors import UserError
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


SETTINGS = {"trainer": "UniMatchTrainer", "seed": 0, "epochs": demo.EPOCHS}


def test_refuses_a_folder_that_it_did_not_make(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    finished = run_demo("-o", "out", "--overwrite", cwd=tmp_path)
    assert finished.returncode == 2
    assert "exists, but not from a demo" in finished.stderr
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_refuses_to_continue_a_demo_with_other_settings(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text(json.dumps(SETTINGS | {"seed": 1}))
    finished = run_demo("-o", "out", "--seed", "2", cwd=tmp_path)
    assert finished.returncode == 2
    assert "other settings" in finished.stderr and "--overwrite" in finished.stderr


def test_refuses_to_compare_all_in_the_folder_of_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text(json.dumps(SETTINGS))
    finished = run_demo("-o", "out", "--all", cwd=tmp_path)
    assert finished.returncode == 2
    assert "other settings" in finished.stderr and "--overwrite" in finished.stderr


def test_one_trainer_or_all(tmp_path):
    finished = run_demo("--all", "--trainer", "SimCVDTrainer", cwd=tmp_path)
    assert finished.returncode == 2
    assert "not allowed with argument" in finished.stderr
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


def test_an_unknown_trainer_is_refused_with_the_known_ones(tmp_path):
    finished = run_demo("--trainer", "NoSuchTrainer", cwd=tmp_path)
    assert finished.returncode == 2
    assert "no trainer NoSuchTrainer" in finished.stderr and ", ".join(METHODS) in finished.stderr
    assert not (tmp_path / "nnunet_ssl_demo").exists(), "the right call works at once"


@pytest.mark.parametrize(("option", "value"), [("--epochs", "0"), ("-np", "0"), ("--seed", "-1")])
def test_a_wrong_number_writes_nothing(tmp_path, option, value):
    finished = run_demo(option, value, cwd=tmp_path)
    assert finished.returncode == 2 and f"{option} is {value}" in finished.stderr
    assert not (tmp_path / "nnunet_ssl_demo").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("-tr", "nnUNetTrainer"), "compare with nnUNetTrainer"), (("-o", f"a{os.pathsep}b"), "nnUNet_extTrainer")],
)
def test_what_cannot_work_writes_nothing(tmp_path, arguments, said):
    finished = run_demo(*arguments, cwd=tmp_path)
    assert finished.returncode == 2 and said in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["user"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    finished = run_demo("-o", "file/out", cwd=tmp_path)
    assert finished.returncode == 2 and f"{tmp_path / 'file' / 'out'}" in finished.stderr
    assert "cannot be written" in finished.stderr


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
    assert "0.010 Dice less than nnUNetTrainer" in unclear and "shows no difference" in unclear


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


def test_a_failing_command_shows_the_end_of_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_steps, "find_program", lambda name: sys.executable)
    steps = demo_steps.Steps(tmp_path, dict(os.environ), total=1)
    with pytest.raises(UserError, match="exit code 3") as error:
        steps.command("train", ["nnUNetv2_train", "-c", "print('no memory'); raise SystemExit(3)"])
    log = tmp_path / "1_train.log"
    assert "no memory" in str(error.value) and str(log) in str(error.value)
    assert log.read_text().strip() == "no memory"

    again = demo_steps.Steps(tmp_path, dict(os.environ), total=1)
    again.command("train", ["nnUNetv2_train", "-c", "print('better')"])
    assert log.read_text().strip() == "better", "a step that failed is done again"
    finished = demo_steps.Steps(tmp_path, dict(os.environ), total=1)
    finished.command("train", ["nnUNetv2_train", "-c", "raise SystemExit(3)"])
    assert "already done" in capsys.readouterr().out


@pytest.fixture
def steps(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_steps, "find_program", lambda name: sys.executable)
    return lambda: demo_steps.Steps(tmp_path, dict(os.environ), total=4)


def python(code):
    return ["nnUNetv2_train", "-c", code]


def meeting(own, other):
    """Ends once the other one runs too; fails if that does not happen."""
    return (
        "import pathlib, time\n"
        f"pathlib.Path({str(own)!r}).touch()\n"
        "end = time.monotonic() + 60\n"
        f"while not pathlib.Path({str(other)!r}).exists():\n"
        "    assert time.monotonic() < end\n"
        "    time.sleep(0.05)"
    )


def test_chains_run_at_once_and_each_in_its_order(tmp_path, steps, capsys):
    a, b, made = tmp_path / "a", tmp_path / "b", tmp_path / "made"
    write, read = f"open({str(made)!r}, 'w').write('x')", f"open({str(made)!r}).read()"
    chains = [
        {"train_a": python(meeting(a, b)), "predict_a": python("")},
        {"train_b": python(f"{meeting(b, a)}\n{write}"), "predict_b": python(read)},
    ]
    steps().chains(chains, at_once=2, epochs=1)
    ended = re.findall(r"^\[(\d)/4\]|\.\.\. \d+ s$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(filter(None, ended)) == ["1", "2", "3", "4"]
    assert {file.name for file in tmp_path.glob("*.*")} == {
        f"{name}.{ending}"
        for name in ("1_train_a", "2_predict_a", "3_train_b", "4_predict_b")
        for ending in ("log", "done")
    }

    steps().chains([{name: python("raise SystemExit(3)") for name in chain} for chain in chains], at_once=2, epochs=1)
    assert capsys.readouterr().out.count("already done") == 4


def test_one_chain_at_a_time(tmp_path, steps):
    log = tmp_path / "order"
    code = "import sys, time\nfor _ in range(3): print({0!r}, file=open({1!r}, 'a')); time.sleep(0.05)"
    steps().chains(
        [{f"{name}{number}": python(code.format(name, str(log))) for number in (1, 2)} for name in "ab"],
        at_once=1,
        epochs=1,
    )
    assert log.read_text().split() == ["a"] * 6 + ["b"] * 6


def test_where_a_training_fails_the_other_goes_on(tmp_path, steps, capsys):
    chains = [
        {"train_a": python("print('no memory'); raise SystemExit(3)"), "predict_a": python("")},
        {"train_b": python("import time; time.sleep(1)"), "predict_b": python("")},
    ]
    one = steps()
    with pytest.raises(UserError, match=r"exit code 3. The end of .*1_train_a.log") as error:
        one.chains(chains, at_once=2, epochs=1)
    assert "no memory" in str(error.value)
    assert {marker.stem for marker in tmp_path.glob("*.done")} == {"3_train_b", "4_predict_b"}
    assert not (tmp_path / "2_predict_a.log").exists(), "nothing to predict with"
    assert one.count == 4 and capsys.readouterr().out.count("failed") == 1


def test_nothing_goes_on_behind_a_user_who_stops_it(tmp_path, steps, monkeypatch):
    started = tmp_path / "started"
    code = f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"

    def sleep(_seconds):
        if started.is_file() and started.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(demo_steps.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        steps().chains([{"train_a": python(code)}, {"train_b": python("")}], at_once=1, epochs=1)
    assert not (tmp_path / "1_train_a.done").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


FORKING = """
import os, pathlib, signal, time
folder = pathlib.Path({folder!r})
worker = os.fork()
(folder / ("command" if worker else "worker")).write_text(str(os.getpid()))
time.sleep(600)
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def runs(file):
    """Whether the process whose number is in the file runs; one that has ended may wait to be noticed."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", file.read_text()], capture_output=True, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


def began(*files):
    return lambda: all(file.is_file() and file.read_text() for file in files)


@needs_fork
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_nothing_goes_on_where_a_signal_ends_the_demo(tmp_path, number):
    code = f"""
import os, signal, sys
from pathlib import Path
from nnunet_ssl.cli import demo_steps
signal.signal(signal.SIGINT, signal.default_int_handler)
demo_steps.find_program = lambda name: sys.executable
folder = Path({str(tmp_path)!r})
with demo_steps.ended_by_signals():
    steps = demo_steps.Steps(folder, dict(os.environ), total=1)
    steps.chains([{{"train": ["nnUNetv2_train", "-c", {FORKING.format(folder=str(tmp_path))!r}]}}], at_once=1, epochs=1)
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    files = [tmp_path / name for name in ("command", "worker")]
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as demo_process:
        until(began(*files))
        demo_process.send_signal(getattr(signal, number))
        demo_process.wait(60)
    until(lambda: not any(map(runs, files)))
    assert not (tmp_path / "1_train.done").exists()


@needs_fork
def test_the_workers_of_a_command_that_is_killed_end(tmp_path, steps):
    files = [tmp_path / name for name in ("command", "worker")]
    kill = f"""
import os, signal, time
while not os.path.exists({str(files[1])!r}):
    time.sleep(0.02)
os.kill(int(open({str(files[0])!r}).read()), signal.SIGKILL)
"""
    chains = [{"train_a": python(FORKING.format(folder=str(tmp_path)))}, {"train_b": python(kill)}]
    with pytest.raises(UserError, match="was killed by SIGKILL, as the system does where memory runs out"):
        steps().chains(chains, at_once=2, epochs=1)
    until(lambda: not runs(files[1]))
    assert {marker.stem for marker in tmp_path.glob("*.done")} == {"2_train_b"}


def test_a_full_disk_is_said_to_be_full(steps):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"phantoms failed: No space left on device\. The same command continues"):
        steps().function("phantoms", "make phantoms", write)


def test_the_progress_counts_epochs_of_this_call(tmp_path, steps, monkeypatch):
    """An epoch that was trained before says nothing of the time per epoch; one that is trained again counts once."""
    for name, done in (("1_train_a", True), ("2_train_b", False)):
        (tmp_path / f"{name}.log").write_text("Epoch time: 1 s\n")
        (tmp_path / f"{name}.done").touch() if done else None
    seen = []
    monkeypatch.setattr(
        demo_steps, "_progress", lambda total, initial: seen.append((total, initial)) or tqdm(disable=True)
    )
    steps().chains([{"train_a": python("")}, {"train_b": python("")}], at_once=1, epochs=1)
    assert seen == [(2, 1)]


def test_missing_nnunet_command():
    with pytest.raises(UserError, match="pip install nnunetv2"):
        find_program("nnUNetv2_no_such_command")
