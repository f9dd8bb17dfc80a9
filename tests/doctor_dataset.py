"""A dataset that is ready to be trained, for the tests of ``nnunet-ssl doctor``."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_dataset import PLANS

from nnunet_ssl.cli import doctor
from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.testing.tiny import unet

ARCHITECTURE = unet([4, 8, 16], dim=2, n_conv_per_stage=[1, 1, 1])
CASES = [f"case_{index}" for index in range(6)]
SPLITS = [{"train": CASES[:2], "val": CASES[2:4], "unlabeled": CASES[4:]}]


class Dataset:
    """Dataset007_Tiny in nnU-Net's folders, ready to be trained in 2D; tests spoil it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.raw = home / "raw" / "Dataset007_Tiny"
        self.preprocessed = home / "preprocessed" / "Dataset007_Tiny"
        self.labeled = self.preprocessed / "nnUNetPlans_2d"
        for folder in (self.raw / "imagesUn", self.raw / "imagesTr", self.labeled, home / "results"):
            folder.mkdir(parents=True)
        for case in CASES:
            (self.raw / "imagesTr" / f"{case}_0000.nii.gz").touch()
        (self.raw / "imagesUn" / "new_0_0000.nii.gz").touch()
        self.dataset_json = {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "structure": 1},
            "numTraining": len(CASES),
            "file_ending": ".nii.gz",
        }
        self.plans: dict[str, Any] = {
            **PLANS,
            "configurations": {
                "2d": {
                    "data_identifier": "nnUNetPlans_2d",
                    "batch_size": 4,
                    "patch_size": [32, 48],
                    "spacing": [1.0, 1.0],
                    "batch_dice": True,
                    "architecture": ARCHITECTURE,
                },
                "2d_child": {"inherits_from": "2d", "semi_supervised": {"memory_mode": "split"}},
            },
        }
        self.write()
        self.write_splits(SPLITS)
        rng = np.random.default_rng(0)
        for case in CASES:
            self.write_case(case, rng.normal(size=(1, 1, 32, 48)).astype(np.float32))

    def write(self) -> None:
        for folder in (self.raw, self.preprocessed):
            (folder / "dataset.json").write_text(json.dumps(self.dataset_json))
        (self.preprocessed / "nnUNetPlans.json").write_text(json.dumps(self.plans))

    def write_splits(self, splits: list[dict[str, list[str]]]) -> None:
        (self.preprocessed / "splits_final.json").write_text(json.dumps(splits))

    def write_case(self, case: str, image: np.ndarray) -> None:
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

        for file in self.labeled.glob(f"{case}*.b2nd"):
            file.unlink()
        size = image.shape
        nnUNetDatasetBlosc2.save_case(
            image, np.zeros(size, np.int8), {}, str(self.labeled / case), size, size, size, size
        )

    def listing(self) -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in self.home.rglob("*") if path.is_file()
        }


def made(home: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The dataset, in the folders that nnU-Net's variables name from now on."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(home / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    return Dataset(home)


def add_trainer(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A trainer of the user's, in a folder of nnUNet_extTrainer after this package's."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(trainers_folder()), str(folder)]))


def report(*arguments: str) -> list[str]:
    """The lines of the report."""
    parser = ArgumentParser()
    doctor.add_arguments(parser)
    return [str(finding) for finding in doctor.findings(parser.parse_args(arguments))]
