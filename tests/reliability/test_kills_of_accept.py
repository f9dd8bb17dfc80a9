"""SIGKILL at random moments of ``nnunet-ssl accept``: the dataset is as before or as after, and both can be had."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest
from accepting_home import AcceptingHome
from own_process import duration, kill_after

from nnunet_ssl.cli.main import main
from nnunet_ssl.data import journal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")]

KILLS = 30


def run(*arguments: str) -> None:
    assert main(["accept", "-d", "7", *arguments]) == 0


def run_slowly(*arguments: str) -> None:
    """Renames take no time; with pauses between them, kills meet them too."""
    rename = journal.rename

    def renaming(source: Path, target: Path) -> None:
        time.sleep(0.02)
        rename(source, target)

    journal.rename = renaming
    run(*arguments)


def test_accepting_and_taking_back(tmp_path, monkeypatch, capsys) -> None:
    template = AcceptingHome(tmp_path / "template").fill()
    template.correct("U0", "U1", "U3")
    home, log = template.copy(tmp_path / "home"), tmp_path / "log"
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(home.root / name))
    accepting = ("--labels", str(home.corrected), "-np", "0")
    before, unlabeled = home.everything(), home.visible()
    took = {False: duration(run, *accepting, log=log)}
    labeled = home.visible()
    took[True] = duration(run, "--undo", log=log)
    assert home.everything() == before and labeled != unlabeled

    moments, killed, completed = random.Random(0), 0, 0
    while killed < KILLS:
        accepted = home.visible() == labeled
        lists = list(home.preprocessed.glob(".nnunet_ssl_accept/*/accepted.json"))
        assert bool(lists) == accepted
        # Most of the time passes before the first change: half of the kills come when the list of renames is there.
        late = moments.random() < 0.5

        def begun(late=late) -> bool:
            found = home.preprocessed.glob(".nnunet_ssl_accept/*/*ing.json")
            return not late or any(found)

        seconds = moments.uniform(0, 0.7 if late else 1.1 * took[accepted])
        killed += not kill_after(seconds, run_slowly, *(["--undo"] if accepted else accepting), log=log, once=begun)
        capsys.readouterr()
        if main(["accept", "-d", "7"]) == 0:
            completed += "it is completed now" in capsys.readouterr().out
        assert home.visible() in (unlabeled, labeled), "as before or as after"
        if home.visible() == unlabeled:
            assert home.everything() == before
    print(f"{killed} kills, {completed} changes completed by the next run")
    assert completed > 2, "kills came at different moments"
    if home.visible() == labeled:
        run("--undo")
    assert home.everything() == before
