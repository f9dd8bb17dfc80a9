"""A ranking that is killed again and again ends as one that nobody has disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.data.queue import read_queue, read_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")]


@pytest.fixture(scope="module")
def home(planned_3d, tmp_path_factory):
    """Two models, trained for a few steps by nnU-Net's own command, and ten unlabeled cases more."""
    for trainer in ("nnUNetTrainer_short", "CrossMatchTrainer_short"):
        if not (planned_3d.results(trainer) / "checkpoint_final.pth").is_file():
            planned_3d.run("nnUNetv2_train", planned_3d.dataset_id, "tiny", 0, "-tr", trainer, "-device", "cpu")
    root = tmp_path_factory.mktemp("killed")
    raw = root / "raw" / planned_3d.raw.name
    raw.mkdir(parents=True)
    for entry in planned_3d.raw.iterdir():
        if entry.name != "imagesUn":
            (raw / entry.name).symlink_to(entry)
    (raw / "imagesUn").mkdir()
    for number in range(12):
        source = planned_3d.raw / "imagesUn" / f"unlabeled_{number % 4:03d}_0000.nii.gz"
        image = sitk.ReadImage(str(source))
        sitk.WriteImage(image + number, str(raw / "imagesUn" / f"case_{number:02d}_0000.nii.gz"))
    return {**planned_3d.environment, "nnUNet_raw": str(root / "raw")}


def command(queue: Path) -> list[str]:
    trainers = ("nnUNetTrainer_short", "CrossMatchTrainer_short")
    start = "import sys; from nnunet_ssl.cli.main import main; sys.exit(main())"
    options = ["-d", "998", "-c", "tiny", "-tr", *trainers, "-f", "0", "-device", "cpu", "-o", str(queue)]
    return [sys.executable, "-c", start, "rank", *options]


def done(queue: Path) -> int:
    file = queue / "work" / "done.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def test_kills_lose_no_more_than_the_case_in_work(home, tmp_path) -> None:
    environment = home
    calm = tmp_path / "calm"
    said = subprocess.run(command(calm), env=environment, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stdout + said.stderr
    print(said.stdout)

    killed = tmp_path / "killed"
    rng, before, kills = np.random.default_rng(0), 0, 0
    while before < 11 and kills < 8:
        run = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begin = time.monotonic()
        while done(killed) < before + 1 and run.poll() is None and time.monotonic() < begin + 120:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.6)))
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
        assert done(killed) > before  # what was done before is not done again
        before = done(killed)
    assert kills >= 4
    said = subprocess.run(command(killed), env=environment, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stdout + said.stderr

    queue = read_queue(calm)
    assert len(queue.cases) == 12
    assert read_queue(killed) == queue
    assert repr(read_rows(killed, queue)) == repr(read_rows(calm, queue))
    lines = [json.loads(line)["case"] for line in (killed / "work" / "done.jsonl").read_bytes().splitlines()]
    assert sorted(lines) == sorted(queue.cases)  # each one was noted once
    for name in ("consensus", "disagreement", "uncertainty"):
        for file in sorted((calm / name).iterdir()):
            arrays = [sitk.GetArrayFromImage(sitk.ReadImage(str(one / name / file.name))) for one in (calm, killed)]
            assert np.array_equal(*arrays), file
        assert {one.name for one in (calm / name).iterdir()} == {one.name for one in (killed / name).iterdir()}
