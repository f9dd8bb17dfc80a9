"""Small downloads of the public datasets, as their authors distribute them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk
from skimage import io

SHAPE = (5, 7, 9)  # (Z, Y, X), no two axes alike


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.int16)


def blob(seed: int = 0, value: int = 1, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A box at one corner, so that no flip leaves it as it is."""
    label = np.zeros(shape, np.uint8)
    label[0:2, 1:3, 2 + seed % 2 : 5] = value
    return label


def as_image(array: np.ndarray, spacing=(0.7, 0.8, 2.0), origin=(-30.0, -40.0, 100.0), direction=None) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    return image


def save(image: sitk.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def load(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def la_download(folder: Path, train: int = 6, test: int = 2) -> Path:
    for number in range(train + test):
        case = folder / ("Training Set" if number < train else "Testing Set") / f"CASE{number:02d}"
        save(as_image(volume(number).astype(np.uint8), (0.625, 0.625, 1.25)), case / "lgemri.nrrd")
        save(as_image(blob(number, 255), (0.625, 0.625, 1.25)), case / "laendo.nrrd")
    return folder


def la_h5_download(folder: Path, cases: int = 7, tested: tuple[int, ...] = (1, 4)) -> Path:
    names = [f"CASE{number:02d}" for number in range(cases)]
    for number, name in enumerate(names):
        file = folder / "2018LA_Seg_Training Set" / name / "mri_norm2.h5"
        file.parent.mkdir(parents=True)
        with h5py.File(file, "w") as opened:
            # (X, Y, Z)
            opened["image"] = volume(number).transpose(2, 1, 0).astype(np.float32)
            opened["label"] = blob(number).transpose(2, 1, 0)
    lists = {"test": [names[number] for number in tested], "train": [n for i, n in enumerate(names) if i not in tested]}
    for name, listed in lists.items():
        (folder / f"{name}.list").write_text("\n".join(listed) + "\n")
    return folder


def write_series(image: sitk.Image, folder: Path) -> None:
    """A CT series as a scanner stores it, its files not in the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    direction = image.GetDirection()
    orientation = "\\".join(f"{direction[index]:g}" for index in (0, 3, 6, 1, 4, 7))
    count = image.GetDepth()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index in range(count):
        one = image[:, :, index]
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.2.{index + 1}",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.2",
            "0020|0013": str(count - index),
            "0020|0032": "\\".join(f"{value:g}" for value in image.TransformIndexToPhysicalPoint((0, 0, index))),
            "0020|0037": orientation,
            "0018|0050": f"{image.GetSpacing()[2]:g}",
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            one.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"1-{count - index:03d}.dcm"))
        writer.Execute(one)


def pancreas_download(folder: Path, cases: int = 5) -> Path:
    for number in range(1, cases + 1):
        inner = folder / "Pancreas-CT" / f"PANCREAS_{number:04d}" / "11-24-2015-Pancreas" / "Pancreas-1"
        write_series(as_image(volume(number)), inner)
        # As the labels are: stored as the slices are, with a header that places them elsewhere.
        label = as_image(blob(number), origin=(0.0, 0.0, 0.0))
        save(label, folder / "TCIA_pancreas_labels-02-05-2017" / f"label{number:04d}.nii.gz")
    return folder


def acdc_download(folder: Path, train: int = 6, test: int = 2) -> Path:
    for number in range(1, train + test + 1):
        patient = f"patient{number:03d}"
        inner = folder / "database" / ("training" if number <= train else "testing") / patient
        inner.mkdir(parents=True)
        (inner / "Info.cfg").write_text("ED: 1\nES: 12\n")
        save(as_image(volume(number)), inner / f"{patient}_4d.nii.gz")
        for frame in ("01", "12"):
            save(as_image(volume(number)), inner / f"{patient}_frame{frame}.nii.gz")
            save(as_image(blob(number, 3)), inner / f"{patient}_frame{frame}_gt.nii.gz")
    return folder


def brats_download(folder: Path, cases: int = 6, ending: str = ".nii") -> Path:
    for number in range(cases):
        name = f"BraTS19_CBICA_A{number:02d}_1"
        inner = folder / "MICCAI_BraTS_2019_Data_Training" / ("HGG" if number % 2 else "LGG") / name
        for channel, sequence in enumerate(("t1", "t1ce", "t2", "flair")):
            save(as_image(volume(10 * number + channel)), inner / f"{name}_{sequence}{ending}")
        label = blob()
        label[3, 0, :4] = (0, 1, 2, 4)
        save(as_image(label.astype(np.int16)), inner / f"{name}_seg{ending}")
    name = "BraTS19_WashU_S037_1"
    for sequence in ("t1", "t1ce", "t2", "flair"):
        save(as_image(volume(1)), folder / "MICCAI_BraTS_2019_Data_Validation" / name / f"{name}_{sequence}{ending}")
    return folder


def isic_download(folder: Path, train: int = 6, test: int = 2) -> Path:
    for number in range(train + test + 1):
        part = "Training" if number < train else "Test" if number < train + test else "Validation"
        inputs, masks = folder / f"ISIC2018_Task1-2_{part}_Input", folder / f"ISIC2018_Task1_{part}_GroundTruth"
        inputs.mkdir(parents=True, exist_ok=True)
        masks.mkdir(exist_ok=True)
        (inputs / "LICENSE.txt").write_text("CC-0")
        pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3)).astype(np.uint8)
        io.imsave(inputs / f"ISIC_{number:07d}.jpg", pixels, check_contrast=False)
        mask = np.zeros((20, 30), np.uint8)
        mask[2:9, 3:11] = 255
        io.imsave(masks / f"ISIC_{number:07d}_segmentation.png", mask, check_contrast=False)
    return folder


DOWNLOADS = {
    "la": la_download,
    "pancreas": pancreas_download,
    "acdc": acdc_download,
    "brats19": brats_download,
    "isic2018": isic_download,
}


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def stamps(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
