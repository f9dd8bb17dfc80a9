"""``nnunet-ssl accept`` as a user calls it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from accepting_home import AcceptingHome, segmentation
from tiny_dataset import write_image

from nnunet_ssl.cli.main import main
from nnunet_ssl.data import journal
from nnunet_ssl.data.splits import lock_file
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import lock


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> AcceptingHome:
    return AcceptingHome(tmp_path_factory.mktemp("accept_command")).fill()


@pytest.fixture
def home(template, tmp_path, monkeypatch) -> AcceptingHome:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / "home" / name))
    return template.copy(tmp_path / "home")


def accept(home: AcceptingHome, *arguments: object) -> int:
    return main(["accept", "-d", "7", *map(str, arguments)])


def test_of_a_queue_only_named_cases_of_the_consensus_are_taken(home, capsys, monkeypatch) -> None:
    home.correct("U0", "U2")
    queue = home.root / "queue"
    queue.mkdir()
    (queue / "queue.json").write_text("{}")
    home.corrected.rename(queue / "consensus")
    (queue / "disagreement").mkdir()
    (queue / "consensus" / "U2.nii.gz").rename(queue / "disagreement" / "U2.nii.gz")
    before = home.everything()
    assert accept(home, "--labels", queue / "disagreement", "U2") == 2
    assert "disagreement was made by nnunet-ssl rank and holds no segmentations" in capsys.readouterr().err
    monkeypatch.chdir(queue / "consensus")
    assert accept(home, "--labels", ".") == 2
    assert "also holds what nobody has corrected. Name the cases" in capsys.readouterr().err
    assert home.everything() == before
    assert accept(home, "--labels", ".", "U0", "-np", 0) == 0


def test_what_changed_is_printed_and_taken_back(home, capsys) -> None:
    before = home.everything()
    home.correct("U0", "U2")
    assert accept(home, "--labels", home.corrected, "-np", 0) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "Preprocessing 2 case(s) for 3d_fullres",
        "Accepted 2 case(s) into Dataset007_Tiny: U0, U2",
        "imagesUn -> imagesTr 2 file(s) moved",
        "labelsTr, gt_segmentations labels of 2 case(s) written",
        "nnUNetPlans_3d_fullres 2 case(s) preprocessed",
        "nnUNetPlans_3d_fullres_unlabeled 6 file(s) removed",
        "nnUNetPlans_3d_fullres_unlabeled_records 2 file(s) removed",
        "numTraining in dataset.json 3 -> 5",
        "fold 0 of splits_final.json train 2 -> 4",
        "fold 1 of splits_final.json unlabeled 1 -> 3",
        "fold 2 of splits_final.json train 1 -> 3",
        "To reverse this: nnunet-ssl accept -d 7 --undo",
    ]
    assert accept(home, "--undo") == 0
    assert "Reversed: U0, U2." in capsys.readouterr().out
    assert home.everything() == before
    assert accept(home, "--undo") == 2
    assert "no acceptance in Dataset007_Tiny to reverse" in capsys.readouterr().err


def test_undo_loses_no_later_change(home, capsys) -> None:
    home.correct("U0")
    assert accept(home, "--labels", home.corrected, "-np", 0) == 0
    write_image(home.raw / "labelsTr" / "U0.nii.gz", segmentation(1))
    after = home.everything()
    assert accept(home, "--undo") == 2
    error = capsys.readouterr().err
    assert f"1 file(s) of the last acceptance (U0) have changed since: {home.raw / 'labelsTr'}" in error
    assert home.everything() == after


class Killed(BaseException):
    """Nothing in the command handles it, as nothing handles a kill."""


@pytest.mark.parametrize(("at", "undo"), [(0, False), (5, False), (13, False), (1, True), (9, True)])
def test_the_next_run_completes_what_was_cut_off(home, monkeypatch, capsys, at, undo) -> None:
    home.correct("U0")
    before = home.everything()
    if undo:
        accept(home, "--labels", home.corrected, "-np", 0)
    rename, count = journal.rename, iter(range(10**6))

    def renaming(source: Path, target: Path) -> None:
        if next(count) == at:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(journal, "rename", renaming)
    with pytest.raises(Killed):
        accept(home, *(["--undo"] if undo else ["--labels", home.corrected, "-np", 0]))
    monkeypatch.setattr(journal, "rename", rename)
    begun = home.everything()
    capsys.readouterr()
    with pytest.raises(UserError, match=r"in the middle of a change.*accept -d Dataset007_Tiny completes the change"):
        home.run()
    assert main(["preprocess", "-d", "7"]) == 2 and home.everything() == begun
    assert accept(home) == 0
    said = "--undo of U0 was interrupted" if undo else "An earlier acceptance of U0 was interrupted"
    assert capsys.readouterr().out == f"{said}; it is completed now.\n"
    assert home.run().failed == []
    if not undo:
        assert (home.raw / "imagesTr" / "U0_0000.nii.gz").is_file() and accept(home, "--undo") == 0
    assert home.everything() == before


def test_trainings_that_seem_to_run_are_named(home, capsys) -> None:
    def write(name: str, minutes: float) -> None:
        file = home.results / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        then = time.time() - 60 * minutes
        os.utime(file, (then, then))

    write("A__nnUNetPlans__3d/fold_0/checkpoint_latest.pth", 1)
    write("A__nnUNetPlans__3d/fold_1/checkpoint_latest.pth", 30)
    write("A__nnUNetPlans__3d/fold_2/training_log_2026_1_1.txt", 2)
    write("A__nnUNetPlans__3d/fold_3/training_log_2026_1_1.txt", 2)
    write("A__nnUNetPlans__3d/fold_3/checkpoint_final.pth", 2)
    home.correct("U0")
    assert accept(home, "--labels", home.corrected, "-np", 0) == 0
    output = capsys.readouterr().out
    assert "Warning: A__nnUNetPlans__3d/fold_0, A__nnUNetPlans__3d/fold_2 changed in the last 10 minutes" in output


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_two_commands_do_not_disturb_each_other(home, capsys) -> None:
    home.correct("U0")
    before = home.everything()
    reading, writing = os.pipe()
    other = os.fork()
    if not other:
        try:
            with lock(lock_file(home.preprocessed)):
                os.write(writing, b"held")
                time.sleep(60)
        finally:
            os._exit(0)
    assert os.read(reading, 4) == b"held"
    assert accept(home, "--labels", home.corrected, "-np", 0) == 2
    assert "Another command is changing Dataset007_Tiny right now" in capsys.readouterr().err
    assert home.everything() == before
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert accept(home, "--labels", home.corrected, "-np", 0) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No acceptance was interrupted. Name the folder"),
        (["U0"], "Name the folder with the corrected segmentations"),
        (["--undo", "--labels", "somewhere"], "give only -d with it"),
        (["--labels", "nowhere"], "which is not a folder"),
        (["--labels", ".", "-np", "-1"], "-np is -1"),
        (["-d", "8"], "8"),
    ],
)
def test_mistakes_are_explained(home, capsys, arguments, message) -> None:
    before = home.everything()
    assert accept(home, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnunet-ssl accept: error: ") and message in error
    assert home.everything() == before


def test_a_dataset_that_is_not_planned_is_explained(home, capsys) -> None:
    home.preprocessed.rename(home.root / "away")
    assert accept(home, "--labels", home.corrected) == 2
    assert "nnUNetv2_plan_and_preprocess -d 7" in capsys.readouterr().err
