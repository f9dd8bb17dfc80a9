"""A change of a dataset is made as a whole or not at all, wherever it is cut off."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from trees import contents

from nnunet_ssl.data import journal as module
from nnunet_ssl.data.journal import FOLDER, Journal, last_accepted, new_journal, recover, refuse_unfinished
from nnunet_ssl.errors import UserError

FILES = {
    "raw/imagesUn/a_0000.nii.gz": "image",
    "raw/elsewhere/b.nii.gz": "image b",
    "raw/imagesTr/c_0000.nii.gz": "image c",
    "raw/labelsTr/c.nii.gz": "labels c",
    "raw/dataset.json": "one case",
    "preprocessed/splits.json": "c",
    "preprocessed/unlabeled/a.b2nd": "copy",
    "results/stage/a.b2nd": "segmentation",
}
KILLED = 9
STEPS = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Kills lose nothing that is written; waiting for the disk takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture
def roots(tmp_path) -> dict[str, Path]:
    return make(tmp_path / "dataset")


def make(folder: Path) -> dict[str, Path]:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if sys.platform != "win32":
        (folder / "raw/imagesUn/b_0000.nii.gz").symlink_to("../elsewhere/b.nii.gz")
    return {name: folder / name for name in ("raw", "preprocessed", "results")}


def prepare(roots: dict[str, Path]) -> Journal:
    journal = new_journal(roots, ["a", "b"])
    for root, place in (
        ("raw", "labelsTr/a.nii.gz"),
        ("raw", "dataset.json"),
        ("preprocessed", "splits.json"),
        ("preprocessed", "new_splits.json"),
    ):
        journal.aside(root, place).write_text(f"new {place}")
        journal.put(root, place)
    for name in ("a_0000.nii.gz", "b_0000.nii.gz"):
        if os.path.lexists(roots["raw"] / "imagesUn" / name):
            journal.move("raw", f"imagesUn/{name}", f"imagesTr/{name}")
    journal.take_away("preprocessed", "unlabeled/a.b2nd")
    journal.take_away("results", "stage/a.b2nd")
    return journal


def everything(roots: dict[str, Path]) -> dict[str, object]:
    return contents(roots["raw"].parent)


def visible(roots: dict[str, Path]) -> dict[str, object]:
    return {name: what for name, what in everything(roots).items() if FOLDER not in Path(name).parts}


@pytest.fixture
def after(tmp_path) -> set[str]:
    """Names and contents after the change, without times."""
    roots = make(tmp_path / "undisturbed")
    prepare(roots).commit()
    return without_times(visible(roots))


def without_times(found: dict[str, object]) -> set[str]:
    return {f"{name}: {what[0]}" for name, what in found.items()}  # type: ignore[index]


def test_the_change_is_what_was_prepared(roots, after) -> None:
    journal = prepare(roots)
    assert len(journal.steps) == STEPS
    assert "raw/imagesUn/a_0000.nii.gz" in visible(roots), "nothing changes before"
    journal.commit()
    assert without_times(visible(roots)) == after
    assert (roots["raw"] / "imagesTr/b_0000.nii.gz").read_text() == "image b"
    assert (roots["raw"] / "imagesTr/b_0000.nii.gz").is_symlink()
    assert (roots["preprocessed"] / "splits.json").read_text() == "new splits.json"
    assert not (roots["preprocessed"] / "unlabeled/a.b2nd").exists()


def test_undo_leaves_every_byte_and_time_as_before(roots) -> None:
    before = everything(roots)
    prepare(roots).commit()
    last = last_accepted(roots)
    assert last is not None and last.cases == ["a", "b"] and last.changed_since() == []
    last.undo()
    assert everything(roots) == before
    assert last_accepted(roots) is None


@pytest.mark.parametrize(
    "place", ["raw/labelsTr/a.nii.gz", "raw/dataset.json", "preprocessed/new_splits.json", "raw/imagesTr/a_0000.nii.gz"]
)
def test_what_has_changed_since_is_named(roots, place) -> None:
    prepare(roots).commit()
    file = roots["raw"].parent / place
    file.write_text("corrected again")
    last = last_accepted(roots)
    assert last is not None and last.changed_since() == [str(file)]
    file.unlink()
    assert last.changed_since() == [str(file)]


def test_the_next_change_ends_the_one_before(roots) -> None:
    prepare(roots).commit()
    middle = visible(roots)
    journal = new_journal(roots, ["c"])
    journal.move("raw", "imagesTr/c_0000.nii.gz", "imagesUn/c_0000.nii.gz")
    journal.commit()
    assert [path.name for path in sorted((roots["preprocessed"] / FOLDER).iterdir())] == ["2"]
    last = last_accepted(roots)
    assert last is not None and last.cases == ["c"]
    last.undo()
    assert visible(roots) == middle and last_accepted(roots) is None


# Cut off


def in_a_process_that_is_killed(function: Callable[[], object], *, at: int, done: bool) -> bool:
    """Run it in a fork that ends at once in its rename number ``at``, before or after it; returns whether it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads: it only moves files
        child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED)
        return code == KILLED
    code = 1
    try:
        count, rename = iter(range(10**6)), module.rename

        def renaming(source: Path, target: Path) -> None:
            if next(count) == at:
                if done:
                    rename(source, target)
                os._exit(KILLED)
            rename(source, target)

        module.rename = renaming
        function()
        code = 0
    finally:
        os._exit(code)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
MOMENTS = [(at, done) for at in range(STEPS + 1) for done in (False, True)]


