"""MR-like phantoms in nnU-Net's raw format: the data of ``nnunet-ssl demo`` and of the tests.

Each case is drawn from closed-form fields (bent ellipsoids, a random smooth warp, a smooth bias field), so it looks the
same at every resolution. The chamber's border fades on one side, its neighbor has little contrast, and tissue holds
other shapes that are as bright: a few labels leave much to be learned from more images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from nnunet_ssl.errors import UserError

FILE_ENDING = ".nii.gz"
STRUCTURES = ("chamber", "neighbor", "wall")
# A case is drawn from (seed, its role, its number), so it stays the same whatever the counts are.
_TISSUE = 0.42  # its mean brightness
_ROLES = {"labeled": 0, "unlabeled": 1, "validation": 2, "test": 3}

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Look:
    """How much the images of a dataset differ.

    Attributes:
        contrast: range from which each case draws how much its structures stand out from tissue; 0 is not at all.
        noise: range from which each image draws the standard deviation of its noise; tissue is about 0.4.
        shading: how much the brightness varies across an image; 0 is not at all.
    """

    contrast: tuple[float, float] = (1.0, 1.0)
    noise: tuple[float, float] = (0.04, 0.08)
    shading: float = 0.45


@dataclass(frozen=True)
class PhantomDataset:
    """What :func:`write_phantom_dataset` wrote: the folder and the case identifiers by role."""

    folder: Path
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    labels: dict[str, int]


def write_phantom_dataset(
    raw_dataset_folder: Path,
    *,
    labeled: int,
    unlabeled: int,
    validation: int,
    test: int,
    seed: int,
    shape: Sequence[int] = (40, 48, 48),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    num_classes: int = 2,
    num_channels: int = 1,
    two_d: bool = False,
    look: Look = Look(),
    labeled_look: Look | None = None,
) -> PhantomDataset:
    """Write a phantom dataset in nnU-Net's raw format.

    Labeled and validation cases go to ``imagesTr`` and ``labelsTr``, unlabeled ones to ``imagesUn``, test cases to
    ``imagesTs`` and ``labelsTs``. ``splits_final.json`` holds one fold with the labeled and the validation cases;
    nnU-Net's planner copies it to nnUNet_preprocessed.

    Args:
        raw_dataset_folder: ``nnUNet_raw/DatasetXXX_Name``; files of the same name are overwritten.
        labeled: number of training cases with labels.
        unlabeled: number of cases without labels.
        validation: number of validation cases; 0 writes no split file.
        test: number of test cases.
        seed: the same seed gives the same cases, also when a count changes.
        shape: voxels per axis (z, y, x); with ``two_d`` (y, x), or (z, y, x) of which z is ignored.
        spacing: millimeters per axis, ordered as ``shape``.
        num_classes: 1 (chamber), 2 (and neighbor) or 3 (and the chamber's wall).
        num_channels: number of image channels, each with contrast and noise of its own.
        two_d: write two-dimensional images, which nnU-Net plans as ``2d`` only.
        look: of all images.
        labeled_look: of the labeled ones, if they look otherwise.

    Raises:
        UserError: the folder is not named as nnU-Net wants, or ``num_classes`` is not 1, 2 or 3.
    """
    if not 1 <= num_classes <= len(STRUCTURES):
        raise UserError(f"A phantom has 1 to {len(STRUCTURES)} structures, asked for {num_classes}.")
    folder = Path(raw_dataset_folder)
    if not (folder.name.startswith("Dataset") and folder.name[7:10].isdigit() and folder.name[10:11] == "_"):
        raise UserError(f"nnU-Net needs a dataset's folder to be named DatasetXXX_Name, not {folder.name!r}.")
    dimensions = 2 if two_d else 3
    shape, spacing = tuple(shape)[-dimensions:], tuple(spacing)[-dimensions:]
    places = {
        "labeled": ("imagesTr", "labelsTr", "phantom"),
        "unlabeled": ("imagesUn", None, "unlabeled"),
        "validation": ("imagesTr", "labelsTr", "validation"),
        "test": ("imagesTs", "labelsTs", "test"),
    }
    counts = {"labeled": labeled, "unlabeled": unlabeled, "validation": validation, "test": test}
    cases: dict[str, tuple[str, ...]] = {}
    for role, (images, labels, prefix) in places.items():
        cases[role] = tuple(f"{prefix}_{number:03d}" for number in range(counts[role]))
        for number, case in enumerate(cases[role]):
            of_case = [seed, _ROLES[role], number]
            own = labeled_look if role == "labeled" and labeled_look is not None else look
            contrast = np.random.default_rng([*of_case, 1]).uniform(*own.contrast)
            channels, segmentation = draw_phantom(
                np.random.default_rng(of_case), shape, spacing, num_channels=num_channels, contrast=contrast, look=own
            )
            for index, channel in enumerate(channels):
                _write(folder / images / f"{case}_{index:04d}{FILE_ENDING}", channel, spacing)
            if labels is not None:
                segmentation[segmentation > num_classes] = 0
                _write(folder / labels / f"{case}{FILE_ENDING}", segmentation, spacing)

    label_values = {name: value for value, name in enumerate(STRUCTURES[:num_classes], start=1)}
    description = {
        "channel_names": {str(index): "MRI" for index in range(num_channels)},
        "labels": {"background": 0, **label_values},
        "numTraining": labeled + validation,
        "file_ending": FILE_ENDING,
        "name": folder.name[11:],
        "description": f"Phantoms drawn by nnunet-ssl, seed {seed}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "dataset.json", description)
    if validation:
        _write_json(folder / "splits_final.json", [{"train": list(cases["labeled"]), "val": list(cases["validation"])}])
    return PhantomDataset(folder=folder, labels=label_values, **cases)


def draw_phantom(
    rng: np.random.Generator,
    shape: Sequence[int],
    spacing: Sequence[float],
    *,
    num_channels: int = 1,
    contrast: float = 1.0,
    look: Look = Look(),
) -> tuple[list[NDArray[np.float32]], NDArray[np.uint8]]:
    """Draw one case.

    Args:
        rng: of the case.
        shape: voxels per axis.
        spacing: millimeters per axis.
        num_channels: of the image.
        contrast: how much the structures stand out from tissue; 0 is not at all.
        look: its noise and shading.

    Returns:
        The channels, each of shape ``shape`` and with intensities from 0 to about 2000, and the segmentation
        (0 background, 1 chamber, 2 neighbor, 3 the chamber's wall).
    """
    position = _warped(rng, _grid(shape, spacing))

    chamber_center = rng.uniform(-0.12, 0.12, 3)
    turn = _rotation(rng, tilt=0.5)
    chamber = _bent_ellipsoid(
        position, chamber_center, rng.uniform([0.34, 0.34, 0.42], [0.52, 0.52, 0.62]), turn, bend=rng.uniform(-0.6, 0.6)
    )
    for angle in rng.uniform(0, 2 * np.pi, rng.integers(1, 4)):  # outgrowths, as of an atrium
        direction = np.array([rng.uniform(-0.3, 0.3), np.sin(angle), np.cos(angle)])
        lobe = _bent_ellipsoid(
            position,
            chamber_center + rng.uniform(0.38, 0.5) * direction,
            rng.uniform([0.12, 0.12, 0.12], [0.2, 0.2, 0.2]),
            turn,
        )
        chamber = np.minimum(chamber, lobe)

    angle = rng.uniform(0.15, 0.95) * np.pi
    away = np.array([rng.uniform(-0.1, 0.1), np.sin(angle), np.cos(angle)]) * rng.uniform(0.68, 0.78)
    neighbor = _bent_ellipsoid(
        position,
        chamber_center + away,
        rng.uniform([0.28, 0.2, 0.28], [0.4, 0.27, 0.42]),
        _rotation(rng, tilt=0.3, about_z=angle),
        bend=rng.uniform(-1.2, 1.2),
    )

    segmentation = np.zeros(chamber.shape, np.uint8)
    segmentation[chamber < 0.14] = 3
    segmentation[(neighbor < 0) & (chamber >= 0.06)] = 2
    segmentation[chamber < 0] = 1

    channels = [_image(rng, position, segmentation, contrast, look) for _ in range(num_channels)]
    return [channel.reshape(shape) for channel in channels], segmentation.reshape(shape)


def _image(
    rng: np.random.Generator, position: Array, segmentation: NDArray[np.uint8], contrast: float, look: Look
) -> NDArray[np.float32]:
    tissue = _TISSUE + 0.10 * _smooth_field(rng, position, frequency=2.5)
    for _ in range(rng.integers(9, 15)):  # as bright as the structures, elsewhere
        center = rng.uniform(-1.0, 1.0, 3)
        center[1:] *= rng.uniform(0.7, 1.2) / np.linalg.norm(center[1:])
        shape = _bent_ellipsoid(position, center, rng.uniform(0.1, 0.34, 3), _rotation(rng, tilt=1.0))
        tissue = np.where(shape < 0, rng.uniform(0.28, 0.95), tissue)
    chamber = rng.uniform(0.66, 0.76) + 0.04 * _smooth_field(rng, position, frequency=3.0)
    chamber = _TISSUE + contrast * (chamber - _TISSUE)
    neighbor = _TISSUE + contrast * (rng.uniform(0.9, 1.02) - _TISSUE)
    # The wall is dark on one side and fades into tissue on the other.
    side = rng.normal(size=3)
    seen = np.clip(0.5 + np.tensordot(side / np.linalg.norm(side), position, 1), 0, 1)
    wall = tissue + seen * (0.25 - tissue) + (1 - seen) * rng.uniform(0.0, 0.22)
    image = np.select([segmentation == 1, segmentation == 2, segmentation == 3], [chamber, neighbor, wall], tissue)

    # Partial volume; a slice of a two-dimensional case has nothing to blur along z.
    image = gaussian_filter(image, [0.7 if length > 1 else 0.0 for length in image.shape])
    image = image ** rng.uniform(0.85, 1.2)
    image = image * np.exp(look.shading * _smooth_field(rng, position, frequency=0.7))
    noise = rng.uniform(*look.noise)
    image = np.hypot(image + rng.normal(0, noise, image.shape), rng.normal(0, noise, image.shape))  # Rician
    return (image * rng.uniform(250, 1200)).astype(np.float32)


def _grid(shape: Sequence[int], spacing: Sequence[float]) -> Array:
    """Physical positions, shape (3, z, y, x); 1 is half of the shortest in-plane extent."""
    shape, spacing = (1, *shape)[-3:], (1.0, *spacing)[-3:]
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    extent = min(n * step for n, step in zip(shape[1:], spacing[1:], strict=True)) / 2
    return np.stack(np.meshgrid(*axes, indexing="ij")) / extent


def _smooth_field(rng: np.random.Generator, position: Array, *, frequency: float) -> Array:
    """A random field with values in [-1, 1] and about ``frequency`` / 2 periods across the image."""
    waves = []
    for _ in range(4):
        direction = rng.normal(size=3)
        direction *= np.pi * frequency * rng.uniform(0.5, 1.0) / np.linalg.norm(direction)
        waves.append(np.sin(np.tensordot(direction, position, 1) + rng.uniform(0, 2 * np.pi)))
    return np.mean(waves, axis=0)


def _warped(rng: np.random.Generator, position: Array) -> Array:
    return position + 0.14 * np.stack([_smooth_field(rng, position, frequency=1.6) for _ in range(3)])


def _rotation(rng: np.random.Generator, *, tilt: float, about_z: float | None = None) -> Array:
    """A rotation about z by any angle (or the one given), then about y and x by at most ``tilt`` radians."""
    z = rng.uniform(0, 2 * np.pi) if about_z is None else about_z
    y, x = rng.uniform(-tilt, tilt, 2)
    about_z_axis = np.array([[1, 0, 0], [0, np.cos(z), -np.sin(z)], [0, np.sin(z), np.cos(z)]])
    about_y_axis = np.array([[np.cos(y), 0, -np.sin(y)], [0, 1, 0], [np.sin(y), 0, np.cos(y)]])
    about_x_axis = np.array([[np.cos(x), -np.sin(x), 0], [np.sin(x), np.cos(x), 0], [0, 0, 1]])
    return about_x_axis @ about_y_axis @ about_z_axis


def _bent_ellipsoid(position: Array, center: Array, radii: Array, rotation: Array, *, bend: float = 0.0) -> Array:
    """Negative inside, 0 on the surface; its longest axis, the last one, follows a parabola."""
    local = np.tensordot(rotation, position - center[:, None, None, None], 1)
    local[1] = local[1] - bend * (local[2] ** 2 - radii[2] ** 2 / 3)
    return np.sqrt(np.sum((local / radii[:, None, None, None]) ** 2, axis=0)) - 1.0


def _write(path: Path, array: NDArray[np.generic], spacing: Sequence[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(step) for step in reversed(spacing)])
    sitk.WriteImage(image, str(path))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
