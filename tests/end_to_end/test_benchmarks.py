"""The benchmarks' scripts run, on a tiny dataset: what they print and keep, not what the numbers are."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_steps import BY_NAME, make_trainer

from nnunet_ssl.cli.lookup import trainer_descriptions, trainers_folder

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


def run(planned, script: str, *arguments: object, code: int = 0) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(
        command, env=planned.environment, cwd=planned.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == code, done.stdout[-6000:]
    return done.stdout


def test_convolutions_are_chosen_as_in_a_training(planned_2d, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.setenv(name, planned_2d.environment.get(name, ""))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    from common import make_trainer as make_for_benchmark

    args = argparse.Namespace(d=str(planned_2d.dataset_id), c="tiny", p="nnUNetPlans", device="cpu")
    make_for_benchmark(args, "nnUNetTrainer", tmp_path)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic


def test_step_time_of_each_term(planned_2d):
    dataset = ["-d", planned_2d.dataset_id, "-c", "tiny", "-tr", "CrossMatchTrainer"]
    printed = run(planned_2d, "step_time.py", *dataset, "--rounds", 2, "--profile")
    for row in ("| nnUNetTrainer ", "| CrossMatchTrainer, split ", "passes, separate, bare ", "| tkd + dkd ", "| all "):
        assert row in printed


def test_step_time_of_every_trainer(planned_2d):
    printed = run(planned_2d, "step_time.py", "-d", planned_2d.dataset_id, "-c", "tiny", "--rounds", 1)
    for name in BY_NAME:
        rows = re.findall(rf"^\| {name}, (.*?)(?: +\| \d+\.\d+){{3}} ", printed, re.MULTILINE)
        assert [row.split(" ")[-1] for row in rows] == ["split", "stacked", "bare", "bare"], printed


# As the papers have them: encoder passes, decoder passes, and the teacher's.
PASSES = {
    "BCPTrainer": "2 encoder + 2 decoder passes + 1 of the teacher",
    "CPSTrainer": "4 encoder + 4 decoder passes",
    "CrossMatchTrainer": "4 encoder + 8 decoder passes",
    "MCNetTrainer": "2 encoder + 6 decoder passes",
    "MeanTeacherTrainer": "2 encoder + 2 decoder passes + 1 of the teacher",
}


@pytest.mark.parametrize("name", PASSES)
def test_bare_passes_are_those_of_the_method(name, planned_2d, monkeypatch, tmp_path):
    """Of the largest stage, with those that are made before the streams'."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from common import give_unlabeled_batches, in_largest_stage, labeled_batch
    from passes import BarePasses

    trainer = in_largest_stage(make_trainer(BY_NAME[name].trainer, planned_2d, monkeypatch, tmp_path))
    give_unlabeled_batches(trainer)
    passes = BarePasses(trainer, labeled_batch(trainer))
    assert passes.counts == PASSES[name]
    trainer.train_step(labeled_batch(trainer))
    assert BarePasses(trainer, labeled_batch(trainer)).counts == PASSES[name], "the step is of that stage, too"
    for run_passes in (passes.stacked, passes.separate):
        run_passes()
        learning = [(n, p) for n, p in trainer.training_network.named_parameters() if p.requires_grad]
        # The heads of lower resolutions have none.
        assert all("seg_layers.0." in name for name, parameter in learning if parameter.grad is None)


def test_loader_and_memory(planned_2d):
    dataset = ["-d", planned_2d.dataset_id, "-c", "tiny"]
    printed = run(planned_2d, "loader.py", *dataset, "--repeats", 2)
    assert printed.count("| nnU-Net, labeled ") == len(BY_NAME) and "| CrossMatchTrainer, unlabeled " in printed
    assert "| SimCVDTrainer, stacked" in run(planned_2d, "memory.py", *dataset, "-tr", "SimCVDTrainer")


def test_every_command_with_a_trainer(planned_2d, tmp_path):
    arguments = ["-d", planned_2d.dataset_id, "-c", "tiny", "-device", "cpu", "--jobs", 2]
    printed = run(planned_2d, "commands.py", *arguments, "-o", tmp_path, "-tr", "nnUNetTrainer", "CPSTrainer")
    table = (tmp_path / "commands.md").read_text()
    assert table in printed
    # nnUNetTrainer is nnU-Net's own: there is nothing to export.
    for trainer, mode, same in ("nnUNetTrainer", "", ""), ("CPSTrainer", "split", "1.0000"):
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {trainer} "))
        _, _, memory_mode, compiled, losses, dice, device, exported, *_ = map(str.strip, row.split("|"))
        assert (memory_mode, compiled, losses, device, exported) == (mode, "no", "4 of 4", "1.0000", same)
        assert 0 <= float(dice) <= 1


def test_commands_that_fail_are_named(planned_2d, tmp_path):
    arguments = ["-d", planned_2d.dataset_id, "-c", "nothing", "-device", "cpu", "-tr", "nnUNetTrainer"]
    printed = run(planned_2d, "commands.py", *arguments, "-o", tmp_path, code=1)
    assert "train ended with" in (tmp_path / "commands.md").read_text()
    assert "1 of 1 trainers failed: nnUNetTrainer" in printed


