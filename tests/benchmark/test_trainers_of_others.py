"""The scripts of benchmarks/ know the trainers in the user's own folders too."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from nnunet_ssl.trainer_lookup import name_trainers_folder, trainers_folder

THEIRS = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class TheirTrainer(nnUNetTrainer):
    pass
"""


def test_benchmarks_keep_the_users_folders_of_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "TheirTrainer.py").write_text(THEIRS)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    common = importlib.import_module("common")
    for name in ("TheirTrainer", "BCPTrainer"):
        assert common.trainer_class(name).__name__ == name


@pytest.mark.parametrize("before", [None, "", "theirs", "theirs{sep}{ours}"])
def test_the_folder_is_named_once_and_last(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = str(trainers_folder())
    if before is None:
        monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    else:
        monkeypatch.setenv("nnUNet_extTrainer", before.format(sep=os.pathsep, ours=ours))
    name_trainers_folder()
    expected = ["theirs", ours] if before else [ours]
    assert os.environ.pop("nnUNet_extTrainer").split(os.pathsep) == expected
