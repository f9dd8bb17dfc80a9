"""A small preprocessed dataset with unlabeled cases and corrected segmentations of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from tiny_dataset import TinyDataset, voxels, write_image
from trees import contents

from nnunet_ssl.data.accepting import DatasetFolders
from nnunet_ssl.data.corrections import LabelValues
from nnunet_ssl.data.journal import FOLDER

SPLITS = [
    {"train": ["L0", "L1"], "val": ["L2"]},
    {"train": ["L0"], "val": ["L2"], "unlabeled": ["L1"]},
    {"train": ["L1"], "val": ["L0"], "unlabeled": []},
]
VALUES = LabelValues({"blob": 1}, {0, 1}, None)
UNLABELED = ("U0", "U1", "U2", "U3")


def segmentation(number: int) -> np.ndarray:
    """Of the unlabeled case of this number."""
    return (voxels(10 + number) > 120).astype(np.uint8)


class AcceptingHome(TinyDataset):
    """Three labeled and four unlabeled cases, all preprocessed, and an empty folder for corrections."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.results = self.root / "results" / self.raw.name
        self.corrected = self.root / "corrected"

    def fill(self) -> AcceptingHome:
        """Write everything, as nnU-Net's planning and this package's preprocessing leave it."""
        for number in range(3):
            self.add_labeled(f"L{number}", voxels(number))
        for number, case in enumerate(UNLABELED):
            self.add(case, voxels(10 + number))
        write_json(self.preprocessed / "nnUNetPlans.json", self.plans)
        write_json(self.raw / "dataset.json", self.dataset_json)
        write_json(self.preprocessed / "splits_final.json", SPLITS)
        references = self.preprocessed / "gt_segmentations"
        references.mkdir()
        for file in (self.raw / "labelsTr").iterdir():
            shutil.copy2(file, references / file.name)
        assert self.run().failed == []
        (self.preprocessed / ".splits_final.json.lock").touch()
        self.results.mkdir(parents=True)
        self.corrected.mkdir()
        return self

    def copy(self, root: Path) -> AcceptingHome:
        """The same in another place, with all times."""
        shutil.copytree(self.root, root, symlinks=True, dirs_exist_ok=True)
        made = object.__new__(AcceptingHome)
        made.__dict__ |= self.__dict__
        made.root = root
        for name in ("raw", "preprocessed", "images", "labeled", "folder", "records", "results", "corrected"):
            setattr(made, name, root / getattr(self, name).relative_to(self.root))
        return made

    @property
    def folders(self) -> DatasetFolders:
        return DatasetFolders(self.raw, self.preprocessed, self.results)

    def correct(self, *cases: str) -> Path:
        """Write corrected segmentations of cases; returns their folder."""
        for case in cases:
            write_image(self.corrected / f"{case}.nii.gz", segmentation(int(case[1:])))
        return self.corrected

    def everything(self) -> dict[str, Any]:
        """All that the dataset's folders hold, hidden files too."""
        return {
            f"{folder.parent.name}/{name}": what
            for folder in (self.raw, self.preprocessed, self.results)
            for name, what in contents(folder).items()
        }

    def visible(self) -> dict[str, Any]:
        """Without what an acceptance keeps aside, and without times; of preprocessed images, the name alone."""
        return {
            name: None if name.endswith(".b2nd") else what
            for name, (what, _) in self.everything().items()
            if FOLDER not in Path(name).parts
        }


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def read_labels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
