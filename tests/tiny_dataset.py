"""A tiny dataset on disk with hand-written plans, for tests of what happens to unlabeled images."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.preprocessing import PreprocessingReport, preprocess_unlabeled

_RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
PLANS: dict[str, Any] = {
    "dataset_name": "Dataset007_Tiny",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {
        "0": {"percentile_00_5": 50.0, "percentile_99_5": 150.0, "mean": 100.0, "std": 20.0, "min": 0.0, "max": 200.0}
    },
    "configurations": {
        "3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [16, 16, 16],
            "spacing": [1.0, 1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": _RESAMPLING,
            "resampling_fn_seg_kwargs": {**_RESAMPLING, "is_seg": True, "order": 1},
            "architecture": {},
        },
        "3d_small": {"inherits_from": "3d_fullres", "patch_size": [8, 8, 8], "batch_size": 4},
    },
}


def voxels(seed: int, shape: tuple[int, ...] = (20, 24, 24)) -> np.ndarray:
    """Random intensities around 100, without zeros."""
    return np.random.default_rng(seed).uniform(50, 150, shape).astype(np.float32)


def write_image(file: Path, image: np.ndarray, spacing: float | tuple[float, ...] = 1.25) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    written = sitk.GetImageFromArray(image)
    written.SetSpacing([spacing] * image.ndim if isinstance(spacing, float) else spacing)
    sitk.WriteImage(written, str(file))


@dataclass
class TinyDataset:
    """Raw and preprocessed folder of one dataset of 3D images with `channels` channels."""

    root: Path
    channels: int = 1

    def __post_init__(self) -> None:
        self.raw = self.root / "raw" / "Dataset007_Tiny"
        self.preprocessed = self.root / "preprocessed" / "Dataset007_Tiny"
        self.images = self.raw / "imagesUn"
        self.labeled = self.preprocessed / "nnUNetPlans_3d_fullres"
        self.folder = self.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"
        self.records = self.preprocessed / "nnUNetPlans_3d_fullres_unlabeled_records"
        self.plans = copy.deepcopy(PLANS)
        self.dataset_json = {
            "channel_names": {str(channel): f"channel {channel}" for channel in range(self.channels)},
            "labels": {"background": 0, "blob": 1},
            "numTraining": 2,
            "file_ending": ".nii.gz",
        }
        configuration = self.plans["configurations"]["3d_fullres"]
        properties = self.plans["foreground_intensity_properties_per_channel"]
        for channel in range(self.channels):
            properties[str(channel)] = properties["0"]
        configuration["normalization_schemes"] *= self.channels
        configuration["use_mask_for_norm"] *= self.channels
        self.images.mkdir(parents=True)
        self.preprocessed.mkdir(parents=True)
        fingerprint = {"shapes_after_crop": [[20, 24, 24], [18, 24, 24]], "spacings": [[1.25] * 3, [1.0, 1.25, 1.25]]}
        (self.preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        (self.preprocessed / "dataset.json").write_text(json.dumps(self.dataset_json))

    def add(self, identifier: str, image: np.ndarray, **options: Any) -> None:
        """A one-channel case of imagesUn."""
        write_image(self.images / f"{identifier}_0000.nii.gz", image, **options)

    def add_labeled(self, identifier: str, image: np.ndarray) -> None:
        """A one-channel case of imagesTr, preprocessed by nnU-Net itself."""
        image_file = self.raw / "imagesTr" / f"{identifier}_0000.nii.gz"
        label_file = self.raw / "labelsTr" / f"{identifier}.nii.gz"
        write_image(image_file, image)
        write_image(label_file, (image > 120).astype(np.uint8))
        self.labeled.mkdir(exist_ok=True)
        manager = PlansManager(self.plans)
        DefaultPreprocessor(verbose=False).run_case_save(
            str(self.labeled / identifier),
            [str(image_file)],
            str(label_file),
            manager,
            manager.get_configuration("3d_fullres"),
            self.dataset_json,
        )

    def run(self, configuration: str = "3d_fullres", num_processes: int = 0, **options: Any) -> PreprocessingReport:
        """Preprocess, in this process unless told otherwise."""
        arguments: dict[str, Any] = {
            "raw_dataset_folder": self.raw,
            "preprocessed_dataset_folder": self.preprocessed,
            "plans_manager": PlansManager(copy.deepcopy(self.plans)),
            "configuration": configuration,
            "dataset_json": self.dataset_json,
            "num_processes": num_processes,
            "log": lambda line: None,
        }
        return preprocess_unlabeled(**{**arguments, **options})

    def temporary(self) -> list[Path]:
        """Folders of cases in the making."""
        return sorted(self.preprocessed.glob("nnUNetPlans_3d_fullres_unlabeled_tmp*"))

    def stamps(self) -> dict[str, int]:
        """When each preprocessed file and each record was written."""
        return {
            file.name: file.stat().st_mtime_ns for folder in (self.folder, self.records) for file in folder.iterdir()
        }


def read_preprocessed(folder: Path, identifier: str) -> np.ndarray:
    return blosc2.open(str(folder / f"{identifier}.b2nd"), mode="r")[:]
