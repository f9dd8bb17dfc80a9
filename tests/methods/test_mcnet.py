"""MC-Net+: its loss against a naive transcription of the paper, its gradients, its decoders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_steps import Given, make_batches, summed_terms
from method_steps import make_trainer as make_method_trainer
from torch import nn

from nnunet_ssl.methods.mcnet import MCNetTrainer, mutual_loss, soft_label
from nnunet_ssl.networks.streams import Stream, StreamOutput

KINDS = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])


def make_trainer(planned, monkeypatch, tmp_path, **options) -> MCNetTrainer:
    return make_method_trainer(MCNetTrainer, planned, monkeypatch, tmp_path, **options)


def random_outputs(trainer, labeled, unlabeled) -> Given:
    generator = torch.Generator().manual_seed(5)
    channels = trainer.label_manager.num_segmentation_heads
    outputs = Given()
    for name, stream in trainer.streams().items():
        n = {"x": 2, "u": len(unlabeled.weak)}[stream.image]
        sizes = [t.shape[2:] for t in labeled.target] if stream.deep_supervision else [unlabeled.weak.shape[2:]]
        logits = [(torch.randn(n, channels, *size, generator=generator) * 2).requires_grad_() for size in sizes]
        outputs[name] = StreamOutput(logits if stream.deep_supervision else logits[0])
    return outputs


def naive_mutual(logits: dict[str, np.ndarray], temperature: float, regions: bool) -> float:
    """Σ_i Σ_j≠i mean (p_i - s_j)² in float64, one voxel at a time; logits (N, C, *spatial) of each decoder."""

    def probabilities(z):
        return 1 / (1 + np.exp(-z)) if regions else np.exp(z) / np.exp(z).sum()

    def sharpened(p):
        return p ** (1 / temperature) / (p ** (1 / temperature) + (1 - p) ** (1 / temperature))

    total, count = 0.0, 0
    (n, channels, *spatial) = next(iter(logits.values())).shape
    for sample, *voxel in np.ndindex(n, *spatial):
        p = {name: probabilities(z[(sample, slice(None), *voxel)]) for name, z in logits.items()}
        total += sum(((p[i] - sharpened(p[j])) ** 2).sum() for i, j in itertools.permutations(p, 2))
        count += channels
    return total / count


def joined(outputs: Given, decoder: str) -> np.ndarray:
    """A decoder's logits on labeled and unlabeled images, in one batch."""
    return np.concatenate([outputs[f"{i}_{decoder}"].full_resolution.detach().double().numpy() for i in "xu"])


@KINDS
@pytest.mark.parametrize("options", [{}, {"decoders": 2, "temperature": 0.3}, {"label_gradient": True}], ids=str)
def test_terms_are_the_papers(regions, options, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, regions=regions, **options)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    assert set(terms) == set(trainer.loss_weights(0.0))
    names = "abc"[: options.get("decoders", 3)]
    for name in names:
        supervised = terms["supervised" if name == "a" else f"supervised_{name}"]
        torch.testing.assert_close(supervised, trainer.loss(outputs[f"x_{name}"].logits, labeled.target))
    expected = naive_mutual({name: joined(outputs, name) for name in names}, options.get("temperature", 0.1), regions)
    assert terms["mutual"].item() == pytest.approx(expected, rel=1e-4)


def test_terms_in_3d_are_the_papers(planned_3d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    expected = naive_mutual({name: joined(outputs, name) for name in "abc"}, 0.1, regions=False)
    assert terms["mutual"].item() == pytest.approx(expected, rel=1e-4)


def sharpened_of(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    p = logits.softmax(1)
    power, rest = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    return p, power / (power + rest)


@pytest.mark.parametrize("label_gradient", [False, True])
def test_gradients_are_those_of_the_whole_term_with_labels_fixed_or_not(
    label_gradient, planned_2d, monkeypatch, tmp_path
):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, label_gradient=label_gradient, temperature=0.5)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    leaves = {name: output.full_resolution for name, output in outputs.items()}
    mutual = summed_terms(trainer, outputs, labeled, unlabeled)["mutual"]
    found = dict(zip(leaves, torch.autograd.grad(mutual, list(leaves.values())), strict=True))

    # In float64, of both batches joined and all pairs at once.
    inputs = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    made = {i: sharpened_of(torch.cat([inputs[f"x_{i}"], inputs[f"u_{i}"]]), 0.5) for i in "abc"}
    loss = sum(
        (made[i][0] - (made[j][1] if label_gradient else made[j][1].detach())).square().mean()
        for i, j in itertools.permutations("abc", 2)
    )
    expected = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-3, atol=1e-9, msg=name)


