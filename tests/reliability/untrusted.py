"""A home of nnU-Net with what others may have put into it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.data.preprocessing import preprocess_unlabeled
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.testing.tiny import unet

DATASET = "Dataset007_Tiny"
CASES = [f"case_{number}" for number in range(4)]
_RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
ARCHITECTURE = unet([4, 6], n_conv_per_stage=[1, 1])
PLANS: dict[str, Any] = {
    "dataset_name": DATASET,
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 100.0, "std": 20.0}},
    "configurations": {
        "3d": {
            "data_identifier": "nnUNetPlans_3d",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [8, 8, 8],
            "batch_dice": False,
            "spacing": [1.0, 1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": _RESAMPLING,
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {**_RESAMPLING, "is_seg": True, "order": 1},
            "architecture": ARCHITECTURE,
        },
        "3d_cascade": {"inherits_from": "3d", "previous_stage": "3d"},
    },
}
DATASET_JSON: dict[str, Any] = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "structure": 1},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}


@dataclass
class Home:
    """nnU-Net's folders with a planned dataset, and next to them a folder in which nothing may happen."""

    root: Path

    def __post_init__(self) -> None:
        self.outside = self.root / "outside"
        self.raw = self.root / "raw" / DATASET
        self.preprocessed = self.root / "preprocessed" / DATASET
        self.model = self.root / "results" / DATASET / "CrossMatchTrainer__nnUNetPlans__3d"
        self.labeled = self.preprocessed / "nnUNetPlans_3d"
        self.unlabeled = self.preprocessed / "nnUNetPlans_3d_unlabeled"
        self.records = self.preprocessed / "nnUNetPlans_3d_unlabeled_records"
        for folder in (self.outside, self.raw, self.labeled, self.model / "fold_0"):
            folder.mkdir(parents=True)
        for case in CASES:
            for ending in (".b2nd", "_seg.b2nd", ".pkl"):
                (self.labeled / f"{case}{ending}").touch()
        self.write(self.preprocessed / "splits_final.json", [{"train": CASES[:2], "val": CASES[2:3]}])
        self.write(self.preprocessed / "dataset.json", DATASET_JSON)
        self.write(self.model / "dataset.json", DATASET_JSON)
        self.write_plans(PLANS)
        for name in ("file.txt", "file.json", "file.pkl"):
            (self.outside / name).write_text("untouched")
        self.expect()

    @staticmethod
    def write(file: Path, content: Any) -> None:
        file.write_text(json.dumps(content))

    def write_plans(self, plans: dict[str, Any]) -> None:
        self.write(self.preprocessed / "nnUNetPlans.json", plans)
        self.write(self.model / "plans.json", plans)

    def trainer(self, configuration: str = "3d") -> CrossMatchTrainer:
        plans = {**json.loads((self.preprocessed / "nnUNetPlans.json").read_text()), "continue_training": False}
        return CrossMatchTrainer(plans, configuration, 0, copy.deepcopy(DATASET_JSON), torch.device("cpu"))

    def preprocess(self, plans: dict[str, Any] = PLANS):
        return preprocess_unlabeled(
            raw_dataset_folder=self.raw,
            preprocessed_dataset_folder=self.preprocessed,
            plans_manager=PlansManager(copy.deepcopy(plans)),
            configuration="3d",
            dataset_json=DATASET_JSON,
            num_processes=0,
            log=lambda line: None,
        )

    def expect(self) -> None:
        """What is outside now is to stay as it is."""
        self._before = self._outside()

    def _outside(self) -> dict[str, bytes | None]:
        ours = {self.root / name for name in ("raw", "preprocessed", "results", "given")}
        found = (path for path in self.root.rglob("*") if not ours & {path, *path.parents})
        return {str(path): path.read_bytes() if path.is_file() else None for path in found}

    def assert_nothing_happened_outside(self) -> None:
        assert self._outside() == self._before


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Its folders are those of nnU-Net."""
    made = Home(tmp_path / "home")
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(made.root / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    monkeypatch.setenv("nnUNet_compile", "f")
    # A name without a folder must not do harm where the command is called.
    monkeypatch.chdir(made.outside)
    return made
