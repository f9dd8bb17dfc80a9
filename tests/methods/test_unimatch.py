"""UniMatch: its loss against a naive transcription of the paper, FixMatch and FreeMatch as settings, its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_steps import Given, images_of, make_batches, make_trainer, summed_terms

from nnunet_ssl.methods.unimatch import UniMatchTrainer
from nnunet_ssl.networks.streams import Stream, StreamOutput


@pytest.fixture
def make(monkeypatch, tmp_path):
    def factory(planned, **options) -> UniMatchTrainer:
        settings = {"cutmix_probability": 1.0, "confidence_threshold": 0.7, **options}
        return make_trainer(UniMatchTrainer, planned, monkeypatch, tmp_path, **settings)

    return factory


def random_logits(trainer, labeled, unlabeled) -> dict:
    generator = torch.Generator().manual_seed(5)
    channels, spatial = trainer.label_manager.num_segmentation_heads, unlabeled.weak.shape[2:]
    names = [name for name in trainer.streams() if name != "x"]
    logits = {name: torch.randn(len(unlabeled.weak), channels, *spatial, generator=generator) * 4 for name in names}
    return logits | {"x": [torch.randn(2, channels, *t.shape[2:], generator=generator) for t in labeled.target]}


def given(logits: dict) -> Given:
    return Given({name: StreamOutput(value) for name, value in logits.items()})


def probabilities(z: np.ndarray, regions: bool) -> np.ndarray:
    if regions:
        return 1 / (1 + np.exp(-z))
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def naive_label(z: np.ndarray, regions: bool) -> tuple[np.ndarray, np.ndarray]:
    """ŷ and c of logits (U, C, *spatial), both with a channel for each class or region."""
    p = probabilities(z, regions)
    if regions:
        return (p > 0.5).astype(float), np.maximum(p, 1 - p)
    one_hot = np.stack([p.argmax(1) == k for k in range(p.shape[1])], 1).astype(float)
    return one_hot, np.repeat(p.max(1, keepdims=True), p.shape[1], 1)


def naive_unimatch(logits: dict, boxes, partner, confident: np.ndarray, regions: bool) -> dict[str, float]:
    """The paper's terms, in float64, one sample and one box at a time; ``confident`` like ŷ."""
    z = {name: value.double().numpy() for name, value in logits.items() if name != "x"}
    target, _ = naive_label(z["u"], regions)

    def mix(array, box):
        mixed = array.copy()
        for sample, extent in enumerate(box.numpy()):
            inside = (slice(None), *(slice(low, high) for low, high in extent))
            mixed[sample][inside] = array[partner[sample]][inside]
        return mixed

    def dice(name, y, m):
        p = probabilities(z[name], regions)
        losses = []
        for k in range(0 if regions else 1, p.shape[1]):
            numerator = 2 * (m[:, k] * p[:, k] * y[:, k]).sum() + 1e-5
            denominator = (m[:, k] * p[:, k] ** 2).sum() + (m[:, k] * y[:, k] ** 2).sum() + 1e-5
            losses.append(1 - numerator / denominator)
        return float(np.mean(losses))

    strong = [dice(f"s{n}", mix(target, box), mix(confident, box)) for n, box in enumerate(boxes, 1)]
    terms = {"strong": sum(strong) / len(strong)}
    return terms | ({"features": dice("u_dropped", target, confident)} if "u_dropped" in z else {})


@pytest.mark.parametrize("fixmatch", [{}, {"strong_views": 1, "feature_weight": 0.0}], ids=["UniMatch", "FixMatch"])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dim", ["planned_2d", "planned_3d"])
def test_terms_are_the_papers(make, dim, regions, fixmatch, request):
    trainer = make(request.getfixturevalue(dim), regions=regions, **fixmatch)
    labeled, unlabeled, _ = make_batches(trainer)
    logits = random_logits(trainer, labeled, unlabeled)
    _, confidence = naive_label(logits["u"].double().numpy(), regions)
    assert 0.1 < (confidence >= 0.7).mean() < 0.9
    terms = summed_terms(trainer, given(logits), labeled, unlabeled)
    expected = naive_unimatch(logits, unlabeled.boxes, unlabeled.partner.tolist(), confidence >= 0.7, regions)
    assert set(terms) == {"supervised", *expected} == set(trainer.loss_weights(0.0))
    assert set(expected) == ({"strong"} if fixmatch else {"strong", "features"})
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, abs=1e-5), name
    torch.testing.assert_close(terms["supervised"], trainer.loss(logits["x"], labeled.target))