def test_each_term_reaches_its_own_decoders(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    leaves = {name: output.full_resolution for name, output in outputs.items()}
    reached = {}
    for term, value in summed_terms(trainer, outputs, labeled, unlabeled).items():
        found = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        reached[term] = {n for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}
    assert reached == {
        "supervised": {"x_a"},
        "supervised_b": {"x_b"},
        "supervised_c": {"x_c"},
        "mutual": {f"{image}_{name}" for image in "xu" for name in "abc"},
    }


def test_nothing_is_learned_where_all_are_certain_and_agree():
    z = torch.tensor([[[20.0, -20.0], [-20.0, 20.0]]], requires_grad=True)
    for label_gradient in (False, True):
        loss = mutual_loss(z, [z.detach()] * 2, temperature=0.1, regions=False, label_gradient=label_gradient)
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.item() == pytest.approx(0, abs=1e-12) and gradient.abs().max() < 1e-12


@given(st.integers(0, 10_000), st.floats(0.1, 1000), st.floats(0.01, 1.0))
@settings(max_examples=30)
def test_soft_labels_are_between_0_and_1_and_keep_the_order(seed, scale, temperature):
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(2, 3, 4, 5, generator=generator) * scale).softmax(1).requires_grad_()
    found = soft_label(p, temperature)
    (gradient,) = torch.autograd.grad(found.sum(), p)
    assert torch.isfinite(found).all() and (found >= 0).all() and (found <= 1).all() and torch.isfinite(gradient).all()
    in_order = found.gather(1, p.argsort(1))
    # Equal ones may differ by rounding: a vector's last elements are computed in another way than the others.
    assert (in_order.diff(dim=1) >= -1e-6).all()
    # Nearer to 0 or 1 than the probability, but for rounding and the bound of its logit.
    assert ((found - 0.5).abs() >= (p - 0.5).abs() - 2e-6).all()


def test_a_temperature_of_1_sharpens_nothing():
    p = torch.rand(2, 3, 4)
    torch.testing.assert_close(soft_label(p, 1.0), p, rtol=0, atol=2e-6)


def test_weights_of_two_and_three_decoders(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    ramp = np.exp(-5 * (1 - 0.1 / 0.4) ** 2)
    assert trainer.loss_weights(0.1) == pytest.approx(
        {"supervised": 0.5, "supervised_b": 0.5, "supervised_c": 0.5, "mutual": ramp}
    )
    assert trainer.loss_weights(0.4)["mutual"] == 1
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, decoders=2, mutual_weight=0.6, supervised_weight=0.25)
    assert trainer.loss_weights(1.0) == {"supervised": 0.25, "supervised_b": 0.25, "mutual": 0.6}


def test_streams_and_decoders_are_the_papers(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    assert trainer.streams() == {
        "x_a": Stream("x", deep_supervision=True),
        "x_b": Stream("x", decoder="b", deep_supervision=True),
        "x_c": Stream("x", decoder="c", deep_supervision=True),
        "u_a": Stream("u"),
        "u_b": Stream("u", decoder="b"),
        "u_c": Stream("u", decoder="c"),
    }
    more = trainer.training_network.training_only
    assert set(more) == {"decoder_b", "decoder_c"}
    for name, mode in (("b", "bilinear"), ("c", "nearest")):
        assert {m.mode for m in more[f"decoder_{name}"].modules() if isinstance(m, nn.Upsample)} == {mode}
    two = make_trainer(planned_2d, monkeypatch, tmp_path, decoders=2)
    assert set(two.training_network.training_only) == {"decoder_b"} and len(two.streams()) == 4
