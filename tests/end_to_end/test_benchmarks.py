"""The benchmarks' scripts run, on a tiny dataset: what they print and keep, not what the numbers are."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


def run(planned, script: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(
        command, env=planned.environment, cwd=planned.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_convolutions_are_chosen_as_in_a_training(planned_2d, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.setenv(name, planned_2d.environment.get(name, ""))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    from common import make_trainer

    args = argparse.Namespace(d=str(planned_2d.dataset_id), c="tiny", p="nnUNetPlans", device="cpu")
    make_trainer(args, "nnUNetTrainer", tmp_path)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic


def test_step_time_of_each_term(planned_2d):
    dataset = ["-d", planned_2d.dataset_id, "-c", "tiny", "-tr", "CrossMatchTrainer"]
    printed = run(planned_2d, "step_time.py", *dataset, "--rounds", 2, "--profile")
    for row in ("| nnUNetTrainer ", "| CrossMatchTrainer, split ", "passes, separate, bare ", "| tkd + dkd ", "| all "):
        assert row in printed


def test_loader_and_memory(planned_2d):
    dataset = ["-d", planned_2d.dataset_id, "-c", "tiny"]
    printed = run(planned_2d, "loader.py", *dataset, "--repeats", 2)
    assert printed.count("| nnU-Net, labeled ") == 3 and "| CrossMatchTrainer, unlabeled " in printed
    assert "| SimCVDTrainer, stacked" in run(planned_2d, "memory.py", *dataset, "-tr", "SimCVDTrainer")


def test_scale(planned_2d, tmp_path):
    printed = run(planned_2d, "scale.py", "--folder", tmp_path, "--counts", 3, 6)
    assert "| 3 " in printed and "| 6 " in printed
    assert len(list((tmp_path / "nnUNet_preprocessed").glob("*/*_unlabeled/*.pkl"))) == 6
    again = run(planned_2d, "scale.py", "--folder", tmp_path, "--counts", 3, 6)
    assert again.splitlines()[-2:] == printed.splitlines()[-2:], "measured once"
