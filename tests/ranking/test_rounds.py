"""Models of a self-trained dataset rank the cases of its source again."""

from __future__ import annotations

from pathlib import Path

import pytest
from accepting_home import read_json, write_json
from ranked_home import HIDING, RankedHome

from nnunet_ssl.cli.main import main
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.errors import UserError
from nnunet_ssl.ranking.rounds import source_folds, students

NAME = "Dataset951_Tiny"


@pytest.fixture
def home(tmp_path, monkeypatch) -> RankedHome:
    """A second fold, which validates none, so that the new dataset's fold 0 is the source's fold 1."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / "home" / name))
    home = RankedHome(tmp_path / "home").fill([{"train": ["L0", "L1"], "val": []}, HIDING[0]])
    home.rank({"U0": "reliable", "L1": "reliable"}, [home.model(1)])
    assert main(["self-train", "-d", "7", "--queue", str(home.queue), "--as", NAME, "-np", "0"]) == 0
    return home


def roots(home: RankedHome) -> tuple[Path, Path]:
    return home.raw.parent, home.preprocessed.parent


def test_students_know_what_they_and_their_teachers_have_seen(home) -> None:
    (fold,) = read_splits(home.made()[1] / "splits_final.json")
    assert fold["train"] == ["L0", "L1", "U0"]
    (student,) = students([home.model(1, trained_on=tuple(fold["train"]))], NAME, home.raw.name, *roots(home))
    assert student.dataset == NAME and student.trained_on == ("L0",)
    with pytest.raises(UserError, match=r"was trained on a dataset of which no self_training\.json says"):
        students([student], "Dataset950_Other", home.raw.name, *roots(home))


def test_the_folds_of_the_source(home) -> None:
    splits = read_splits(home.preprocessed / "splits_final.json")
    assert source_folds([0, "all"], NAME, splits, *roots(home)) == [splits[1]]
    with pytest.raises(UserError, match=r"was made from fold 1 of a splits_final\.json that had more folds"):
        source_folds([0], NAME, splits[:1], *roots(home))


def test_a_record_of_another_version(home) -> None:
    file = home.made()[0] / "self_training.json"
    write_json(file, {**read_json(file), "version": 2})
    with pytest.raises(UserError, match="was written by another version"):
        students([home.model(1)], NAME, home.raw.name, *roots(home))
