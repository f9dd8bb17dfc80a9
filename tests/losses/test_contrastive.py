"""InfoNCE against the equation, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from nnunet_ssl.losses.contrastive import info_nce


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@given(st.integers(0, 999), st.sampled_from([(7, 3), (2, 5, 4)]), st.floats(0.1, 3))
@settings(max_examples=30)
def test_it_is_the_equation(seed, shape, temperature):
    q, k = unit(*shape, seed=seed), unit(*shape, seed=seed + 1)
    expected = []
    for queries, keys in zip(q.reshape(-1, *shape[-2:]).double(), k.reshape(-1, *shape[-2:]).double(), strict=True):
        for i, query in enumerate(queries.numpy()):
            similarities = np.exp(keys.numpy() @ query / temperature)
            expected.append(-np.log(similarities[i] / similarities.sum()))
    assert info_nce(q, k, temperature=temperature).item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_equal_similarities_give_the_logarithm_of_their_number():
    q = unit(1, 8).expand(20, 8)
    assert info_nce(q, q, temperature=0.5).item() == pytest.approx(np.log(20), rel=1e-5)


def test_it_is_lowest_where_each_position_meets_its_own():
    q = torch.eye(6)
    assert info_nce(q, q, temperature=0.05) < 1e-6 < info_nce(q, q.roll(1, 0), temperature=0.05)


def test_half_precision_is_computed_in_single():
    q, k = unit(50, 16).half(), unit(50, 16, seed=1).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(q, k, temperature=0.01)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(q.float(), k.float(), temperature=0.01))