@needs_fork
@pytest.mark.parametrize(("at", "done"), MOMENTS)
def test_a_kill_while_changing_is_completed_by_the_next_run(roots, after, at, done) -> None:
    before = everything(roots)
    journal = prepare(roots)
    assert in_a_process_that_is_killed(journal.commit, at=at, done=done)
    if (at, done) != (STEPS, True):
        with pytest.raises(UserError, match=r"in the middle of a change.*nnunet-ssl accept -d"):
            refuse_unfinished(roots["preprocessed"])
    said: list[str] = []
    recover(roots, said.append)
    refuse_unfinished(roots["preprocessed"])
    assert without_times(visible(roots)) == after
    assert (at, done) == (STEPS, True) or said == [
        "An earlier acceptance of a, b was interrupted; it is completed now."
    ]
    last = last_accepted(roots)
    assert last is not None and last.changed_since() == []
    last.undo()
    assert everything(roots) == before


@needs_fork
@pytest.mark.parametrize(("at", "done"), MOMENTS)
def test_a_kill_while_taking_back_is_completed_by_the_next_run(roots, at, done) -> None:
    before = everything(roots)
    prepare(roots).commit()
    last = last_accepted(roots)
    assert last is not None and in_a_process_that_is_killed(last.undo, at=at, done=done)
    said: list[str] = []
    recover(roots, said.append)
    if (at, done) == (0, False):
        assert said == [] and last.changed_since() == [], "it had not begun"
        last.undo()
    else:
        assert said == ["--undo of a, b was interrupted; it is completed now."]
    assert everything(roots) == before


@needs_fork
def test_kills_of_those_who_complete(roots, after) -> None:
    """One after the other, each one rename later."""
    assert in_a_process_that_is_killed(prepare(roots).commit, at=0, done=False)
    kills = 0
    while in_a_process_that_is_killed(lambda: recover(roots, lambda line: None), at=0, done=True):
        kills += 1
    assert kills == STEPS + 1
    assert without_times(visible(roots)) == after


def test_what_a_killed_run_had_prepared_is_removed(roots) -> None:
    before = everything(roots)
    prepare(roots)
    refuse_unfinished(roots["preprocessed"])
    said: list[str] = []
    recover(roots, said.append)
    assert everything(roots) == before and len(said) == 1 and "removed" in said[0]


def test_an_acceptance_stays_while_a_later_one_is_prepared_and_given_up(roots) -> None:
    prepare(roots).commit()
    new_journal(roots, ["c"]).aside("raw", "labelsTr/x").write_text("x")
    recover(roots, lambda line: None)
    last = last_accepted(roots)
    assert last is not None and last.cases == ["a", "b"]


@pytest.mark.parametrize("at", range(STEPS + 1))
def test_a_rename_that_fails_takes_everything_back(roots, monkeypatch, at) -> None:
    before = everything(roots)
    journal, rename, count = prepare(roots), module.rename, iter(range(10**6))

    def failing(source: Path, target: Path) -> None:
        if next(count) == at:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        rename(source, target)

    monkeypatch.setattr(module, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        journal.commit()
    assert everything(roots) == before


def test_a_file_that_somebody_put_there_meanwhile_is_not_replaced(roots) -> None:
    journal = prepare(roots)
    (roots["raw"] / "labelsTr/a.nii.gz").write_text("somebody else's")
    before = visible(roots)
    with pytest.raises(FileExistsError):
        journal.commit()
    assert visible(roots) == before and not (roots["raw"] / FOLDER).exists()


# Lists from elsewhere


ELSEWHERE = ("../outside", "/outside", "a/../../outside", "", "..", "a\0", 7)


@pytest.mark.parametrize("path", ELSEWHERE)
@pytest.mark.parametrize("entry", ["source", "target", "before"])
def test_a_list_that_leads_elsewhere_is_refused(roots, path, entry) -> None:
    refuses_entry(roots, entry, path)


@pytest.mark.parametrize("entry", ["source", "target"])
def test_a_list_without_a_path_is_refused(roots, entry) -> None:
    """Only ``before`` may be None: nothing was there."""
    refuses_entry(roots, entry, None)


def refuses_entry(roots, entry, path) -> None:
    step = {"root": "raw", "source": "dataset.json", "target": "moved.json", "before": None, "size": 1, "mtime_ns": 1}
    file = roots["preprocessed"] / FOLDER / "1" / "accepting.json"
    file.parent.mkdir(parents=True)
    (roots["raw"].parent / "outside").write_text("untouched")
    file.write_text(json.dumps({"format_version": 1, "cases": ["a"], "steps": [step, {**step, entry: path}]}))
    before = everything(roots)
    with pytest.raises(UserError, match="names files outside of the dataset, or is damaged"):
        recover(roots)
    assert everything(roots) == before


@pytest.mark.parametrize(
    "content", [[], {}, {"cases": [], "steps": [{}]}, {"cases": [], "steps": [7], "format_version": 1}, "no JSON"]
)
def test_a_broken_list_is_named(roots, content) -> None:
    file = roots["preprocessed"] / FOLDER / "1" / "undoing.json"
    file.parent.mkdir(parents=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=r"undoing\.json"):
        recover(roots)


def test_a_linked_folder_is_refused(roots, tmp_path) -> None:
    (tmp_path / "elsewhere" / "1").mkdir(parents=True)
    try:
        (roots["raw"] / FOLDER).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    with pytest.raises(UserError, match="is a link"):
        recover(roots)
    assert (tmp_path / "elsewhere" / "1").is_dir()
