"""Signed distance maps against a search over all voxels, and as a transform in nnU-Net's loader."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_ssl.data.signed_distance import SignedDistanceTransform, signed_distance_map


def naive_map(mask: np.ndarray, spacing) -> np.ndarray:
    """By the definition: the distance of each voxel's center to that of the nearest boundary voxel."""
    voxels = list(np.ndindex(mask.shape))

    def neighbors(v):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                n = list(v)
                n[axis] += step
                if 0 <= n[axis] < mask.shape[axis]:
                    yield tuple(n)

    boundary = [v for v in voxels if mask[v] and any(not mask[n] for n in neighbors(v))]
    if not boundary:
        return np.full(mask.shape, -1.0 if mask.any() else 1.0)
    distance = np.array([min(np.linalg.norm((np.subtract(v, b)) * spacing) for b in boundary) for v in voxels]).reshape(
        mask.shape
    )
    signed = np.zeros(mask.shape)
    for side, sign in ((mask, -1), (~mask, 1)):
        if side.any() and distance[side].max() > 0:
            signed[side] = sign * distance[side] / distance[side].max()
    return signed


@given(
    st.sampled_from([(6, 5), (4, 1), (3, 4, 5), (1, 6, 4)]).flatmap(lambda shape: arrays(bool, shape)),
    st.lists(st.floats(0.3, 5.0), min_size=3, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_it_is_the_distance_to_the_boundary(mask, spacing):
    spacing = spacing[: mask.ndim]
    found = signed_distance_map(mask, spacing)
    assert found.dtype == np.float32 and found.shape == mask.shape
    np.testing.assert_allclose(found, naive_map(mask, spacing), atol=1e-5)


@given(st.sampled_from([(7, 8), (4, 5, 6)]).flatmap(lambda shape: arrays(bool, shape)))
@settings(max_examples=60, deadline=None)
def test_signs_and_bounds(mask):
    found = signed_distance_map(mask, [1.0] * mask.ndim)
    assert np.abs(found).max() <= 1
    assert (found[mask] <= 0).all() and (found[~mask] > 0).all()
    # Its own maximum on each side; the inside may be all boundary.
    if mask.any() and not mask.all():
        assert found.max() == 1
        assert found.min() in (0, -1)


def test_absent_and_full():
    assert (signed_distance_map(np.zeros((3, 4), bool), (1, 1)) == 1).all()
    assert (signed_distance_map(np.ones((3, 4), bool), (1, 1)) == -1).all()


def test_distances_are_physical():
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    found = signed_distance_map(mask, (3.0, 1.0))
    # Four voxels of 3 mm and four of 1 mm; the farthest corner is 12.65 mm away.
    assert found[0, 4] == pytest.approx(12 / np.hypot(12, 4)) and found[4, 0] == pytest.approx(4 / np.hypot(12, 4))


def segmentation() -> torch.Tensor:
    labels = torch.zeros(1, 8, 12, dtype=torch.int16)
    labels[0, 2:6, 2:6] = 1
    labels[0, 3:7, 7:11] = 2
    labels[0, :, 11] = 3  # ignored
    return labels


def test_the_transform_appends_one_map_per_class():
    levels = DownsampleSegForDSTransform([[1, 1], [0.5, 0.5]])(segmentation=segmentation())["segmentation"]
    transform = pickle.loads(pickle.dumps(SignedDistanceTransform((1.0, 2.0), labels=[1, 2])))
    *kept, maps = transform(segmentation=levels)["segmentation"]
    assert len(kept) == 2 and all(torch.equal(a, b) for a, b in zip(kept, levels, strict=True))
    assert maps.shape == (2, 8, 12) and maps.dtype == torch.float32
    for index, label in enumerate((1, 2)):
        mask = (segmentation()[0] == label).numpy()
        np.testing.assert_allclose(maps[index].numpy(), naive_map(mask, (1.0, 2.0)), atol=1e-5)


def test_the_transform_of_regions_leaves_out_the_ignore_label_and_needs_no_deep_supervision():
    labels = segmentation()[0]
    regions = torch.stack([(labels == 1) | (labels == 2), labels == 2, labels == 3])
    transform = SignedDistanceTransform((1.0, 1.0), labels=None, regions=2)
    kept, maps = transform(segmentation=regions)["segmentation"]
    assert torch.equal(kept, regions) and maps.shape == (2, 8, 12)
    np.testing.assert_allclose(maps[0].numpy(), naive_map(regions[0].numpy(), (1.0, 1.0)), atol=1e-5)
