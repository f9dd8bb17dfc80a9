"""The queue's folder: what is foreign is refused, what is done is not done again, also among ten thousand cases."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_ssl.data.queue import Model, Queue, StructureRow, case_files, read_queue, read_rows
from nnunet_ssl.errors import UserError
from nnunet_ssl.ranking.folder import (
    Done,
    agree,
    append_done,
    open_folder,
    read_done,
    read_ranges,
    stamps,
    write_ranges,
)
from nnunet_ssl.ranking.run import Ranking, Thresholds
from nnunet_ssl.ranking.scores import LabeledRange, Scores

MODEL = Model("nnUNetTrainer", "nnUNetPlans", "2d", 0, "checkpoint_final.pth", "a" * 64, ("t",), ("v",))
DICE = {"a": 0.95, "b": 0.5, "c": 0.8}


def queue_of(cases) -> Queue:
    return Queue(
        "Dataset001_A", "2d", "nnUNetPlans", ".nii.gz", {"background": 0, "organ": 1}, None,
        {case: (f"imagesUn/{case}_0000.nii.gz",) for case in cases}, (MODEL, replace(MODEL, fold=1, sha256="b" * 64)),
    )  # fmt: skip


def make_case(folder: Path, raw: Path, case: str, dice: float) -> None:
    image = raw / "imagesUn" / f"{case}_0000.nii.gz"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.touch()
    files = case_files(folder, case, ".nii.gz")
    for file in (files.consensus, files.disagreement, files.uncertainty, files.picture):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = stamps([image])
    assert found is not None
    append_done(folder, case, Done(Scores(0.25, {"organ": StructureRow(dice, 1.5, 2)}), found))


def ranking(folder: Path, raw: Path, queue: Queue) -> Ranking:
    return Ranking(folder, raw, queue, read_done(folder, queue), {}, Thresholds(0.9, 0.7))


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path, Queue]:
    folder, raw, queue = tmp_path / "queue", tmp_path / "raw", queue_of([*DICE, "d"])
    with open_folder(folder):
        agree(folder, queue)
        for case, dice in DICE.items():
            make_case(folder, raw, case, dice)
    (raw / "imagesUn" / "d_0000.nii.gz").touch()
    return folder, raw, queue


def test_what_is_done_is_read_again_and_the_rest_is_to_do(made) -> None:
    folder, raw, queue = made
    again = ranking(folder, raw, queue)
    assert again.done["a"].scores == Scores(0.25, {"organ": StructureRow(0.95, 1.5, 2)})
    assert again.to_do() == ["d"]


def test_the_case_to_label_first_is_on_top(made) -> None:
    folder, raw, queue = made
    ranking(folder, raw, queue).publish()
    rows = read_rows(folder, queue)
    assert [(row.case, row.verdict) for row in rows] == [
        ("b", "label this first"), ("c", "look at it"), ("a", "reliable")]  # fmt: skip


def test_a_line_that_was_cut_off_does_not_count_and_the_next_is_whole(made) -> None:
    folder, raw, queue = made
    file = folder / "work" / "done.jsonl"
    content = file.read_bytes()
    assert content.count(b"\n") == 3
    file.write_bytes(content[:-20])
    assert ranking(folder, raw, queue).to_do() == ["c", "d"]
    make_case(folder, raw, "d", 1.0)
    assert ranking(folder, raw, queue).to_do() == ["c"]


def test_a_changed_image_and_a_removed_result_are_done_again(made) -> None:
    folder, raw, queue = made
    os.utime(raw / "imagesUn" / "a_0000.nii.gz", (1, 1))
    case_files(folder, "b", ".nii.gz").uncertainty.unlink()
    assert ranking(folder, raw, queue).to_do() == ["a", "b", "d"]


def test_a_case_that_is_gone_leaves_the_queue(made) -> None:
    folder, raw, _ = made
    fewer = agree(folder, queue_of(["a", "d"]))
    assert list(read_queue(folder).cases) == ["a", "d"]
    again = ranking(folder, raw, fewer)
    again.publish()
    assert [row.case for row in read_rows(folder, fewer)] == ["a"]


def test_what_models_were_trained_on_stays_as_it_was_noted(made) -> None:
    folder, _, queue = made
    later = replace(queue, models=tuple(replace(model, trained_on=("t", "new")) for model in queue.models))
    assert agree(folder, later).models[0].trained_on == ("t",)
    assert read_queue(folder).models[0].trained_on == ("t",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": (MODEL,)}, "also with nnUNetTrainer fold 1"),
        ({"models": (MODEL, replace(MODEL, fold=1), replace(MODEL, fold=2))}, "without nnUNetTrainer fold 2"),
        ({"models": (MODEL, replace(MODEL, fold=1))}, "earlier training of nnUNetTrainer fold 1"),
        ({"models": (replace(MODEL, checkpoint="checkpoint_best.pth"),)}, "checkpoint_best"),
        ({"labels": {"background": 0, "organ": 1, "tumor": 2}}, "labels"),
        ({"mirroring": False}, "mirroring True there, False now"),
        ({"dataset": "Dataset002_B"}, "Dataset001_A there, Dataset002_B now"),
    ],
)
def test_a_queue_that_was_made_otherwise_is_refused(made, change, said) -> None:
    folder, _, queue = made
    before = (folder / "queue.json").read_bytes()
    with pytest.raises(UserError, match="was made otherwise") as error:
        agree(folder, replace(queue, **change))
    assert said in str(error.value)
    assert (folder / "queue.json").read_bytes() == before


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds something else already: notes\.txt"), open_folder(tmp_path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is a file"), open_folder(tmp_path / "notes.txt"):
        pass


@pytest.mark.parametrize("name", ["file/queue", "x" * 300])
def test_a_place_where_no_folder_can_be_is_named(tmp_path, name) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be used: .* another place with -o"), open_folder(tmp_path / name):
        pass


def test_a_file_in_the_place_of_a_folder_is_named(made) -> None:
    folder, _, queue = made
    (folder / "pictures").rename(folder / "elsewhere")
    (folder / "pictures").touch()
    with pytest.raises(UserError, match="pictures cannot be listed"):
        read_done(folder, queue)


def test_a_queue_in_which_nothing_is_done_may_change(tmp_path) -> None:
    agree(tmp_path, queue_of(["a"]))
    write_ranges(tmp_path, {"organ": LabeledRange(1.0, 2.0)})
    other = replace(queue_of(["a"]), models=(replace(MODEL, sha256="c" * 64, trained_on=("u",)),))
    assert agree(tmp_path, other) == read_queue(tmp_path) == other
    assert read_ranges(tmp_path) is None  # of the cases of other models


def test_two_runs_do_not_share_a_folder(tmp_path) -> None:
    code = (
        "import sys; from pathlib import Path\nfrom nnunet_ssl.ranking.folder import open_folder\n"
        "from nnunet_ssl.errors import UserError\n"
        "try:\n    with open_folder(Path(sys.argv[1])): pass\nexcept UserError as error: print(error)"
    )
    with open_folder(tmp_path / "queue"):
        said = subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "queue")], text=True)
    assert "Another nnunet-ssl rank is working" in said


def test_ranges_are_kept(tmp_path) -> None:
    assert read_ranges(tmp_path) is None
    write_ranges(tmp_path, {"organ": LabeledRange(1.0, 2.5)})
    assert read_ranges(tmp_path) == {"organ": LabeledRange(1.0, 2.5)}


def test_ten_thousand_cases_go_on_in_seconds(tmp_path) -> None:
    names = [f"case_{number:05d}" for number in range(10_000)]
    folder, raw, queue = tmp_path / "queue", tmp_path / "raw", queue_of(names)
    with open_folder(folder):
        agree(folder, queue)
        for number, case in enumerate(names[:-1]):
            make_case(folder, raw, case, number / len(names))
        begin = time.perf_counter()
        queue = agree(folder, queue)
        again = ranking(folder, raw, queue)
        assert again.to_do() == names[-1:]
        assert len(again.publish()) == 9_999
        seconds = time.perf_counter() - begin
    print(f"\nresuming 10,000 cases: {seconds:.2f} s")
    assert seconds < 10
