from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dataset import TinyDataset, voxels

from nnunet_ssl.data import leak_guard
from nnunet_ssl.data.leak_guard import check_leaks, image_signature, same_image
from nnunet_ssl.data.unlabeled_cases import UnlabeledCase, collect_unlabeled_cases
from nnunet_ssl.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Labeled T0, T1, V0, V1. Unlabeled: two fresh images, copies of V0 and T1, and a copy of a fresh one."""
    dataset = TinyDataset(tmp_path_factory.mktemp("leaks"))
    for number, name in enumerate(["T0", "T1", "V0", "V1"]):
        dataset.add_labeled(name, voxels(number))
    for name, seed in {"A": 10, "B": 11, "of_V0": 2, "of_T1": 1, "of_A": 10}.items():
        dataset.add(name, voxels(seed))
    dataset.run()
    return dataset


def check(
    dataset: TinyDataset,
    *names: str,
    train: tuple[str, ...] = ("T0", "T1"),
    val: tuple[str, ...] = ("V0", "V1"),
    allow: bool = False,
) -> list[str]:
    """The lines that are logged; a name of the labeled cases stands for one in the fold's `unlabeled` list."""
    cases = [
        UnlabeledCase(name, dataset.labeled, "imagesTr")
        if (dataset.labeled / f"{name}.b2nd").exists()
        else UnlabeledCase(name, dataset.folder, "imagesUn")
        for name in names
    ]
    lines: list[str] = []
    check_leaks(
        unlabeled=cases,
        labeled_folder=dataset.labeled,
        train=list(train),
        val=list(val),
        allow_transductive=allow,
        log=lines.append,
    )
    return lines


def test_clean_cases_pass_in_silence(dataset: TinyDataset) -> None:
    assert check(dataset, "A", "B") == []


def test_validation_image_under_another_name_is_refused(dataset: TinyDataset) -> None:
    with pytest.raises(UserError, match=r"1 unlabeled case.*imagesUn/of_V0 = imagesTr/V0.*allow_transductive"):
        check(dataset, "A", "of_V0")


def test_validation_case_in_the_folds_list_is_refused(dataset: TinyDataset) -> None:
    with pytest.raises(UserError, match=r"imagesTr/V1\."):
        check(dataset, "A", "V1")


def test_allowed_leak_is_logged(dataset: TinyDataset) -> None:
    (line,) = check(dataset, "A", "of_V0", "V1", allow=True)
    assert "of_V0 = imagesTr/V0" in line and "imagesTr/V1" in line and "optimistic" in line


def test_copy_of_a_training_case_is_reported(dataset: TinyDataset) -> None:
    (line,) = check(dataset, "A", "of_T1")
    assert "labeled training case: imagesUn/of_T1 = imagesTr/T1" in line


def test_copy_of_an_image_that_is_trained_on_and_held_back_is_refused(dataset: TinyDataset) -> None:
    dataset.add_labeled("S0", voxels(2))  # the image of V0
    with pytest.raises(UserError, match="of_V0 = imagesTr/V0"):
        check(dataset, "of_V0", train=("S0", "T0"))


def test_copies_among_the_unlabeled_are_reported(dataset: TinyDataset) -> None:
    (line,) = check(dataset, "A", "B", "of_A")
    assert "imagesUn/of_A = imagesUn/A" in line


def test_where_validation_is_training_nothing_leaks(dataset: TinyDataset) -> None:
    everything = ("T0", "T1", "V0", "V1")
    (line,) = check(dataset, "A", "of_V0", train=everything, val=everything[::-1])
    assert "of_V0 = imagesTr/V0" in line