def gpu_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def test_gpu_answers_every_question(planned_2d, tmp_path):
    dataset = ["-d", planned_2d.dataset_id, "-c", "tiny", "--accuracy", "tiny", "--labeled", 2, "--epochs", 1]
    arguments = ["--dry-run", "--jobs", 2, "--minutes", 20, "-tr", "MutualReliableTrainer"]
    printed = run(planned_2d, "gpu.py", "-o", tmp_path, *dataset, *arguments)
    rows = gpu_rows(tmp_path)
    assert [row for row in rows if row.get("note")] == [], "no row failed or was skipped"
    by_question = {letter: [row for row in rows if row["question"] == letter] for letter in "acdefgh"}
    steps = {(row["trainer"], row["plan"], row["mode"], row["compiled"]) for row in by_question["a"]}
    mutual = "MutualReliableTrainer"
    for plan in ("128³", "dataset"):
        expected = {("nnUNetTrainer", plan, "", compiled) for compiled in (False, True)}
        expected |= {(mutual, plan, mode, compiled) for mode in ("split", "stacked") for compiled in (False, True)}
        expected |= {(mutual, plan, f"bare {way}", False) for way in ("stacked", "separate")}
        assert {step for step in steps if step[1] == plan} == expected
    assert all(row["graphs"] > 0 and row["breaks"] == 0 for row in by_question["a"] if row["compiled"])
    assert all(0 < row["split"] < row["bytes"] < row["stacked"] for row in by_question["c"])
    assert [row["modes"] for row in by_question["c"]] == [["split"] * 3] * 4, "it fell back in the first step"
    total, *kernels = by_question["d"]
    assert len(kernels) == 10 and total["part"] == 1
    assert "aten::convolution_backward" in {row["kernel"] for row in kernels}
    lines = [row["line"] for row in by_question["e"] if row["trainer"] == mutual]
    assert lines[0] == "all" and all(line.startswith("nnunet_ssl/") for line in lines[1:])
    assert {row["trainer"] for row in by_question["f"]} == {"nnUNetTrainer", mutual}
    assert all(row["finite"] == row["steps"] and row["scale"] == 2**16 for row in by_question["g"])
    assert "nnUNetTrainer" in (tmp_path / "accuracy" / "report.md").read_text()
    report = (tmp_path / "gpu.md").read_text()
    assert report in printed and [line[3] for line in report.splitlines() if line.startswith("## ")] == list("abcdefgh")
    again = run(planned_2d, "gpu.py", "-o", tmp_path, *arguments, code=1)
    assert again.startswith(f"{tmp_path} holds results of another run")


def test_gpu_finds_lines_that_synchronize(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_measurements import lines_that_synchronize

    code = compile("tensor.item()\ntensor.nonzero()\ntensor + 1", "/site-packages/nnunet_ssl/losses/some.py", "exec")

    def run_lines() -> None:
        exec(code, {"tensor": torch.ones(1)})
        torch.ones(1).item()

    found = lines_that_synchronize(torch.device("cpu"), run_lines)
    assert {line.strip(): times for line, times in found.items()} == {
        "nnunet_ssl/losses/some.py:1": 1,
        "nnunet_ssl/losses/some.py:2": 1,
        "elsewhere": 1,
    }


def test_gpu_limits_memory_by_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_measurements import measured
    from gpu_rows import Arm, read_rows, write_row

    step = Arm("a", "CrossMatchTrainer", "128³", "split")
    write_row(tmp_path, replace(step, compiled=True), {"note": "failed"})
    for mode, compiled, size in (("split", False, 5), ("stacked", False, 7), ("stacked", True, 6)):
        write_row(tmp_path, replace(step, mode=mode, compiled=compiled), {"reserved": size})
    with (tmp_path / "gpu.jsonl").open("a") as file:
        file.write('{"question": "a", "cut off')
    rows, arm = read_rows(tmp_path), Arm("c", "CrossMatchTrainer", "128³", limit=0.5)
    assert [measured(rows, arm, mode) for mode in ("split", "stacked")] == [5, 7]
    assert [measured(rows, replace(arm, compiled=True), mode) for mode in ("split", "stacked")] == [None, 6]


def test_gpu_names_what_it_skips(planned_2d, tmp_path):
    """All methods are to be measured; without time, every row is there and says so."""
    run(planned_2d, "gpu.py", "-o", tmp_path, "--dry-run", "--minutes", 0)
    rows = gpu_rows(tmp_path)
    methods = set(trainer_descriptions(trainers_folder()))
    for letter in "aeg":
        assert {row["trainer"] for row in rows if row["question"] == letter} == {"nnUNetTrainer", *methods}
    assert {row["note"] for row in rows} == {"skipped: no time was left", "skipped: it needs -d and --accuracy"}
    report = (tmp_path / "gpu.md").read_text()
    assert "- 128³, CrossMatchTrainer, split, compiled: skipped: no time was left" in report


def test_gpu_row_that_fails(planned_2d, tmp_path):
    """An unknown trainer fails alone."""
    run(planned_2d, "gpu.py", "-o", tmp_path, "--dry-run", "--questions", "g", "-tr", "NoTrainer", "CrossMatchTrainer")
    rows = {row["trainer"]: row for row in gpu_rows(tmp_path)}
    assert "NoTrainer" in rows["NoTrainer"]["note"] and rows["NoTrainer"]["note"].startswith("failed: ")
    assert rows["CrossMatchTrainer"]["finite"] == rows["nnUNetTrainer"]["finite"] == 3


def test_scale(planned_2d, tmp_path):
    printed = run(planned_2d, "scale.py", "--folder", tmp_path, "--counts", 3, 6)
    assert "| 3 " in printed and "| 6 " in printed
    assert len(list((tmp_path / "nnUNet_preprocessed").glob("*/*_unlabeled/*.pkl"))) == 6
    again = run(planned_2d, "scale.py", "--folder", tmp_path, "--counts", 3, 6)
    assert again.splitlines()[-2:] == printed.splitlines()[-2:], "measured once"
