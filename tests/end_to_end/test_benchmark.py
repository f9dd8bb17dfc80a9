"""``nnunet-ssl benchmark`` with real trainings: killed in the middle, shared by two commands, reported."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trees import contents

pytestmark = pytest.mark.slow


def start(planned, folder, *arguments, **options):
    command = [sys.executable, "-m", "nnunet_ssl.cli.main", "benchmark", "-d", str(planned.dataset_id), "-c", "tiny"]
    command += ["-device", "cpu", "--epochs", "3", "--labeled", "2", "-o", str(folder), *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=planned.environment, cwd=planned.root, **output, **options)


def processes_of(folder):
    """That name a folder in their command, where the system shows them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in file.read_bytes():
                found.append(file.parent.name)
    return found


def finish(process):
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed[-6000:]
    return printed


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_stopped_in_its_first_epoch_it_goes_on(planned_2d, tmp_path):
    arms = ["-tr", "CrossMatchTrainer_short", "--seeds", "0"]
    first = start(planned_2d, tmp_path, *arms)
    log = tmp_path / "logs" / "CrossMatchTrainer_short_2_labeled_seed_0.log"
    wait_for(lambda: log.is_file() and "Epoch 0" in log.read_text(), 300)
    first.kill()
    first.wait()
    wait_for(lambda: not processes_of(tmp_path), 60)
    assert "SIGTERM in epoch 0" in log.read_text()
    finish(start(planned_2d, tmp_path, *arms))
    assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 2 * len(planned_2d.phantoms.validation)


def test_killed_shared_and_reported(planned_2d, tmp_path):
    folder = tmp_path / "bench"
    # A training long enough to be killed in its middle.
    arms = ["-tr", "nnUNetTrainer_short", "CrossMatchTrainer_short", "--seeds", "0"]
    # In the background, as a shell's & and nohup leave it.
    ignored = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    first = start(planned_2d, folder, *arms, preexec_fn=ignored)
    progress = folder / "tasks" / "nnUNetTrainer_short_2_labeled_seed_0.progress"
    deadline = time.monotonic() + 300
    while not progress.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    deadline = time.monotonic() + 60
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(folder), "the training ends with the command, and its workers with it"
    done = len(json.loads(progress.read_text())["epochs"])
    assert 1 <= done <= 3

    # Two commands at once: each training is done by one of them, and both report both.
    again, beside = start(planned_2d, folder, *arms), start(planned_2d, folder, *arms, "--jobs", "2")
    printed = [finish(process) for process in (again, beside)]
    rows = list(csv.DictReader((folder / "results.csv").open()))
    cases, structures = len(planned_2d.phantoms.validation), 2
    assert len(rows) == 2 * cases * structures
    assert {row["training"] for row in rows} == {
        "nnUNetTrainer_short; 2 labeled; seed 0",
        "CrossMatchTrainer_short; 2 labeled; seed 0",
    }
    log = (folder / "logs" / "nnUNetTrainer_short_2_labeled_seed_0.log").read_text()
    assert log.count("Epoch 0") == 1, "the epoch that was done is not done again"
    assert all(float(row["iterations"]) == 9 and float(row["seconds_per_step"]) > 0 for row in rows)
    assert all(float(row["reference_cpu_seconds_per_step"]) > 0 and row["compiled"] == "False" for row in rows)
    assert all(row["processor"] and row["torch"] and row["campaign"] == rows[0]["campaign"] for row in rows)
    for text in printed:
        assert "## 2 labeled" in text and "report.md, report.csv, report.png, results.csv" in text

    # More seeds are added; what is there is not trained again.
    more = finish(start(planned_2d, folder, "-tr", "nnUNetTrainer_short", "--seeds", "0", "1"))
    assert "1 of 2 trainings are in" in more
    assert log == (folder / "logs" / "nnUNetTrainer_short_2_labeled_seed_0.log").read_text()
    assert "| nnUNetTrainer_short     |         2 |" in more
    table = finish(start(planned_2d, folder, "--table"))
    assert more.endswith(table.lstrip("\n")) or table.strip() in more

    broken = start(planned_2d, folder, "-tr", "nnUNetTrainer_short:x=1")
    assert "no settings" in broken.communicate()[0] and broken.returncode == 2
    assert not list((folder / "nnUNet_results").glob("**/*.whole"))


def test_the_same_seed_makes_the_same_training(planned_2d, tmp_path):
    """Of nnU-Net's own trainer, which has no setting for it; with one worker, on one machine."""
    digits = []
    for name, seeds in (("a", ["0", "1"]), ("b", ["0"])):
        finish(start(planned_2d, tmp_path / name, "-tr", "nnUNetTrainer_short", "--seeds", *seeds))
        rows = csv.DictReader((tmp_path / name / "results.csv").open())
        digits += [(row["seed"], [row[name] for name in ("case", "structure", "dice", "assd")]) for row in rows]
    count = len(digits) // 3
    first, other, again = ([row[1] for row in digits[part * count : (part + 1) * count]] for part in range(3))
    assert first == again and first != other