def test_signatures_are_taken_from_the_records(dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(image: np.ndarray) -> dict:
        read.append(image)
        return image_signature(image)

    monkeypatch.setattr(leak_guard, "image_signature", counted)
    check(dataset, "A", "B")
    assert len(read) == 4  # the labeled cases


def test_signatures_that_agree_are_no_proof(dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole images decide, so a clash of signatures is no false alarm."""
    monkeypatch.setattr(leak_guard._Images, "signatures", lambda self, cases: dict.fromkeys(cases, SAME))
    assert check(dataset, "A", "B") == []
    with pytest.raises(UserError, match="of_V0 = imagesTr/V0"):
        check(dataset, "A", "of_V0")


SAME = {"shape": [1, 25, 30, 30], "values": [0.0] * 64}


def test_real_cases_of_a_fold(dataset: TinyDataset) -> None:
    splits = [{"train": ["T0"], "val": ["V1"], "unlabeled": ["T1"]}, {"train": ["T0"], "val": ["V0"]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(splits))
    lines: list[str] = []
    for fold, split in enumerate(splits):
        cases = collect_unlabeled_cases(dataset.preprocessed, "nnUNetPlans_3d_fullres", fold)
        arguments = {"train": split["train"], "val": split["val"], "allow_transductive": False, "log": lines.append}
        if fold == 0:
            check_leaks(unlabeled=cases, labeled_folder=dataset.labeled, **arguments)
        else:
            with pytest.raises(UserError, match="of_V0"):
                check_leaks(unlabeled=cases, labeled_folder=dataset.labeled, **arguments)
    assert any("of_A = imagesUn/A" in line for line in lines)
    assert any("imagesTr/T1 = imagesUn/of_T1" in line for line in lines)


def test_numpy_datasets_of_older_plans(dataset: TinyDataset, tmp_path: Path) -> None:
    folder = tmp_path / "labeled"
    folder.mkdir()
    from tiny_dataset import read_preprocessed

    image = read_preprocessed(dataset.labeled, "V0")
    np.savez(folder / "V0.npz", data=image, seg=np.zeros_like(image, np.int16))
    (folder / "V0.pkl").write_bytes((dataset.labeled / "V0.pkl").read_bytes())
    case = UnlabeledCase("of_V0", dataset.folder, "imagesUn")
    with pytest.raises(UserError, match="of_V0"):
        check_leaks(
            unlabeled=[case],
            labeled_folder=folder,
            train=[],
            val=["V0"],
            allow_transductive=False,
            log=lambda line: None,
        )


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(2, 9)),
    scale=st.floats(0.1, 10),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 1000),
)
def test_linear_change_of_intensity_and_rounding_make_no_difference(
    shape: tuple[int, ...], scale: float, shift: float, seed: int
) -> None:
    image = np.random.default_rng(seed).normal(size=shape)
    changed = (scale * image + shift).astype(np.float32)
    assert same_image(image.astype(np.float32), changed)
    one, other = image_signature(image), image_signature(changed)
    assert one["shape"] == other["shape"] == list(shape)
    np.testing.assert_allclose(one["values"], other["values"], atol=0.01)


def test_images_differ_by_shape_or_by_any_channel_or_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leak_guard, "_VOXELS_AT_ONCE", 64)
    image = np.random.default_rng(0).normal(size=(2, 8, 9, 10)).astype(np.float32)
    image[:, :, :, :3] = 0  # slabs without any content
    assert same_image(image, image.copy())
    assert not same_image(image, image[:, :7])
    for position in ((1, 7, 8, 9), (0, 0, 0, 3), (0, 0, 0, 0)):
        other = image.copy()
        other[position] += 3
        assert not same_image(image, other)
    assert not same_image(image, np.zeros_like(image))
    assert not same_image(image, -image)


def test_empty_image_center_is_no_match() -> None:
    """Images that are constant where the signature looks have no values, and are told apart by their voxels."""
    blank = np.zeros((1, 12, 12, 12), np.float32)
    other = blank.copy()
    other[0, 0, 0, :3] = 1
    assert image_signature(blank) == image_signature(other) == {"shape": [1, 12, 12, 12], "values": []}
    assert not same_image(blank, other)
