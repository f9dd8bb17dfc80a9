"""A small planned dataset with a queue: what nnunet-ssl rank leaves, for tests of self-training."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accepting_home import read_json, write_json
from tiny_dataset import TinyDataset, voxels, write_image
from trees import contents

from nnunet_ssl.data.accepting import DatasetFolders
from nnunet_ssl.data.queue import Model, Queue, Row, StructureRow, write_queue, write_rows

LABELED, UNLABELED = ("L0", "L1", "L2", "L3"), ("U0", "U1", "U2")
SPLITS = [{"train": ["L0", "L1", "L2"], "val": ["L3"]}, {"train": ["L1", "L2", "L3"], "val": ["L0"]}]
HIDING = [
    {"train": ["L0"], "val": ["L3"], "unlabeled": ["L1", "L2"]},
    {"train": ["L0", "L1"], "val": ["L3"], "unlabeled": ["L2"]},
]


def image(case: str) -> np.ndarray:
    return voxels(sum(map(ord, case)))


def truth(case: str) -> np.ndarray:
    return (image(case) > 120).astype(np.uint8)


def consensus(case: str) -> np.ndarray:
    return (image(case) > 130).astype(np.uint8)


def disagreement(case: str) -> np.ndarray:
    """The first four slices."""
    found = np.zeros(image(case).shape, np.uint8)
    found[:4] = 1
    return found


class RankedHome(TinyDataset):
    """Four labeled and three unlabeled cases, and a queue in which U0 and U1 are reliable."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.results = self.root / "results" / self.raw.name
        self.queue = self.root / "queue"

    def fill(self, folds: list[dict[str, list[str]]] | None = None) -> RankedHome:
        for case in LABELED:
            write_image(self.raw / "imagesTr" / f"{case}_0000.nii.gz", image(case))
            write_image(self.raw / "labelsTr" / f"{case}.nii.gz", truth(case))
        for case in UNLABELED:
            self.add(case, image(case))
        write_json(self.raw / "dataset.json", self.dataset_json)
        write_json(self.preprocessed / "nnUNetPlans.json", self.plans)
        write_json(self.preprocessed / "splits_final.json", folds or SPLITS)
        self.results.mkdir(parents=True)
        self.rank({"U0": "reliable", "U1": "reliable", "U2": "look at it"})
        return self

    def model(self, fold: int = 0, **entries: Any) -> Model:
        """As the queue names one."""
        lists = read_json(self.preprocessed / "splits_final.json")[fold]
        known = {
            "trainer": "nnUNetTrainer",
            "plans": "nnUNetPlans",
            "configuration": "3d_fullres",
            "fold": fold,
            "checkpoint": "checkpoint_final.pth",
            "sha256": hashlib.sha256(b"weights").hexdigest(),
            "trained_on": tuple(lists["train"]),
            "validated_on": tuple(lists["val"]),
        }
        return Model(**{**known, **entries})

    def rank(
        self, verdicts: dict[str, str], models: Sequence[Model] = (), dice: Mapping[str, float] | None = None
    ) -> None:
        """Write the queue."""
        agreed = dice or {}
        shutil.rmtree(self.queue, ignore_errors=True)
        for case in verdicts:
            write_image(self.queue / "consensus" / f"{case}.nii.gz", consensus(case))
            write_image(self.queue / "disagreement" / f"{case}.nii.gz", disagreement(case))
        description = read_json(self.raw / "dataset.json")
        order = description.get("regions_class_order")
        queue = Queue(
            dataset=self.raw.name,
            configuration="3d_fullres",
            plans="nnUNetPlans",
            file_ending=".nii.gz",
            labels=description["labels"],
            regions_class_order=order and tuple(order),
            cases={case: (f"imagesUn/{case}_0000.nii.gz",) for case in verdicts},
            models=tuple(models or (self.model(), self.model(trainer="CrossMatchTrainer"))),
        )
        write_queue(self.queue, queue)
        structures = {name: StructureRow(0.9, 1.0, 1) for name in queue.structures}
        rows = [
            Row(case, verdict, "as it came out", agreed.get(case, 0.9), 0.1, structures)
            for case, verdict in verdicts.items()
        ]
        write_rows(self.queue, queue, rows)

    @property
    def folders(self) -> DatasetFolders:
        return DatasetFolders(self.raw, self.preprocessed, self.results)

    def made(self, name: str = "Dataset951_Tiny") -> tuple[Path, Path]:
        """Folders of a new dataset in nnUNet_raw and nnUNet_preprocessed."""
        return self.raw.parent / name, self.preprocessed.parent / name

    def everything(self) -> dict[str, Any]:
        """All that nnUNet_raw and nnUNet_preprocessed hold; locks are left in place, empty."""
        return {
            f"{root.name}/{name}": what
            for root in (self.raw.parent, self.preprocessed.parent)
            for name, what in contents(root).items()
            if not name.endswith(".lock")
        }
