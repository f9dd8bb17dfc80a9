"""URPC: its loss against a naive transcription of the authors', its gradients, its pyramid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from method_steps import Given, make_batches, summed_terms
from method_steps import make_trainer as make_method_trainer
from torch import nn

from nnunet_ssl.errors import UserError
from nnunet_ssl.methods.urpc import URPCTrainer, pyramid_consistency, upsampled
from nnunet_ssl.networks.streams import Stream, StreamOutput

KINDS = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])


def make_trainer(planned, monkeypatch, tmp_path, **options) -> URPCTrainer:
    return make_method_trainer(URPCTrainer, planned, monkeypatch, tmp_path, **options)


def random_outputs(trainer, labeled, unlabeled) -> Given:
    """Of each stream logits of the full resolution and of the one below."""
    generator = torch.Generator().manual_seed(5)
    channels, full = trainer.label_manager.num_segmentation_heads, unlabeled.weak.shape[2:]
    outputs = Given()
    for name, n in (("x", 2), ("u", len(unlabeled.weak))):
        sizes = [full, [length // 2 for length in full]]
        logits = [(torch.randn(n, channels, *size, generator=generator) * 2).requires_grad_() for size in sizes]
        outputs[name] = StreamOutput(logits)
    return outputs


def naive_upsampled(z: np.ndarray, size) -> np.ndarray:
    """Linear interpolation, axis by axis, between the centers of voxels; beyond the outermost ones, their values."""
    for axis, length in enumerate(size, start=2):
        places = (np.arange(length) + 0.5) * z.shape[axis] / length - 0.5
        z = np.apply_along_axis(lambda row, places=places: np.interp(places, np.arange(len(row)), row), axis, z)
    return z


def naive_urpc(scales: list[np.ndarray], *, regions: bool) -> float:
    """L_u of logits (B, C, *spatial) of each scale in float64, voxel by voxel."""

    def distributions(z):
        """At a voxel: probabilities that add up to 1, of all classes, or of each region and its complement."""
        if regions:
            return [np.array([1 / (1 + np.exp(-one)), 1 / (1 + np.exp(one))]) for one in z]
        return [np.exp(z) / np.exp(z).sum()]

    loss = 0.0
    for scale in scales:
        errors, weights, uncertainties = [], [], []
        for sample, *voxel in np.ndindex(scale.shape[0], *scale.shape[2:]):
            at = (sample, slice(None), *voxel)
            all_scales = zip(*(distributions(other[at]) for other in scales), strict=True)
            for p, of_scales in zip(distributions(scale[at]), all_scales, strict=True):
                mean = np.mean(of_scales, 0)
                uncertainty = (mean * np.log(mean / p)).sum()
                errors.append(((p - mean) ** 2).mean() * np.exp(-uncertainty))
                weights.append(np.exp(-uncertainty))
                uncertainties.append(uncertainty)
        loss += np.mean(errors) / np.mean(weights) + np.mean(uncertainties)
    return loss / len(scales)


def arrays(tensors) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


@KINDS
@pytest.mark.parametrize("dim", ["planned_2d", "planned_3d"])
def test_terms_are_the_authors(regions, dim, request, monkeypatch, tmp_path):
    trainer = make_trainer(request.getfixturevalue(dim), monkeypatch, tmp_path, regions=regions)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    assert set(terms) == set(trainer.loss_weights(0.0))
    torch.testing.assert_close(terms["supervised"], trainer.loss(outputs["x"].logits, labeled.target))
    full, half = arrays(outputs["u"].logits)
    expected = naive_urpc([full, naive_upsampled(half, full.shape[2:])], regions=regions)
    assert terms["pyramid"].item() == pytest.approx(expected, rel=1e-4)


@KINDS
def test_a_pyramid_of_four_scales_is_the_authors(regions):
    generator = torch.Generator().manual_seed(5)
    logits = [torch.randn(2, 3, *size, generator=generator) * 3 for size in [(16, 8), (8, 8), (4, 4), (2, 4)]]
    found = upsampled(logits)
    full = [naive_upsampled(z, (16, 8)) for z in arrays(logits)]
    np.testing.assert_allclose(found, full, rtol=1e-5, atol=1e-5)
    assert pyramid_consistency(found, regions=regions).item() == pytest.approx(
        naive_urpc(full, regions=regions), rel=1e-4
    )


def test_gradients_are_those_of_the_whole_term_with_nothing_held_fixed():
    """Against the authors' operations, written out in float64."""
    logits = torch.randn(3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(5)).double().requires_grad_()
    p = logits.softmax(2)
    mean = p.mean(0)
    loss = 0.0
    for one in p:
        uncertainty = (mean * (mean.log() - one.log())).sum(1, keepdim=True)
        weight = (-uncertainty).exp()
        loss = loss + ((mean - one) ** 2 * weight).mean() / (weight.mean() + 1e-8) + uncertainty.mean()
    (expected,) = torch.autograd.grad(loss / 3, logits)
    z = logits.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(pyramid_consistency(z, regions=False), z)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-8)


