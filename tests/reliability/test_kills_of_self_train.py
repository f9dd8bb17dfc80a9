"""SIGKILL at random moments of ``nnunet-ssl self-train``: the new dataset is there as a whole or not at all."""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path

import pytest
from own_process import duration, kill_after
from ranked_home import RankedHome

from nnunet_ssl.cli.main import main
from nnunet_ssl.data import new_dataset

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")]

KILLS = 30
NAME = "Dataset951_Tiny"


def run(queue: str) -> None:
    assert main(["self-train", "-d", "7", "--queue", queue, "--as", NAME, "-np", "0"]) == 0


def run_slowly(queue: str) -> None:
    """Renames take no time; with pauses between them, kills meet them too."""
    rename = new_dataset.rename

    def renaming(source: Path, target: Path) -> None:
        time.sleep(0.2)
        rename(source, target)

    new_dataset.rename = renaming
    run(queue)


def test_making_a_dataset(tmp_path, monkeypatch) -> None:
    home, log = RankedHome(tmp_path / "home").fill(), tmp_path / "log"
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(home.root / name))
    before, queue = home.everything(), str(home.queue)
    took = duration(run, queue, log=log)
    whole = {name: what for name, (what, _) in home.everything().items()}
    made = home.made(NAME)

    def remove() -> None:
        for folder in made:
            shutil.rmtree(folder)
        assert home.everything() == before

    remove()
    moments, killed, begun, halves = random.Random(0), 0, 0, 0
    hidden = [root.parent / new_dataset.FOLDER for root in made]
    while killed < KILLS:
        # Most of the time passes in imports: half of the kills come when there is something to leave behind.
        late = moments.random() < 0.5
        seconds = moments.uniform(0, 0.7 if late else 1.1 * took)
        once = (lambda: any(folder.is_dir() for folder in hidden)) if late else (lambda: True)
        killed += not kill_after(seconds, run_slowly, queue, log=log, once=once)
        begun += any(folder.is_dir() for folder in hidden)
        halves += made[1].is_dir() and not made[0].is_dir()
        assert not made[0].is_dir() or made[1].is_dir()
        if not made[0].is_dir():
            run(queue)
        assert {name: what for name, (what, _) in home.everything().items()} == whole
        remove()
    print(f"{killed} kills, {begun} in the middle of the making, {halves} between the renames")
    assert begun > 2 and halves > 0, "kills came at different moments"
