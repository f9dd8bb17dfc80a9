"""The warning of collapsed pseudo-labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_ssl.evaluation.class_shares import collapse_warning, collapsed, mean_share

LABELED = [[0.1, 0.01]] * 8


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ([[0.1, 0.01]] * 5, [False, False]),
        ([[0.1, 0.0019]] * 5, [False, True]),
        ([[0.1, 0.0021]] * 5, [False, False]),
        ([[0.51, 0.01]] * 5, [True, False]),
        ([[0.0, 0.0]] * 5, [True, True]),
        ([[0.0, 0.0]] * 4 + [[0.1, 0.01]], [False, False]),
        ([[0.1, 0.01]] + [[0.0, 0.0]] * 4, [False, False]),
        # Too rare, then too frequent: outside all the time.
        ([[0.1, 0.0]] * 3 + [[0.1, 0.2]] * 2, [False, True]),
    ],
)
def test_five_epochs_outside_of_the_band(last, expected):
    assert collapsed([[0.1, 0.01]] * 3 + last, LABELED) == expected


def test_nothing_is_said_of_a_class_without_labels_or_of_few_epochs():
    assert collapsed([[0.5, 0.5]] * 8, [[0.0, np.nan]] * 8) == [False, False]
    assert collapsed([[0.0, 0.0]] * 4, LABELED[:4]) == [False, False]


def test_the_labeled_share_is_the_mean_of_the_epochs_that_have_one():
    shares = [[0.1, np.nan], [np.nan, np.nan], [0.3, np.nan]]
    np.testing.assert_allclose(mean_share(shares), [0.2, 0.0])
    assert collapsed([[0.03, 0.0]] * 5, shares) == [True, False]
    assert "predicted in 3.000% of the unlabeled voxels, but is in 20.000%" in collapse_warning(0, [[0.03, 0]], shares)


@given(
    shares=st.lists(st.floats(0, 1), min_size=5, max_size=12),
    reference=st.floats(0, 1),
    factor=st.floats(1.5, 10),
    epochs=st.integers(1, 5),
)
def test_against_a_loop(shares, reference, factor, epochs):
    outside = [reference > 0 and (one < reference / factor or one > reference * factor) for one in shares]
    found = collapsed([[one] for one in shares], [[reference]], factor=factor, epochs=epochs)
    assert found == [all(outside[-epochs:])]