def test_each_term_reaches_its_own_outputs(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    leaves = {f"{name} {level}": z for name, output in outputs.items() for level, z in enumerate(output.logits)}
    reached = {}
    for term, value in summed_terms(trainer, outputs, labeled, unlabeled).items():
        found = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        reached[term] = {n for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}
    # nnU-Net's loss leaves out the lowest resolution.
    assert reached == {"supervised": {"x 0"}, "pyramid": {"u 0", "u 1"}}


@pytest.mark.parametrize(
    ("resolutions", "scales", "expected"), [(2, 4, 2), (3, 4, 2), (4, 4, 3), (5, 4, 4), (7, 4, 4), (7, 2, 2), (7, 6, 6)]
)
def test_the_pyramid_is_what_deep_supervision_learns_from(
    resolutions, scales, expected, planned_2d, monkeypatch, tmp_path
):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, scales=scales)
    levels = [torch.full((1, 2, 64 // 2**level, 64 // 2**level), float(level)) for level in range(resolutions)]
    found = trainer._pyramid(levels)
    assert found.shape == (expected, 1, 2, 64, 64)
    assert found[:, 0, 0, 0, 0].tolist() == list(range(expected))


def test_without_deep_supervision_every_scale_has_the_supervised_loss(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    trainer.enable_deep_supervision = False
    trainer.was_initialized = False
    trainer.initialize()
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    full, half = outputs["x"].logits
    supervised = summed_terms(trainer, outputs, labeled, unlabeled)["supervised"]
    expected = (trainer.loss(full, labeled.target) + trainer.loss(upsampled([full, half])[1], labeled.target)) / 2
    torch.testing.assert_close(supervised, expected)
    assert trainer.streams()["u"] == Stream("u", deep_supervision=True)


def test_a_network_of_one_resolution_is_refused_by_name(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    network = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, 3, 1)
    with pytest.raises(UserError, match=r"^URPCTrainer needs a network that .* configuration tiny .*n_stages"):
        trainer.build_training_network(network)


@KINDS
def test_scales_that_agree_have_no_loss_and_no_gradient(regions):
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(5))
    logits = torch.stack([z] * 3).requires_grad_()
    loss = pyramid_consistency(logits, regions=regions)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(0, abs=1e-6) and gradient.abs().max() < 1e-6


@given(st.integers(0, 10_000), st.floats(0.1, 1000), st.booleans())
@settings(max_examples=30)
def test_however_certain_the_scales_the_loss_is_finite_and_not_negative(seed, scale, regions):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, 2, 3, 4, 5, generator=generator) * scale).requires_grad_()
    loss = pyramid_consistency(logits, regions=regions)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss) and loss >= -1e-6 and torch.isfinite(gradient).all()


def test_streams_and_weights_are_the_papers(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    assert trainer.streams() == {"x": Stream("x", deep_supervision=True), "u": Stream("u", deep_supervision=True)}
    assert trainer.loss_weights(0.2) == pytest.approx({"supervised": 1.0, "pyramid": 0.1 * np.exp(-5 * 0.8**2)})
    assert trainer.loss_weights(1.0) == {"supervised": 1.0, "pyramid": 0.1}
