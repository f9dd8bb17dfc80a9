from __future__ import annotations

import dataclasses
import math

import medpy.metric.binary as medpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnunet_ssl.evaluation.metrics import METRICS, CaseMetrics, evaluate_case, structure_metrics


def naive_surface(mask):
    """Indices of the voxels of which a face neighbor is background or beyond the edge."""
    voxels = []
    for index in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                other = index.copy()
                other[axis] += step
                outside = not 0 <= other[axis] < mask.shape[axis]
                if outside or not mask[tuple(other)]:
                    voxels.append(tuple(index))
    return np.array(sorted(set(voxels)), float)


def naive_metrics(prediction, reference, spacing):
    common, total = (prediction & reference).sum(), prediction.sum() + reference.sum()
    one, other = (naive_surface(mask) * spacing for mask in (prediction, reference))
    distances = np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1))
    there, back = distances.min(1), distances.min(0)
    hd95, asd, assd = np.percentile(np.r_[there, back], 95), there.mean(), np.r_[there, back].mean()
    return 2 * common / total, common / (total - common), hd95, asd, assd


def masks(min_dims=2, max_dims=3):
    shapes = hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=2, max_side=6)
    return shapes.flatmap(
        lambda shape: st.tuples(*[hnp.arrays(bool, shape, elements=st.booleans()).filter(np.any) for _ in range(2)])
    )


spacings = st.lists(st.floats(0.3, 4.0), min_size=3, max_size=3)


@settings(max_examples=80)
@given(masks(), spacings)
def test_equals_the_naive_reference(pair, spacing):
    prediction, reference = pair
    spacing = spacing[: prediction.ndim]
    result = structure_metrics(prediction, reference, spacing)
    expected = naive_metrics(prediction, reference, spacing)
    expected += naive_metrics(prediction, reference, [1.0] * prediction.ndim)[2:]
    np.testing.assert_allclose(dataclasses.astuple(result), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=60)
@given(masks(), spacings)
def test_equals_medpy(pair, spacing):
    prediction, reference = pair
    spacing = spacing[: prediction.ndim]
    expected = [medpy.dc(prediction, reference), medpy.jc(prediction, reference)]
    for step in (spacing, None):
        expected += [metric(prediction, reference, step) for metric in (medpy.hd95, medpy.asd, medpy.assd)]
    result = structure_metrics(prediction, reference, spacing)
    np.testing.assert_allclose(dataclasses.astuple(result), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(masks(min_dims=2, max_dims=2), st.integers(0, 2), spacings)
def test_structures_of_one_slice_equal_medpy(pair, axis, spacing):
    """Small structures in a large image: all of their voxels are surface."""
    prediction, reference = (np.pad(np.expand_dims(mask, axis), 3) for mask in pair)
    expected = [metric(prediction, reference, spacing) for metric in (medpy.hd95, medpy.asd, medpy.assd)]
    result = structure_metrics(prediction, reference, spacing)
    np.testing.assert_allclose((result.hd95, result.asd, result.assd), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(masks(), spacings)
def test_symmetry_identity_and_relation(pair, spacing):
    one, other = pair
    spacing = spacing[: one.ndim]
    forth, back = structure_metrics(one, other, spacing), structure_metrics(other, one, spacing)
    assert (forth.dice, forth.jaccard) == (back.dice, back.jaccard)
    assert forth.hd95 == pytest.approx(back.hd95, abs=1e-12)
    assert forth.jaccard == pytest.approx(forth.dice / (2 - forth.dice))
    same = structure_metrics(one, one, spacing)
    assert same == CaseMetrics(1, 1, 0, 0, 0, 0, 0, 0)
    assert forth.assd == pytest.approx(back.assd, abs=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, 3])
def test_shifted_slabs_are_as_far_apart_as_they_were_shifted(axis, shift):
    # One voxel thick, so that every voxel is surface and every distance is the shift.
    spacing = (3.0, 0.5, 1.25)
    one, other = np.zeros((12, 12, 12), bool), np.zeros((12, 12, 12), bool)
    one.swapaxes(0, axis)[2] = True
    other.swapaxes(0, axis)[2 + shift] = True
    result = structure_metrics(one, other, spacing)
    assert result.dice == 0
    assert result.hd95 == pytest.approx(shift * spacing[axis])
    assert result.hd95_voxels == pytest.approx(shift)
    assert result.asd == pytest.approx(shift * spacing[axis])


def test_shifted_cube_by_hand():
    one, other = np.zeros((12, 12, 12), bool), np.zeros((12, 12, 12), bool)
    one[2:8, 2:8, 2:8] = True
    other[2:8, 2:8, 4:10] = True
    result = structure_metrics(one, other, (1.0, 1.0, 2.0))
    assert result.dice == pytest.approx(2 * 6 * 6 * 4 / (2 * 216))
    assert result.jaccard == pytest.approx(144 / 288)
    # 36 of 152 surface voxels of either cube, those of the far face, are two voxels off: more than 5 percent.
    assert result.hd95 == pytest.approx(4.0)
    assert result.hd95_voxels == pytest.approx(2.0)


def test_pools_both_directions():
    # 4 far voxels of 54 are more than 5 percent of one direction, and less than 5 percent of both: HD95 is 0.
    line, with_far_voxels = np.zeros((50, 60), bool), np.zeros((50, 60), bool)
    line[:, 0] = with_far_voxels[:, 0] = True
    with_far_voxels[:8:2, 40] = True
    assert structure_metrics(with_far_voxels, line, (1.0, 1.0)).hd95 == 0
    assert structure_metrics(with_far_voxels, line, (1.0, 1.0)).asd == pytest.approx(4 * 40 / 54)
    assert structure_metrics(line, with_far_voxels, (1.0, 1.0)).asd == 0


def test_a_flat_case_has_an_outline():
    flat = np.zeros((1, 9, 9), bool)
    flat[0, 1:8, 1:8] = True
    shrunk = np.zeros((1, 9, 9), bool)
    shrunk[0, 2:7, 2:7] = True
    result = structure_metrics(shrunk, flat, (7.0, 1.0, 1.0))
    assert result == structure_metrics(shrunk[0], flat[0], (1.0, 1.0))
    assert result.asd == pytest.approx(1.0)


def test_empty_masks():
    empty, full = np.zeros((3, 3), bool), np.ones((3, 3), bool)
    both = structure_metrics(empty, empty, (1, 1))
    assert all(math.isnan(getattr(both, metric)) for metric in METRICS)
    for one, other in ((empty, full), (full, empty)):
        result = structure_metrics(one, other, (1, 1))
        assert (result.dice, result.jaccard) == (0, 0)
        assert all(math.isnan(getattr(result, metric)) for metric in METRICS if metric not in ("dice", "jaccard"))


def test_single_voxel():
    mask = np.ones((1, 1, 1), bool)
    assert structure_metrics(mask, mask, (1, 1, 1)).hd95 == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes"):
        structure_metrics(np.ones((2, 2), bool), np.ones((2, 3), bool), (1, 1))
    with pytest.raises(ValueError, match="spacing"):
        structure_metrics(np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 1, 1))


def test_labels_regions_and_ignored_voxels():
    reference = np.array([[0, 1, 2, 2, 9]])
    prediction = np.array([[0, 1, 1, 2, 1]])
    result = evaluate_case(prediction, reference, {"one": 1, "both": [1, 2]}, (1, 1), ignore_label=9)
    assert result["one"].dice == pytest.approx(2 / 3)
    assert result["both"].dice == 1
    counted = evaluate_case(prediction, reference, {"one": 1}, (1, 1))
    assert counted["one"].dice == pytest.approx(2 / 4)
