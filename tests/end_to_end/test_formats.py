"""The real commands on kinds of images other than MRI in NIfTI: each dataset is planned, trained on and predicted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from conftest import Planned, nnunet_environment, plan
from numpy.typing import NDArray
from skimage import io

from nnunet_ssl.data.phantoms import PhantomDataset, draw_phantom

CASES = {"labeled": ("a", "b", "c"), "validation": ("d",), "unlabeled": ("u", "v", "w"), "test": ("t",)}
LABELS = {"background": 0, "chamber": 1, "neighbor": 2}


def write_nifti(file: Path, image: NDArray, spacing: Sequence[float]) -> None:
    written = sitk.GetImageFromArray(image)
    written.SetSpacing(tuple(reversed(spacing)))
    sitk.WriteImage(written, str(file))


def write_tiff(file: Path, image: NDArray, spacing: Sequence[float]) -> None:
    tifffile.imwrite(file, image)
    # The reader wants it beside the image, without a channel.
    case = file.stem if file.parent.name.startswith("labels") else file.stem[: -len("_0000")]
    file.with_name(f"{case}.json").write_text(json.dumps({"spacing": list(spacing)}))


def write_png(file: Path, image: NDArray, spacing: Sequence[float]) -> None:
    io.imsave(file, image, check_contrast=False)


def read_nifti(file: Path) -> NDArray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def in_air(image: NDArray) -> NDArray[np.bool_]:
    """Outside an ellipsoid that leaves a margin of a tenth on every side."""
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in image.shape], indexing="ij")
    return sum((axis / 0.8) ** 2 for axis in axes) > 1


@dataclass(frozen=True)
class Format:
    """How images are stored, what they hold, and what nnU-Net must make of that.

    ``files`` turns a phantom's channels into the images of a case, one per file.
    """

    ending: str
    channel_names: tuple[str, ...]
    schemes: tuple[str, ...]
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    files: Callable[[list[NDArray]], list[NDArray]]
    write: Callable[[Path, NDArray, Sequence[float]], None]
    read: Callable[[Path], NDArray]
    reader: str
    masked: tuple[bool, ...] = (False,)
    dummy_2d: bool = False

    @property
    def two_d(self) -> bool:
        return len(self.shape) == 2


FORMATS = {
    "rgb_png": Format(
        ending=".png",
        channel_names=("rgb_to_0_1",) * 3,
        schemes=("RGBTo01Normalization",) * 3,
        shape=(40, 44),
        spacing=(1.0, 1.0),
        patch_size=(24, 24),
        files=lambda channels: [np.stack([np.clip(c / 6, 0, 255) for c in channels], axis=-1).astype(np.uint8)],
        write=write_png,
        read=io.imread,
        reader="NaturalImage2DIO",
        masked=(False,) * 3,
    ),
    "thick_ct": Format(
        ending=".nii.gz",
        channel_names=("CT",),
        schemes=("CTNormalization",),
        shape=(10, 40, 44),
        spacing=(5.0, 0.8, 0.8),
        patch_size=(8, 28, 28),
        files=lambda channels: [np.clip(channels[0] / 2 - 200, -1024, 3071).astype(np.int16)],
        write=write_nifti,
        read=read_nifti,
        reader="SimpleITKIO",
        dummy_2d=True,
    ),
    "masked_mri_and_map": Format(
        ending=".nii.gz",
        channel_names=("MRI", "noNorm"),
        schemes=("ZScoreNormalization", "NoNormalization"),
        shape=(20, 32, 36),
        spacing=(1.0, 1.0, 1.0),
        patch_size=(12, 16, 20),
        files=lambda channels: [np.where(in_air(image), 0, image) for image in channels],
        write=write_nifti,
        read=read_nifti,
        reader="SimpleITKIO",
        masked=(True, False),
    ),
    "tiff": Format(
        ending=".tif",
        channel_names=("rescale_to_0_1",),
        schemes=("RescaleTo01Normalization",),
        shape=(20, 32, 36),
        spacing=(1.5, 1.0, 1.0),
        patch_size=(12, 16, 20),
        files=lambda channels: [np.clip(channels[0] * 8, 0, 65535).astype(np.uint16)],
        write=write_tiff,
        read=tifffile.imread,
        reader="Tiff3DIO",
    ),
}


def write_dataset(raw: Path, kind: Format) -> None:
    for folder in ("imagesTr", "labelsTr", "imagesUn", "imagesTs"):
        (raw / folder).mkdir(parents=True)
    folders = {"labeled": "imagesTr", "validation": "imagesTr", "unlabeled": "imagesUn", "test": "imagesTs"}
    rng = np.random.default_rng(7)
    for role, cases in CASES.items():
        # Sizes differ, as they do where images come from elsewhere.
        shape = tuple(size + (4 if role == "test" else 0) for size in kind.shape)
        for case in cases:
            channels, labels = draw_phantom(rng, shape, kind.spacing, num_channels=len(kind.channel_names))
            images = kind.files(channels)
            for number, image in enumerate(images):
                kind.write(raw / folders[role] / f"{case}_{number:04d}{kind.ending}", image, kind.spacing)
            if folders[role] == "imagesTr":
                labels[labels > 2] = 0
                labels[images[0].reshape(*labels.shape, -1).max(-1) == 0] = 0
                kind.write(raw / "labelsTr" / f"{case}{kind.ending}", labels, kind.spacing)
    # A labeled image among the unlabeled ones shows that both are preprocessed alike.
    for file in (raw / "imagesTr").glob("a[_.]*"):
        (raw / "imagesUn" / file.name.replace("a", "same", 1)).write_bytes(file.read_bytes())
    description = {
        "channel_names": {str(number): name for number, name in enumerate(kind.channel_names)},
        "labels": LABELS,
        "numTraining": len(CASES["labeled"] + CASES["validation"]),
        "file_ending": kind.ending,
        "overwrite_image_reader_writer": kind.reader,
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    split = {"train": CASES["labeled"], "val": CASES["validation"]}
    (raw / "splits_final.json").write_text(json.dumps([split]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trainers"),
    [
        ("rgb_png", ("CrossMatchTrainer_short",)),
        ("thick_ct", ("CrossMatchTrainer_short", "SimCVDTrainer_short")),
        ("masked_mri_and_map", ("CrossMatchTrainer_short",)),
        ("tiff", ("CrossMatchTrainer_short",)),
    ],
    ids=FORMATS,
)
def test_from_planning_to_prediction(name, trainers, tmp_path):
    kind = FORMATS[name]
    raw = tmp_path / "raw" / "Dataset996_Format"
    write_dataset(raw, kind)
    cases = PhantomDataset(raw, **CASES, labels={name: value for name, value in LABELS.items() if value})
    planned = Planned(tmp_path, 996, raw, nnunet_environment(tmp_path), cases)
    plan(planned, two_d=kind.two_d, patch_size=list(kind.patch_size))
    plans = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text())
    configuration = plans["configurations"]["2d" if kind.two_d else "3d_fullres"]
    assert plans["image_reader_writer"] == kind.reader
    assert configuration["normalization_schemes"] == list(kind.schemes)
    assert configuration["use_mask_for_norm"] == list(kind.masked)

    for trainer in trainers:
        output = planned.run("nnUNetv2_train", 996, "tiny", 0, "-tr", trainer, "-device", "cpu").stdout
        assert "4 unlabeled cases, 3 labeled cases" in output
        assert f"do_dummy_2d_data_aug: {kind.dummy_2d}" in output and "Mean Validation Dice" in output
        planned.run(
            "nnUNetv2_predict", "-d", 996, "-i", raw / "imagesTs", "-o", tmp_path / trainer, "-c", "tiny", "-f", 0,
            "-tr", trainer, "-device", "cpu", "-npp", 0, "-nps", 0,
        )  # fmt: skip
        prediction = kind.read(tmp_path / trainer / f"t{kind.ending}")
        assert prediction.shape == tuple(size + 4 for size in kind.shape)
        assert set(np.unique(prediction)) <= set(LABELS.values())

    identifier = configuration["data_identifier"]
    records = [
        json.loads(file.read_text()) for file in planned.preprocessed.glob(f"{identifier}_unlabeled_records/*.json")
    ]
    assert [(record["status"], record["warnings"]) for record in records] == [("ok", [])] * 4
    labeled, unlabeled = (
        blosc2.open(str(planned.preprocessed / file), mode="r")[:]
        for file in (f"{identifier}/a.b2nd", f"{identifier}_unlabeled/same.b2nd")
    )
    assert len(labeled) == len(kind.schemes) and np.array_equal(labeled, unlabeled)
