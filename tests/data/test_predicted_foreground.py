"""Where the network predicts a rare class, later patches are cut: what is kept, what is drawn, what is forgotten."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ssl.data.predicted_foreground import (
    ANYWHERE,
    STRIDE,
    Aim,
    PredictedForeground,
    coordinates_of,
    draw_voxels,
    subsampled,
)

KEYS = ["imagesUn/a", "imagesUn/b"]


def make(rare=(0, 2), structures=3) -> PredictedForeground:
    foreground = PredictedForeground(KEYS, structures)
    foreground.rare = list(rare)
    return foreground


def update(foreground, key, aim, predicted: dict[int, torch.Tensor], coordinates) -> None:
    """Of a patch in which each structure is predicted where its mask is, and background elsewhere."""
    label = sum((structure + 1) * mask for structure, mask in predicted.items())
    (voxels,) = draw_voxels(label.flatten()[None], len(foreground._rare) + 1).numpy()
    foreground.update(key, aim, voxels[1:], label.shape, coordinates)


def drawn(foreground, key, times=200) -> set[tuple]:
    return {(aim.structure, *aim.voxel.tolist()) for aim in (foreground.draw(key) for _ in range(times))}


def test_what_is_put_is_drawn_of_its_case_and_of_rare_classes_alone():
    foreground = make()
    foreground.put(KEYS[0], Aim(0, np.asarray([1, 2, 3])))
    foreground.put(KEYS[0], Aim(0, np.asarray([4, 5, 6])))
    foreground.put(KEYS[0], Aim(1, np.asarray([7, 7, 7])))  # not rare
    foreground.put(KEYS[0], Aim(2, np.asarray([0, 0, 9])))
    assert drawn(foreground, KEYS[0]) == {(0, 1, 2, 3), (0, 4, 5, 6), (2, 0, 0, 9)}
    assert drawn(foreground, KEYS[1]) == {(-1, -1, -1, -1)}
    classes = [foreground.draw(KEYS[0]).structure for _ in range(400)]
    assert 0.4 < np.mean(np.equal(classes, 2)) < 0.6, "classes alike, however many voxels each has"
    foreground.rare = []
    assert foreground.draw(KEYS[0]) is ANYWHERE


def test_a_drawn_voxel_does_not_change_with_the_memory():
    foreground = make()
    foreground.put(KEYS[0], Aim(0, np.asarray([1, 2, 3])))
    aim = foreground.draw(KEYS[0])
    foreground.remove(KEYS[0], aim)
    assert aim.voxel.tolist() == [1, 2, 3] and foreground.draw(KEYS[0]) is ANYWHERE
    foreground.remove(KEYS[0], aim)


def test_no_more_is_kept_than_there_is_room_and_new_ones_replace_old_ones():
    foreground = make()
    for number in range(100):
        foreground.put(KEYS[0], Aim(0, np.asarray([number, 0, 0])))
    kept = {voxel for _, voxel, *_ in drawn(foreground, KEYS[0], 500)}
    assert len(kept) == 8 and 99 in kept and np.mean(list(kept)) > 60


@pytest.mark.parametrize(("cases", "structures"), [(1, 1), (10_000, 14), (10_000, 117), (100_000, 2)])
def test_memory_is_bounded(cases, structures):
    foreground = PredictedForeground([str(number) for number in range(cases)], structures)
    assert foreground._voxels.nbytes <= max(2**24, 12 * cases * structures)
    assert foreground._voxels.is_shared() and foreground._rare.is_shared()


@settings(max_examples=60)
@given(
    low=st.lists(st.integers(-30, 300), min_size=3, max_size=3),
    size=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    data=st.data(),
)
def test_a_predicted_voxel_is_found_again_in_the_case(low, size, data):
    """To within the stride of the subsampled coordinates."""
    box = [[start, start + length] for start, length in zip(low, size, strict=True)]
    coordinates = coordinates_of(box)
    assert coordinates.shape == (3, *size) and coordinates[:, 0, 0, 0].tolist() == low
    at = [data.draw(st.integers(0, length - 1)) for length in size]
    predicted = torch.zeros(size, dtype=torch.bool)
    predicted[tuple(at)] = True
    foreground = make(rare=[1])
    update(foreground, KEYS[0], ANYWHERE, {1: predicted}, subsampled(coordinates))
    aim = foreground.draw(KEYS[0])
    expected = np.clip(np.add(low, at), 0, None)
    assert aim.structure == 1 and (abs(aim.voxel - expected) < STRIDE).all()


def test_an_aim_that_is_no_longer_predicted_is_forgotten_and_others_are_kept():
    foreground = make()
    aim, other = Aim(0, np.asarray([1, 2, 3])), Aim(2, np.asarray([1, 2, 3]))
    foreground.put(KEYS[0], aim)
    foreground.put(KEYS[0], other)
    nowhere = torch.zeros(4, 4, dtype=torch.bool)
    coordinates = subsampled(coordinates_of([[0, 1], [0, 4], [0, 4]])[:, 0])
    update(foreground, KEYS[0], ANYWHERE, {0: nowhere, 2: nowhere}, coordinates)
    assert drawn(foreground, KEYS[0]) == {(0, 1, 2, 3), (2, 1, 2, 3)}, "cut anywhere, it says nothing about a voxel"
    update(foreground, KEYS[0], aim, {0: nowhere, 2: nowhere}, coordinates)
    assert drawn(foreground, KEYS[0]) == {(2, 1, 2, 3)}


@settings(max_examples=60)
@given(rows=st.integers(1, 4), voxels=st.integers(1, 60), values=st.integers(1, 9), seed=st.integers(0, 999))
def test_a_voxel_of_each_label_is_drawn(rows, voxels, values, seed):
    labels = torch.randint(0, values, (rows, voxels), generator=torch.Generator().manual_seed(seed))
    for dtype in (torch.int16, torch.int64) if values > 2 else (torch.bool, torch.int16):
        found = draw_voxels(labels.to(dtype), max(values, 2))
        for row, label in np.ndindex(*found.shape):
            there = (labels[row] == label).nonzero()[:, 0].tolist()
            assert found[row, label] in there or (found[row, label] == -1 and not there)


def test_voxels_of_a_label_are_drawn_alike():
    """Of each row apart, and the first and the last as often as others."""
    labels = torch.tensor([[0, 1, 1, 0, 1, 2], [2, 2, 2, 2, 0, 0]], dtype=torch.int16)
    found = torch.stack([draw_voxels(labels, 3) for _ in range(3000)])
    for row, label, expected in ((0, 1, [1, 2, 4]), (1, 2, [0, 1, 2, 3]), (0, 2, [5]), (1, 1, [-1])):
        places, counts = found[:, row, label].unique(return_counts=True)
        assert places.tolist() == expected
        assert (counts / 3000 - 1 / len(expected)).abs().max() < 0.05


def test_two_dimensions():
    """The slice counts as an axis, as in nnU-Net's preprocessed cases."""
    coordinates = subsampled(coordinates_of([[7, 8], [10, 26], [20, 40]])[:, 0])
    assert coordinates.shape == (3, 4, 5)
    predicted = torch.zeros(16, 20, dtype=torch.bool)
    predicted[6, 2] = True
    foreground = make(rare=[0])
    update(foreground, KEYS[1], ANYWHERE, {0: predicted}, coordinates)
    assert drawn(foreground, KEYS[1]) == {(0, 7, 16, 22)}