STILL = """
import os

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainer_still(nnUNetTrainer):
    # Its steps have no length: what it ends with is what it started from.
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 0.0, 3, 2

    def on_epoch_end(self):
        super().on_epoch_end()
        if str(self.current_epoch) == os.environ.get("STOP_AFTER_EPOCHS"):
            raise SystemExit("stopped for the test")
"""


def test_warm_start(planned_2d, tmp_path):
    """Interrupted in its second stage, it goes on there; it began there with the weights of the first one's end."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "still.py").write_text(STILL)
    folders = os.pathsep.join([planned_2d.environment["nnUNet_extTrainer"], str(tmp_path / "more")])
    planned = dataclasses.replace(planned_2d, environment={**planned_2d.environment, "nnUNet_extTrainer": folders})
    folder = tmp_path / "bench"
    arms = ["-tr", "nnUNetTrainer_still@warm=0.3", "--seeds", "0"]
    stopped = dataclasses.replace(planned, environment={**planned.environment, "STOP_AFTER_EPOCHS": "1"})
    (first := start(stopped, folder, *arms)).communicate(timeout=900)
    assert first.returncode == 2
    finish(start(planned, folder, *arms))
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert {row["training"] for row in rows} == {"nnUNetTrainer_still@warm=0.3; 2 labeled; seed 0"}
    log = (folder / "logs" / "nnUNetTrainer_still_warm_0.3_2_labeled_seed_0.log").read_text()
    assert log.count("stopped for the test") == 1
    assert log.count("Epoch 0") == 2 and log.count("Loading pretrained weights") == 1
    progress = json.loads((folder / "tasks" / "nnUNetTrainer_still_warm_0.3_2_labeled_seed_0.progress").read_text())
    assert len(progress["epochs"]) == 2, "the first stage's is kept; one that a stop comes into is not measured"
    before, after = (
        torch.load(file, weights_only=False)["network_weights"]
        for file in (
            *folder.glob("nnUNet_results/*/*/nnUNetTrainer__nnUNetPlans_before_*/*/checkpoint_final.pth"),
            *folder.glob("nnUNet_results/*/*/nnUNetTrainer_still__nnUNetPlans_warm_0.3__*/*/checkpoint_final.pth"),
        )
    )
    assert before.keys() == after.keys()
    kept = [name for name in after if ".seg_layers." not in name]
    assert kept and all(torch.equal(after[name], before[name]) for name in kept)
    last = max(name for name in after if ".seg_layers." in name and name.endswith("weight"))
    assert not torch.equal(after[last], before[last]), "drawn at random, as with -pretrained_weights"


def test_self_training_in_two_rounds(planned_2d, tmp_path):
    """Killed while it ranks and while it trains on pseudo-labels, it goes on there; the dataset stays as it is."""
    folder = tmp_path / "bench"
    arms = ["-tr", "nnUNetTrainer_short@self-train=2", "--seeds", "0", "--epochs", "1"]
    home = folder / "self_training" / "nnUNetTrainer_short_self-train_2_2_labeled_seed_0"
    log = folder / "logs" / f"{home.name}.log"
    before = contents(planned_2d.raw)

    def ranks() -> bool:
        return log.is_file() and "Predicting" in log.read_text()

    for condition in (ranks, (home / "round_1.done").is_file):
        first = start(planned_2d, folder, *arms)
        wait_for(condition, 600)
        first.kill()
        first.wait()
        wait_for(lambda: not processes_of(tmp_path), 60)
    finish(start(planned_2d, folder, *arms))
    assert contents(planned_2d.raw) == before
    text = log.read_text()
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert {row["training"] for row in rows} == {"nnUNetTrainer_short@self-train=2; 2 labeled; seed 0"}
    assert {row["structure"] for row in rows} == set(planned_2d.phantoms.labels)
    assert {row["case"] for row in rows} == set(
        json.loads((folder / "campaign.json").read_text())["settings"]["2 labeled"]["val"]
    )
    for number, name in ((1, "Dataset999"), (2, "Dataset998")):
        record = json.loads(next(home.glob(f"nnUNet_raw/{name}_*/self_training.json")).read_text())
        cases = json.loads((home / f"queue_{number}" / "queue.json").read_text())["cases"]
        assert len(record["pseudo_labeled"]) == round(len(cases) / 2), "the better half"
        assert {model["trainer"] for model in record["models"]} == {
            "nnUNetTrainer_short" if number == 1 else "nnUNetTrainer"
        }
    assert text.count("Epoch 0") >= 5
    assert (home / "nnUNet_results").is_dir() and len(list(home.glob("nnUNet_results/*/*/*/checkpoint_final.pth"))) == 5
