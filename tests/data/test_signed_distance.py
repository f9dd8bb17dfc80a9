"""Signed distance maps against a search over all voxels, and as targets of a batch."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_ssl.data.signed_distance import SignedDistanceMaps, of_all_structures, signed_distance_map


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
@settings(max_examples=60)
def test_it_is_the_distance_to_the_boundary(mask, spacing):
    spacing = spacing[: mask.ndim]
    found = signed_distance_map(mask, spacing)
    assert found.dtype == np.float32 and found.shape == mask.shape
    np.testing.assert_allclose(found, naive_map(mask, spacing), atol=1e-5)


@given(st.sampled_from([(7, 8), (4, 5, 6)]).flatmap(lambda shape: arrays(bool, shape)))
@settings(max_examples=60)
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


def test_only_structures_that_are_there_have_a_map():
    batch = torch.stack([segmentation(), torch.where(segmentation() == 1, 0, segmentation()), segmentation() * 0])
    make = pickle.loads(pickle.dumps(SignedDistanceMaps((1.0, 2.0), labels=[1, 2, 4])))
    maps, places = make(batch)
    assert maps.shape == (3, 8, 12) and maps.dtype == torch.float16 and places.tolist() == [0, 1, 4]
    full = of_all_structures(torch.zeros(3, 3, 8, 12), maps, places)
    for labels, sample in zip(batch, full, strict=True):
        for label, found in zip((1, 2, 4), sample, strict=True):
            np.testing.assert_allclose(found, naive_map((labels[0] == label).numpy(), (1.0, 2.0)), atol=2.5e-4)


def test_a_batch_without_structures_is_far_from_all():
    maps, places = SignedDistanceMaps((1.0, 1.0), labels=[1, 2])(torch.zeros(2, 1, 4, 5, dtype=torch.int16))
    assert maps.shape == (0, 4, 5) and places.shape == (0,)
    like = torch.zeros(2, 2, 4, 5, dtype=torch.float16, requires_grad=True)
    full = of_all_structures(like, maps, places)
    assert (full == 1).all() and full.dtype == torch.float16 and not full.requires_grad


def test_maps_of_regions_leave_out_the_ignore_label():
    labels = segmentation()[0]
    regions = torch.stack([(labels == 1) | (labels == 2), labels == 4, labels == 2, labels == 3])
    maps, places = SignedDistanceMaps((1.0, 1.0), labels=None, regions=3)(regions[None])
    assert places.tolist() == [0, 2]
    for number, found in zip((0, 2), maps, strict=True):
        np.testing.assert_allclose(found, naive_map(regions[number].numpy(), (1.0, 1.0)), atol=2.5e-4)


def test_a_batch_can_be_as_large_as_the_estimate_says():
    labels = torch.arange(32, dtype=torch.int16).view(1, 1, 4, 8).expand(2, 1, 4, 8)
    for make, batch in (
        (SignedDistanceMaps((1.0, 1.0), labels=range(1, 32)), labels),
        (SignedDistanceMaps((1.0, 1.0), labels=None, regions=3), torch.ones(2, 3, 4, 8, dtype=torch.bool)),
    ):
        for largest, found in zip(make.largest(2, (4, 8)), make(batch), strict=True):
            assert largest.shape == found.shape and largest.dtype == found.dtype
