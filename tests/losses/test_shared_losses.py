"""What losses of several methods are made of, against plain NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ssl.api import (
    consistency_mse,
    dice_and_cross_entropy,
    entropy,
    entropy_of_probabilities,
    gaussian_ramp_up,
    largest_components,
    masked_cross_entropy,
    sharpen,
)

REGIONS = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
SHAPES = pytest.mark.parametrize("shape", [(2, 3, 7, 5), (2, 3, 4, 5, 6)], ids=["2d", "3d"])


def drawn(shape: tuple[int, ...], regions: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, C, *spatial), a label of classes or regions, and a mask (B, 1, *spatial)."""
    rng = np.random.default_rng(seed)
    single = (shape[0], 1, *shape[2:])
    logits = torch.from_numpy(rng.normal(scale=3, size=shape)).float()
    label = torch.from_numpy(rng.random(shape) > 0.4 if regions else rng.integers(0, shape[1], single))
    return logits, label, torch.from_numpy(rng.random(single) > 0.3)


def p_of(logits: Tensor, regions: bool) -> np.ndarray:
    z = logits.double().numpy()
    if regions:
        return 1 / (1 + np.exp(-z))
    powers = np.exp(z - z.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def channels_of(label: Tensor, channels: int) -> np.ndarray:
    found = label.numpy()
    return found if found.dtype == bool else np.concatenate([found == k for k in range(channels)], 1)


@SHAPES
@REGIONS
def test_entropy(shape, regions) -> None:
    logits, _, _ = drawn(shape, regions)
    p = p_of(logits, regions)
    expected = -(p * np.log(p) + (1 - p) * np.log(1 - p)) if regions else -(p * np.log(p)).sum(1, keepdims=True)
    np.testing.assert_allclose(entropy(logits, regions=regions), expected, rtol=1e-4, atol=1e-6)
    found = entropy_of_probabilities(torch.from_numpy(p), regions=regions)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@SHAPES
@REGIONS
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_sharpen(shape, regions, temperature) -> None:
    logits, _, _ = drawn(shape, regions)
    p = p_of(logits, regions)
    powers, others = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    expected = powers / (powers + others) if regions else powers / powers.sum(1, keepdims=True)
    np.testing.assert_allclose(
        sharpen(logits, temperature=temperature, regions=regions), expected, rtol=1e-3, atol=1e-6
    )


@given(scale=st.floats(0.1, 1000), temperature=st.floats(0.01, 1.0), regions=st.booleans())
@settings(max_examples=30)
def test_sharpened_probabilities_are_such_and_keep_their_order(scale, temperature, regions) -> None:
    logits = drawn((1, 3, 4, 4), regions)[0] * scale
    found = sharpen(logits, temperature=temperature, regions=regions)
    assert torch.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()
    if not regions:
        torch.testing.assert_close(found.sum(1), torch.ones(1, 4, 4))
        assert torch.equal(found.max(1).values, found.gather(1, logits.argmax(1, keepdim=True))[:, 0])


@SHAPES
@REGIONS
def test_consistency_mse(shape, regions) -> None:
    student, _, mask = drawn(shape, regions)
    teacher, _, _ = drawn(shape, regions, seed=1)
    student.requires_grad_()
    squared = (student.detach().double().numpy() - teacher.double().numpy()) ** 2
    assert consistency_mse(student, teacher).item() == pytest.approx(squared.mean(), rel=1e-5)
    m = np.broadcast_to(mask.numpy(), squared.shape)
    loss = consistency_mse(student, teacher, mask)
    assert loss.item() == pytest.approx((squared * m).sum() / m.sum(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = 2 * m * (student.detach().double().numpy() - teacher.double().numpy()) / m.sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-9)
    assert consistency_mse(student, teacher, torch.zeros_like(mask)).item() == 0
    assert not consistency_mse(teacher, student).requires_grad, "no gradient reaches the teacher"


def cross_entropy_of(logits: Tensor, label: Tensor, mask: np.ndarray, regions: bool) -> float:
    p, y = p_of(logits, regions), channels_of(label, logits.shape[1])
    if regions:
        loss = -np.where(y, np.log(p), np.log(1 - p))
        m = np.broadcast_to(mask, loss.shape)
    else:
        loss, m = -(y * np.log(p)).sum(1, keepdims=True), mask
    return float((loss * m).sum() / m.sum())


@SHAPES
@REGIONS
def test_masked_cross_entropy(shape, regions) -> None:
    logits, label, mask = drawn(shape, regions)
    expected = cross_entropy_of(logits, label, mask.numpy(), regions)
    assert masked_cross_entropy(logits, label, mask).item() == pytest.approx(expected, rel=1e-5)
    everywhere = np.ones_like(mask.numpy())
    expected = cross_entropy_of(logits, label, everywhere, regions)
    assert masked_cross_entropy(logits, label).item() == pytest.approx(expected, rel=1e-5)
    assert masked_cross_entropy(logits, label, torch.zeros_like(mask)).item() == 0


@SHAPES
@REGIONS
def test_dice_and_cross_entropy(shape, regions) -> None:
    logits, label, mask = drawn(shape, regions)
    p, y, m = p_of(logits, regions), channels_of(label, shape[1]), mask.numpy()
    dice = []
    for k in range(0 if regions else 1, shape[1]):
        pk, yk, mk = p[:, k], y[:, k], m[:, 0]
        dice.append(1 - (2 * (mk * pk * yk).sum() + 1e-5) / ((mk * pk**2).sum() + (mk * yk).sum() + 1e-5))
    expected = (np.mean(dice) + cross_entropy_of(logits, label, m, regions)) / 2
    assert dice_and_cross_entropy(logits, label, mask).item() == pytest.approx(expected, rel=1e-5)


def largest_of(label: np.ndarray) -> np.ndarray:
    """Of one patch of classes (*spatial), by scipy."""
    kept = np.zeros_like(label)
    for value in np.unique(label[label > 0]):
        components, count = ndimage.label(label == value, np.ones((3,) * label.ndim))
        sizes = [(components == number).sum() for number in range(1, count + 1)]
        kept[components == 1 + int(np.argmax(sizes))] = value
    return kept


@given(seed=st.integers(0, 2**31), dim=st.integers(2, 3), share=st.floats(0.05, 0.6))
@settings(max_examples=40)
def test_largest_components(seed, dim, share) -> None:
    rng = np.random.default_rng(seed)
    classes = rng.integers(1, 4, (2, 1, *[6] * dim)) * (rng.random((2, 1, *[6] * dim)) < share)
    found = largest_components(torch.from_numpy(classes)).numpy()
    # Of several components that are as large, any one may stay.
    for mine, given_, expected in zip(found[:, 0], classes[:, 0], map(largest_of, classes[:, 0]), strict=True):
        assert ((mine == 0) | (mine == given_)).all()
        for value in range(1, 4):
            assert (mine == value).sum() == (expected == value).sum()
            assert ndimage.label(mine == value, np.ones((3,) * dim))[1] == (value in given_)
    regions = rng.random((2, 2, *[6] * dim)) < share
    found = largest_components(torch.from_numpy(regions)).numpy()
    assert found.dtype == bool
    for mine, channel in zip(found.reshape(4, -1), regions.reshape(4, *[6] * dim), strict=True):
        assert mine.sum() == largest_of(channel.astype(int)).sum()


def test_largest_components_have_a_shape_without_content_and_keep_their_type() -> None:
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.bool):
        label = torch.zeros(1, 1, 4, 4, dtype=dtype)
        label[..., :2] = 1
        assert torch.equal(largest_components(label), label)
        assert torch.equal(label[..., :2], torch.ones(1, 1, 4, 2, dtype=dtype)), "the label stays as it is"
        with FakeTensorMode():
            empty = largest_components(torch.empty(2, 1, 5, 6, dtype=dtype))
        assert (empty.shape, empty.dtype) == ((2, 1, 5, 6), dtype)


@given(progress=st.floats(0, 1), start=st.floats(0, 0.9), length=st.floats(0, 1))
def test_a_ramp_that_starts_later(progress, start, length) -> None:
    found = gaussian_ramp_up(progress, length=length, start=start)
    if progress < start:
        assert found == 0
    elif length == 0:
        assert found == 1
    else:
        t = min((progress - start) / length, 1)
        assert found == pytest.approx(np.exp(-5 * (1 - t) ** 2))
