"""``nnunet-ssl pilot`` with real trainings: stopped when its time is over, gone on with, reported."""

from __future__ import annotations

import csv
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def pilot(planned, folder, *arguments):
    command = [sys.executable, "-m", "nnunet_ssl.cli.main", "pilot", "-d", str(planned.dataset_id), "-c", "tiny"]
    command += ["-device", "cpu", "--epochs", "1", "--folds", "0", "-tr", "CrossMatchTrainer_short", "-o", str(folder)]
    return subprocess.run(
        [*command, *arguments], env=planned.environment, cwd=planned.root, capture_output=True, text=True, timeout=900
    )


def test_stopped_gone_on_with_and_reported(planned_2d, tmp_path):
    folder = tmp_path / "pilot"
    stopped = pilot(planned_2d, folder, "--hours", "0.0003")
    assert stopped.returncode == 2 and "The time ended before that" in stopped.stderr
    done = pilot(planned_2d, folder, "--seeds", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = list(csv.DictReader((folder / "results.csv").open()))
    (setting,) = {row["setting"] for row in rows}
    trainings = {
        f"{arm}; {setting}; seed {seed}" for arm in ("nnUNetTrainer", "CrossMatchTrainer_short") for seed in (0, 1)
    }
    assert {row["training"] for row in rows} == trainings
    words = (folder / "pilot.md").read_text()
    assert words in done.stdout
    assert re.search(r"Gain in Dice [+-]0\.\d{3}, 95 % interval [+-]\S+ to [+-]\S+; 2 cases in 1 fold\.", words)
    assert re.search(r"\*\*(Helps|Hurts|No difference seen): ", words)
    assert re.search(r"- nnUNetTrainer: .* (hours|minutes)\n- CrossMatchTrainer_short: ", words)
    before = (folder / "results.csv").read_bytes()
    again = pilot(planned_2d, folder, "--seeds", "3", "--hours", "0.0003")
    assert again.returncode == 0 and words in again.stdout, "nothing fits: the same report"
    assert (folder / "results.csv").read_bytes() == before
