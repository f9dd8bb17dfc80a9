"""Boxes stay in the patch, cover what they should, and are pasted where they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ssl.data.cutmix import CutMix, box_mask, paste

PATCHES = st.one_of(
    st.tuples(st.integers(16, 96), st.integers(16, 96)),
    st.tuples(st.integers(8, 48), st.integers(16, 64), st.integers(16, 64)),
)


@settings(max_examples=60)
@given(PATCHES, st.integers(0, 2**32 - 1))
def test_boxes_lie_in_the_patch_and_cover_the_asked_volume(patch, seed):
    np.random.seed(seed)
    boxes = CutMix(probability=1.0).draw(8, patch)
    size = boxes[..., 1] - boxes[..., 0]
    assert boxes.shape == (8, len(patch), 2)
    assert (boxes[..., 0] >= 0).all() and (boxes[..., 1] <= np.array(patch)).all() and (size >= 1).all()
    # Sides are rounded to whole voxels: at most half a voxel per side.
    low = np.prod(np.maximum(size - 0.5, 0) / np.array(patch), axis=1)
    high = np.prod((size + 0.5) / np.array(patch), axis=1)
    assert (high >= 0.02).all() and (low <= 0.4).all()
    sides_low, sides_high = (size - 0.5) / np.array(patch), (size + 0.5) / np.array(patch)
    assert (sides_low.min(1) / sides_high.max(1) <= 1).all()
    assert (sides_high.min(1) / sides_low.max(1) >= 0.3).all()


def test_volume_is_uniform_and_every_axis_may_be_the_long_one():
    np.random.seed(0)
    boxes = CutMix(probability=1.0).draw(4000, (100, 100, 100))
    size = (boxes[..., 1] - boxes[..., 0]) / 100
    volume = size.prod(1)
    assert volume.mean() == pytest.approx(0.21, abs=0.01)
    assert np.quantile(volume, [0.25, 0.75]) == pytest.approx([0.115, 0.305], abs=0.015)
    longest = np.bincount(size.argmax(1), minlength=3) / 4000
    assert longest == pytest.approx([1 / 3] * 3, abs=0.05)
    centre = (boxes.sum(2) / 2).mean(0)
    assert centre == pytest.approx([50] * 3, abs=1.5)


def test_the_asked_share_of_samples_has_a_box():
    np.random.seed(0)
    boxes = CutMix(probability=0.5).draw(2000, (20, 30))
    assert ((boxes[..., 1] > boxes[..., 0]).all(1)).mean() == pytest.approx(0.5, abs=0.04)


def test_axes_are_in_the_right_order():
    boxes = torch.tensor([[[1, 3], [0, 5], [4, 6]], [[0, 0], [0, 0], [0, 0]]])
    mask = box_mask(boxes, (4, 5, 6))
    expected = np.zeros((2, 1, 4, 5, 6), dtype=bool)
    expected[0, 0, 1:3, 0:5, 4:6] = True
    np.testing.assert_array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("patch", [(6, 7), (4, 5, 6)])
def test_paste_takes_the_partner_inside_and_keeps_the_sample_outside(patch):
    np.random.seed(1)
    boxes = torch.from_numpy(CutMix(probability=1.0).draw(3, patch))
    partner = torch.tensor([1, 2, 0])
    image = torch.rand(3, 2, *patch)
    mixed = paste(image, box_mask(boxes, patch), partner)
    for b in range(3):
        expected = image[b].clone()
        inside = (slice(None), *(slice(int(low), int(high)) for low, high in boxes[b]))
        expected[inside] = image[partner[b]][inside]
        assert torch.equal(mixed[b], expected)
