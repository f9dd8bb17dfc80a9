from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunet_ssl.data.phantoms import Look, write_phantom_dataset
from nnunet_ssl.errors import UserError

SMALL = {"shape": (16, 20, 24), "spacing": (2.5, 2.0, 2.0)}


def arrays(folder):
    return {
        str(file.relative_to(folder)): sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        for file in folder.rglob("*.nii.gz")
    }


def test_writes_nnunets_raw_format(tmp_path):
    folder = tmp_path / "Dataset007_Small"
    dataset = write_phantom_dataset(
        folder, labeled=2, unlabeled=3, validation=1, test=1, seed=0, num_channels=2, **SMALL
    )
    names = {part: sorted(file.name for file in (folder / part).iterdir()) for part in ("imagesTr", "labelsTr")}
    assert names["labelsTr"] == [f"{case}.nii.gz" for case in dataset.labeled + dataset.validation]
    assert names["imagesTr"] == [
        f"{case}_{channel:04d}.nii.gz" for case in dataset.labeled + dataset.validation for channel in (0, 1)
    ]
    assert len(list((folder / "imagesUn").iterdir())) == 6
    assert not (folder / "labelsUn").exists()
    assert len(list((folder / "labelsTs").iterdir())) == 1
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == 3
    assert description["labels"] == {"background": 0, "chamber": 1, "neighbor": 2}
    assert description["channel_names"] == {"0": "MRI", "1": "MRI"}
    assert json.loads((folder / "splits_final.json").read_text()) == [
        {"train": list(dataset.labeled), "val": list(dataset.validation)}
    ]
    image = sitk.ReadImage(str(folder / "imagesTs" / f"{dataset.test[0]}_0001.nii.gz"))
    assert image.GetSize() == (24, 20, 16)
    assert image.GetSpacing() == (2.0, 2.0, 2.5)


def test_same_seed_same_cases_whatever_the_counts(tmp_path):
    few, more, other = (tmp_path / f"Dataset00{number}_Small" for number in (1, 2, 3))
    write_phantom_dataset(few, labeled=1, unlabeled=1, validation=1, test=0, seed=5, **SMALL)
    write_phantom_dataset(more, labeled=2, unlabeled=2, validation=1, test=1, seed=5, **SMALL)
    write_phantom_dataset(other, labeled=1, unlabeled=1, validation=1, test=0, seed=6, **SMALL)
    first, second, third = arrays(few), arrays(more), arrays(other)
    assert set(first) < set(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
        assert not np.array_equal(array, third[name])
    images = [array for name, array in second.items() if "images" in name]
    assert len({array.tobytes() for array in images}) == len(images), "every case is another one"


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_every_structure_is_in_every_case(tmp_path, num_classes):
    folder = tmp_path / "Dataset001_Small"
    write_phantom_dataset(folder, labeled=8, unlabeled=0, validation=0, test=0, seed=1, num_classes=num_classes)
    assert not (folder / "splits_final.json").exists()
    for name, array in arrays(folder).items():
        if "labels" in name:
            assert set(np.unique(array)) == set(range(num_classes + 1)), name
        else:
            assert array.dtype == np.float32
            assert np.isfinite(array).all() and array.min() >= 0 and array.std() > 10


def test_two_dimensional_cases(tmp_path):
    folder = tmp_path / "Dataset001_Flat"
    write_phantom_dataset(folder, labeled=6, unlabeled=1, validation=1, test=0, seed=1, two_d=True, shape=(40, 56))
    image = sitk.ReadImage(str(next((folder / "imagesUn").iterdir())))
    assert image.GetDimension() == 2 and image.GetSize() == (56, 40)
    for file in (folder / "labelsTr").iterdir():
        assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(file))))) == {0, 1, 2}


def test_refuses_what_nnunet_would_not_find(tmp_path):
    counts = {"labeled": 1, "unlabeled": 0, "validation": 0, "test": 0, "seed": 0}
    with pytest.raises(UserError, match="DatasetXXX_Name"):
        write_phantom_dataset(tmp_path / "phantoms", **counts)
    with pytest.raises(UserError, match="1 to 3 structures"):
        write_phantom_dataset(tmp_path / "Dataset001_P", **counts, num_classes=4)


def test_the_look_changes_images_and_no_labels(tmp_path):
    counts = {"labeled": 0, "unlabeled": 0, "validation": 0, "test": 1, "seed": 5, "shape": (16, 32, 32)}
    looks = [Look(), Look(contrast=(0.2, 0.3)), Look(noise=(0.2, 0.3)), Look(shading=1.5)]
    images, labels = [], []
    for number, look in enumerate(looks, start=1):
        folder = tmp_path / f"Dataset00{number}_Phantoms"
        write_phantom_dataset(folder, **counts, look=look)
        images.append(sitk.GetArrayFromImage(sitk.ReadImage(folder / "imagesTs/test_000_0000.nii.gz")))
        labels.append(sitk.GetArrayFromImage(sitk.ReadImage(folder / "labelsTs/test_000.nii.gz")))
    assert all(np.array_equal(one, labels[0]) for one in labels)
    chamber, tissue = labels[0] == 1, labels[0] == 0
    plain, faint, _, _ = (image[chamber].mean() / image[tissue].mean() - 1 for image in images)
    assert 0.05 < faint < 0.6 * plain
    plain, _, noisy, _ = (np.abs(np.diff(image, axis=2)).mean() / image.mean() for image in images)
    assert noisy > 2 * plain
    plain, _, _, shaded = (gaussian_filter(image, 6).std() / image.mean() for image in images)
    assert shaded > 1.5 * plain


def test_labeled_cases_may_look_otherwise(tmp_path):
    counts = {"labeled": 1, "unlabeled": 1, "validation": 0, "test": 0, "seed": 5, "shape": (16, 32, 32)}
    for number, labeled_look in enumerate([None, Look(contrast=(0.2, 0.3))], start=1):
        write_phantom_dataset(tmp_path / f"Dataset00{number}_P", **counts, labeled_look=labeled_look)

    def image(number: int, file: str) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / f"Dataset00{number}_P" / file))

    assert np.array_equal(
        image(1, "imagesUn/unlabeled_000_0000.nii.gz"), image(2, "imagesUn/unlabeled_000_0000.nii.gz")
    )
    label = image(1, "labelsTr/phantom_000.nii.gz")
    assert np.array_equal(label, image(2, "labelsTr/phantom_000.nii.gz"))
    plain, faint = (
        one[label == 1].mean() / one[label == 0].mean() - 1
        for one in (image(number, "imagesTr/phantom_000_0000.nii.gz") for number in (1, 2))
    )
    assert 0.05 < faint < 0.6 * plain
