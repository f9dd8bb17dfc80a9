"""Every equation against a naive float64 transcription, and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ssl.losses.dice import masked_dice_loss
from nnunet_ssl.losses.probabilities import entropy, foreground_probabilities, probabilities
from nnunet_ssl.losses.pseudo_labels import coverage, members, pseudo_label
from nnunet_ssl.losses.ramps import gaussian_ramp_up

SHAPES = [(2, 3, 5, 7), (2, 3, 4, 5, 6), (1, 1, 3, 3, 3)]


def naive_dice(p: np.ndarray, y: np.ndarray, m: np.ndarray, epsilon: float = 1e-5) -> float:
    """The equation of the paper, voxel by voxel."""
    losses = []
    for k in range(p.shape[1]):
        overlap = squares = labels = 0.0
        for b in range(p.shape[0]):
            for index in np.ndindex(*p.shape[2:]):
                mask = m[(b, min(k, m.shape[1] - 1), *index)]
                overlap += mask * p[(b, k, *index)] * y[(b, k, *index)]
                squares += mask * p[(b, k, *index)] ** 2
                labels += mask * y[(b, k, *index)] ** 2
        losses.append(1 - (2 * overlap + epsilon) / (squares + labels + epsilon))
    return float(np.mean(losses))


def random_case(shape: tuple[int, ...], seed: int, mask_channels: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(shape, generator=generator)
    y = torch.rand(shape, generator=generator) > 0.5
    m = torch.rand((shape[0], mask_channels, *shape[2:]), generator=generator) > 0.4
    return p, y, m


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_masked_dice_is_the_papers_equation(shape, per_channel):
    p, y, m = random_case(shape, 0, shape[1] if per_channel else 1)
    expected = naive_dice(p.double().numpy(), y.double().numpy(), m.double().numpy())
    assert masked_dice_loss(p, y, m).item() == pytest.approx(expected, abs=1e-6)


def test_masked_dice_by_hand():
    # One voxel right at 0.5, one wrong at 1.0, one masked out: 1 - 2*0.5 / (0.25 + 1 + 1).
    p = torch.tensor([0.5, 1.0, 0.9]).view(1, 1, 3)
    y = torch.tensor([True, False, True]).view(1, 1, 3)
    m = torch.tensor([True, True, False]).view(1, 1, 3)
    assert masked_dice_loss(p, y, m).item() == pytest.approx(1 - 1.0 / 2.25, abs=1e-4)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(SHAPES))
def test_masked_dice_properties(seed, shape):
    p, y, m = random_case(shape, seed, 1)
    loss = masked_dice_loss(p, y, m)
    assert 0 <= loss.item() <= 1
    # What is masked out does not matter.
    other = torch.where(m, p, torch.rand_like(p))
    assert masked_dice_loss(other, torch.where(m, y, ~y), m).item() == pytest.approx(loss.item(), abs=1e-6)
    # The order of the samples does not matter: sums run over the batch.
    assert masked_dice_loss(p.flip(0), y.flip(0), m.flip(0)).item() == pytest.approx(loss.item(), abs=1e-6)
    # A perfect prediction costs nothing.
    assert masked_dice_loss(y.float(), y, m).item() == pytest.approx(0, abs=1e-6)


def test_masked_dice_all_masked_is_zero_without_gradient():
    p = torch.rand(2, 3, 4, 4, requires_grad=True)
    loss = masked_dice_loss(p, torch.ones(2, 3, 4, 4, dtype=torch.bool), torch.zeros(2, 1, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and p.grad.abs().max() == 0


def test_masked_dice_empty_label_is_finite_and_pulls_down():
    p = torch.full((1, 1, 8), 0.3, requires_grad=True)
    loss = masked_dice_loss(p, torch.zeros(1, 1, 8, dtype=torch.bool), torch.ones(1, 1, 8, dtype=torch.bool))
    loss.backward()
    assert 0.99 < loss.item() <= 1 and (p.grad > 0).all()


def test_masked_dice_gradient():
    _, y, m = random_case((2, 2, 3, 4), 1, 1)
    z = torch.randn(2, 3, 3, 4, dtype=torch.double, requires_grad=True)

    def loss(z):
        p = torch.softmax(z, 1)[:, 1:]
        masked = y & m
        size = (p.square() * m).sum((0, 2, 3)) + masked.sum((0, 2, 3))
        return torch.mean(1 - (2 * (p * masked).sum((0, 2, 3)) + 1e-5) / (size + 1e-5))

    (expected,) = torch.autograd.grad(loss(z), z)
    actual = masked_dice_loss(foreground_probabilities(z, regions=False), y, m)
    (gradient,) = torch.autograd.grad(actual, z)
    assert torch.autograd.gradcheck(loss, z)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_masked_dice_does_not_overflow_in_half_precision():
    p = torch.ones(1, 1, 100_000, dtype=torch.float16)
    y = torch.ones(1, 1, 100_000, dtype=torch.bool)
    assert masked_dice_loss(p, y, y).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 3, 4, 5, 6)])
def test_pseudo_label_of_classes(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    label = pseudo_label(logits, regions=False)
    z = logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_array_equal(label.target[:, 0].numpy(), p.argmax(1))
    np.testing.assert_allclose(label.confidence[:, 0].numpy(), p.max(1), rtol=1e-5)
    assert label.target.dtype == torch.uint8
    of_each = members(label.target, shape[1] - 1)
    assert of_each.shape == (shape[0], shape[1] - 1, *shape[2:]) and of_each.dtype == torch.bool
    for k in range(1, shape[1]):
        np.testing.assert_array_equal(of_each[:, k - 1].numpy(), p.argmax(1) == k)


def test_a_pseudo_label_of_many_classes_is_one_channel():
    winner = torch.tensor([0, 1, 255, 256, 299])
    label = pseudo_label(torch.nn.functional.one_hot(winner, 300).float().t()[None] * 9, regions=False)
    assert torch.equal(label.target.long(), winner[None, None])
    assert torch.equal(members(label.target, 299)[0], winner[None] == torch.arange(1, 300)[:, None])


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_dice_of_classes_is_that_of_their_channels(shape):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape[0], shape[1] + 1, *shape[2:], generator=generator, requires_grad=True)
    target = torch.randint(0, shape[1] + 1, (shape[0], 1, *shape[2:]), generator=generator).to(torch.uint8)
    mask = torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.4
    results = []
    for given_target in (target, members(target, shape[1])):
        loss = masked_dice_loss(foreground_probabilities(logits, regions=False), given_target, mask)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_pseudo_label_of_regions():
    logits = torch.randn(2, 3, 4, 5) * 3
    label = pseudo_label(logits, regions=True)
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    np.testing.assert_array_equal(label.target.numpy(), p > 0.5)
    np.testing.assert_allclose(label.confidence.numpy(), np.maximum(p, 1 - p), rtol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_pseudo_label_has_no_gradient(regions):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    label = pseudo_label(logits, regions=regions)
    assert not label.target.requires_grad and not label.confidence.requires_grad


@pytest.mark.parametrize("of_logits", [probabilities, entropy, pseudo_label])
def test_logits_of_several_resolutions_are_refused(of_logits):
    with pytest.raises(TypeError, match=r"Take output\.full_resolution"):
        of_logits([torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)], regions=False)


def test_coverage_by_hand():
    # Probabilities of class 1: 0.9 (confident), 0.6 (not), 0.05 (confident background), 0.4 (not).
    p = torch.tensor([0.9, 0.6, 0.05, 0.4])
    logits = torch.stack((torch.zeros(4), torch.logit(p)))[None]
    count, total = coverage(pseudo_label(logits, regions=False), 0.85, structures=1)
    assert count.tolist() == [2, 1] and total.tolist() == [4, 2]


def test_coverage_of_regions_counts_channels():
    logits = torch.logit(torch.tensor([[[0.9, 0.6], [0.05, 0.4]]]))
    count, total = coverage(pseudo_label(logits, regions=True), 0.85, structures=2)
    assert count.tolist() == [2, 1, 0] and total.tolist() == [4, 2, 0]


@pytest.mark.parametrize("progress, length, expected", [(0, 0.3, math.exp(-5)), (0.3, 0.3, 1), (1, 0.3, 1), (0, 0, 1)])
def test_ramp_ends(progress, length, expected):
    assert gaussian_ramp_up(progress, length=length) == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_ramp_rises_within_bounds(a, b, length):
    low, high = sorted((a, b))
    first, second = (gaussian_ramp_up(t, length=length) for t in (low, high))
    assert math.exp(-5) * 0.999 <= first <= second <= 1
    t = np.clip(low / length, 0, 1)
    assert first == pytest.approx(np.exp(-5 * (1 - t) ** 2))