@pytest.mark.parametrize("regions", [False, True])
def test_the_adaptive_threshold_is_freematchs(make, planned_2d, regions):
    trainer = make(planned_2d, regions=regions, adaptive_threshold=True, confidence_threshold=1.0)
    labeled, unlabeled, _ = make_batches(trainer)
    logits = random_logits(trainer, labeled, unlabeled)
    adaptive, frequency = (
        trainer.training_network.training_only["threshold"],
        [[0.2, 0.8], [0.6, 0.4]] if regions else [[0.9, 0.6, 0.3]],
    )
    adaptive.confidence.fill_(0.8)
    adaptive.frequency.copy_(torch.tensor(frequency))
    terms = summed_terms(trainer, given(logits), labeled, unlabeled)

    target, confidence = naive_label(logits["u"].double().numpy(), regions)
    if regions:
        threshold = np.where(target[:, :1] > 0, 0.8, 0.8 * 0.2 / 0.8), np.where(target[:, 1:] > 0, 0.8 * 0.4 / 0.6, 0.8)
        threshold = np.concatenate(threshold, 1)
    else:
        threshold = (target * 0.8 * np.reshape([1, 0.6 / 0.9, 0.3 / 0.9], (1, 3, 1, 1))).sum(1, keepdims=True)
    confident = confidence >= threshold
    assert 0.1 < confident.mean() < 1
    expected = naive_unimatch(logits, unlabeled.boxes, unlabeled.partner.tolist(), confident, regions)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("regions", [False, True])
def test_the_averages_follow_the_predictions(make, planned_2d, regions):
    trainer = make(planned_2d, regions=regions, adaptive_threshold=True, threshold_decay=0.9)
    adaptive = trainer.training_network.training_only["threshold"]
    averages = adaptive.confidence.double().numpy().copy(), adaptive.frequency.double().numpy().copy()
    assert np.allclose(averages[0], 1 / 2 if regions else 1 / 3) and np.allclose(averages[1], averages[0])
    _, unlabeled, batch = make_batches(trainer)
    for _ in range(3):
        z = trainer.without_gradient(unlabeled.weak, Stream("u", gradient=False)).logits.double().numpy()
        p, (_, confidence) = probabilities(z, regions), naive_label(z, regions)
        means = np.array([p[:, k].mean() for k in range(p.shape[1])])
        means = np.stack([1 - means, means], 1) if regions else means[None]
        averages = 0.9 * averages[0] + 0.1 * confidence.mean(), 0.9 * averages[1] + 0.1 * means
        trainer.train_step(batch)
    np.testing.assert_allclose(adaptive.confidence.numpy(), averages[0], rtol=1e-5)
    np.testing.assert_allclose(adaptive.frequency.numpy(), averages[1], rtol=1e-5)
    kept = trainer.training_network.training_state()
    assert {f"training_only.threshold.{name}" for name in ("confidence", "frequency")} <= set(kept)


def test_strong_images_are_mixed_as_their_labels(make, planned_3d):
    trainer = make(planned_3d)
    labeled, unlabeled, _ = make_batches(trainer)
    images = images_of(trainer, labeled, unlabeled)
    for name, view, boxes in zip(("s1", "s2"), unlabeled.strong, unlabeled.boxes, strict=True):
        for sample, extent in enumerate(boxes):
            expected = view[sample].clone()
            inside = (slice(None), *(slice(int(low), int(high)) for low, high in extent))
            expected[inside] = view[unlabeled.partner[sample]][inside]
            assert torch.equal(images[name][sample], expected)
    assert torch.equal(images["u"], unlabeled.weak) and torch.equal(images["x"], labeled.image)


def test_pseudo_labels_carry_no_gradient(make, planned_2d):
    trainer = make(planned_2d)
    labeled, unlabeled, _ = make_batches(trainer)
    logits = random_logits(trainer, labeled, unlabeled)
    leaves = {name: value[0] if isinstance(value, list) else value for name, value in logits.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    terms = summed_terms(trainer, given(logits), labeled, unlabeled)

    def reached(term: str) -> set[str]:
        found = torch.autograd.grad(terms[term], list(leaves.values()), retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(leaves, found, strict=True) if gradient is not None and gradient.any()}

    assert reached("supervised") == {"x"}
    assert reached("strong") == {"s1", "s2"}
    assert reached("features") == {"u_dropped"}


def test_streams_and_weights_are_the_papers(make, planned_2d):
    trainer = make(planned_2d)
    assert trainer.streams() == {
        "x": Stream("x", deep_supervision=True),
        "u": Stream("u", gradient=False),
        "u_dropped": Stream("u", dropout=0.5),
        "s1": Stream("s1"),
        "s2": Stream("s2"),
    }
    # The authors' 1/2 L_sup + 1/8 D(s1) + 1/8 D(s2) + 1/4 D(u dropped), times 2; strong is the mean of two.
    assert trainer.loss_weights(0.3) == {"supervised": 1.0, "strong": 0.5, "features": 0.5}
    assert trainer.loss_weights(0.0)["strong"] == pytest.approx(0.5 * np.exp(-5))
    assert "threshold" not in trainer.training_network.training_only
    fixmatch = make(planned_2d, strong_views=1, feature_weight=0.0)
    assert set(fixmatch.streams()) == {"x", "u", "s1"}
    assert fixmatch.loss_weights(0.3) == {"supervised": 1.0, "strong": 1.0}
