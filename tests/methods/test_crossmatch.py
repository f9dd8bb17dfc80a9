"""CrossMatch: its loss against a naive transcription of the paper, its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_steps import Given, images_of, make_batches, summed_terms
from method_steps import make_trainer as make_method_trainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.networks.streams import Stream, StreamOutput


def make_trainer(planned, monkeypatch, tmp_path, regions=False, **settings) -> CrossMatchTrainer:
    return make_method_trainer(CrossMatchTrainer, planned, monkeypatch, tmp_path, regions=regions, **settings)


def given(logits: dict) -> Given:
    return Given({name: StreamOutput(value) for name, value in logits.items()})


def random_logits(trainer, labeled, unlabeled) -> dict:
    generator = torch.Generator().manual_seed(5)
    channels = trainer.label_manager.num_segmentation_heads
    spatial = unlabeled.weak.shape[2:]
    logits = {
        name: torch.randn(len(unlabeled.weak), channels, *spatial, generator=generator) * 4
        for name in trainer.streams()
        if name != "x_dn"
    }
    logits["x_dn"] = [torch.randn(2, channels, *t.shape[2:], generator=generator) for t in labeled.target]
    return logits


def naive_crossmatch(logits: dict, boxes, partner, threshold: float, regions: bool) -> dict[str, float]:
    """The paper's equations, in float64, one sample and one box at a time."""
    z = {name: value.double().numpy() for name, value in logits.items() if name != "x_dn"}

    def probabilities(a):
        if regions:
            return 1 / (1 + np.exp(-a))
        e = np.exp(a - a.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def label(name):
        p = probabilities(z[name])
        if regions:
            return (p > 0.5).astype(float), np.maximum(p, 1 - p)
        one_hot = np.stack([p.argmax(1) == k for k in range(p.shape[1])], 1).astype(float)
        return one_hot, np.repeat(p.max(1, keepdims=True), p.shape[1], 1)

    def mix(pair, box):
        mixed = [a.copy() for a in pair]
        for sample, extent in enumerate(box.numpy()):
            inside = (slice(None), *(slice(low, high) for low, high in extent))
            for target, source in zip(mixed, pair, strict=True):
                target[sample][inside] = source[partner[sample]][inside]
        return mixed

    def dice(name, pair):
        p, (y, c) = probabilities(z[name]), pair
        losses = []
        for k in range(0 if regions else 1, p.shape[1]):
            m = c[:, k] >= threshold
            numerator = 2 * (m * p[:, k] * y[:, k]).sum() + 1e-5
            denominator = (m * p[:, k] ** 2).sum() + (m * y[:, k] ** 2).sum() + 1e-5
            losses.append(1 - numerator / denominator)
        return float(np.mean(losses))

    teacher, weak, strong = label("u_dn"), label("u_dw"), label("u_ds")
    one, two = mix(teacher, boxes[0]), mix(teacher, boxes[1])
    return {
        "ip": (dice("s1_dn", one) + dice("s2_dn", two)) / 2,
        "tkd": (dice("u_dw", teacher) + dice("u_ds", teacher) + dice("s2_dw", two) + dice("s2_ds", two)) / 4,
        "dkd": (dice("s2_dw", mix(weak, boxes[1])) + dice("s2_ds", mix(strong, boxes[1]))) / 2,
    }


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dim", ["planned_2d", "planned_3d"])
def test_terms_are_the_papers(dim, regions, request, monkeypatch, tmp_path):
    trainer = make_trainer(
        request.getfixturevalue(dim), monkeypatch, tmp_path, regions, cutmix_probability=1.0, confidence_threshold=0.7
    )
    labeled, unlabeled, _ = make_batches(trainer)
    logits = random_logits(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, given(logits), labeled, unlabeled)
    expected = naive_crossmatch(logits, unlabeled.boxes, unlabeled.partner.tolist(), 0.7, regions)
    assert set(terms) == {"supervised", *expected} == set(trainer.loss_weights(0.0))
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, abs=1e-5), name
    torch.testing.assert_close(terms["supervised"], trainer.loss(logits["x_dn"], labeled.target))


def test_strong_images_are_mixed_as_their_labels(planned_3d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path, cutmix_probability=1.0)
    labeled, unlabeled, _ = make_batches(trainer)
    images = images_of(trainer, labeled, unlabeled)
    for name, view, boxes in zip(("s1", "s2"), unlabeled.strong, unlabeled.boxes, strict=True):
        for sample, extent in enumerate(boxes):
            expected = view[sample].clone()
            inside = (slice(None), *(slice(int(low), int(high)) for low, high in extent))
            expected[inside] = view[unlabeled.partner[sample]][inside]
            assert torch.equal(images[name][sample], expected)
    assert torch.equal(images["u"], unlabeled.weak) and torch.equal(images["x"], labeled.image)


def test_pseudo_labels_carry_no_gradient(planned_3d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path, confidence_threshold=0.5, cutmix_probability=1.0)
    labeled, unlabeled, _ = make_batches(trainer)
    logits = random_logits(trainer, labeled, unlabeled)
    for value in logits.values():
        for tensor in value if isinstance(value, list) else [value]:
            tensor.requires_grad_()
    terms = summed_terms(trainer, given(logits), labeled, unlabeled)

    def reached(term: str) -> set[str]:
        leaves = {n: v[0] if isinstance(v, list) else v for n, v in logits.items()}
        found = torch.autograd.grad(terms[term], list(leaves.values()), retain_graph=True, allow_unused=True)
        return {n for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}

    assert reached("supervised") == {"x_dn"}
    assert reached("ip") == {"s1_dn", "s2_dn"}
    assert reached("tkd") == {"u_dw", "u_ds", "s2_dw", "s2_ds"}
    assert reached("dkd") == {"s2_dw", "s2_ds"}


def test_the_unsupervised_terms_reach_every_parameter(planned_3d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path, ramp_length=0.0, confidence_threshold=0.4)
    labeled, unlabeled, _ = make_batches(trainer)
    monkeypatch.setattr(trainer, "supervised_loss", lambda output, target: output[0].sum() * 0.0)
    trainer.step_gradients(
        labeled, unlabeled, trainer.prepare(labeled, unlabeled), trainer.loss_weights(trainer.progress)
    )
    heads_of_lower_resolutions = {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
    for name, parameter in trainer.network.named_parameters():
        if "encoder.encoder" in name or name in heads_of_lower_resolutions:
            continue
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert trainer.network.encoder.stages[0][0].convs[0].conv.weight.grad.abs().max() > 0


def test_a_checkpoint_of_the_first_version_is_continued(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    trainer.logger.log("ema_fg_dice", 0.5, 0)
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    checkpoint = torch.load(tmp_path / "c.pth", weights_only=True)
    del checkpoint["ssl"]["network"]
    trainer.load_checkpoint(checkpoint)
    assert trainer.current_epoch == 1


def test_streams_are_the_papers(planned_3d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path)
    assert trainer.streams() == {
        "x_dn": Stream("x", dropout=0.0, gradient=True, deep_supervision=True),
        "u_dn": Stream("u", dropout=0.0, gradient=False, deep_supervision=False),
        "u_dw": Stream("u", dropout=0.25),
        "u_ds": Stream("u", dropout=0.75),
        "s1_dn": Stream("s1", dropout=0.0),
        "s2_dn": Stream("s2", dropout=0.0),
        "s2_dw": Stream("s2", dropout=0.25),
        "s2_ds": Stream("s2", dropout=0.75),
    }


def test_sampled_perturbations_have_the_expected_gradient_of_all(planned_3d, monkeypatch, tmp_path):
    """Exactly: the mean over both decoders and both strong views is that of all, over both orders of the views."""
    options = {"confidence_threshold": 0.4, "cutmix_probability": 1.0, "ramp_length": 0.0}
    everything = make_trainer(planned_3d, monkeypatch, tmp_path, **options)
    sampled = make_trainer(planned_3d, monkeypatch, tmp_path, perturbations="sampled", **options)
    labeled, unlabeled, _ = make_batches(everything)
    masks = everything.training_network.draw_dropout_masks(
        everything.streams(), images_of(everything, labeled, unlabeled)
    )
    monkeypatch.setattr(
        type(sampled.training_network), "draw_dropout_masks", lambda self, streams, images: drawn(streams)
    )

    def drawn(streams):
        """The same channels for a dropout of one probability, whatever the stream's name."""
        of = {0.25: "dw", 0.75: "ds"}
        return {
            n: masks[f"{'u' if n[0] == 'u' else 's2'}_{of[one.dropout]}"] for n, one in streams.items() if one.dropout
        }

    def gradients(trainer, *views: int) -> dict[str, torch.Tensor]:
        strong, boxes = [[one[view] for view in views] for one in (unlabeled.strong, unlabeled.boxes)]
        batch = unlabeled._replace(strong=strong, boxes=boxes)
        trainer.step_gradients(labeled, batch, trainer.prepare(labeled, batch), trainer.loss_weights(1.0))
        named = trainer.network.named_parameters()
        return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}

    def mean(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}

    expected, found, decoders = mean([gradients(everything, 0, 1), gradients(everything, 1, 0)]), [], []
    for step in range(2):
        sampled._steps_in_epoch = step
        decoders.append(sampled.streams()["s_d"].dropout)
        found += [gradients(sampled, view) for view in (0, 1)]
    assert sorted(decoders) == [0.25, 0.75]
    scale = max(gradient.abs().max() for gradient in expected.values()).item()
    assert (
        found[0]["decoder.seg_layers.1.weight"] - expected["decoder.seg_layers.1.weight"]
    ).abs().max() > 1e-3 * scale
    for name, gradient in mean(found).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_sampled_perturbations_cost_three_encoder_and_five_decoder_passes(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, perturbations="sampled")
    streams = trainer.streams()
    assert list(streams) == ["x_dn", "u_dn", "u_d", "s_dn", "s_d"]
    assert len({stream.image for stream in streams.values()}) == 3
    assert trainer.unlabeled_views().strong == 1


def test_loss_weights_follow_the_ramp(planned_3d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path)
    start, end = trainer.loss_weights(0.0), trainer.loss_weights(0.3)
    assert start["supervised"] == end["supervised"] == 1
    assert start["ip"] == pytest.approx(np.exp(-5)) and end["ip"] == 1
    assert end["tkd"] == pytest.approx(0.7) and end["dkd"] == pytest.approx(0.3)
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path, ramp_length=0.0)
    assert trainer.loss_weights(0.0)["ip"] == 1


def test_a_step_moves_the_weights_and_lowers_the_loss(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, ramp_length=0.0, confidence_threshold=0.4)
    _, _, batch = make_batches(trainer)
    first = trainer.train_step(batch)
    for _ in range(15):
        last = trainer.train_step(batch)
    assert last["loss"] < first["loss"] and last["loss/ip"] < first["loss/ip"]


class TermsOff(CrossMatchTrainer):
    """The matched control: CrossMatch without its unsupervised terms."""

    def loss_weights(self, progress):
        return {name: float(name == "supervised") for name in super().loss_weights(progress)}


@pytest.mark.parametrize("mode", ["split", "stacked"])
def test_without_its_terms_it_takes_nnunets_steps(mode, planned_2d, monkeypatch, tmp_path):
    control = make_method_trainer(TermsOff, planned_2d, monkeypatch, tmp_path, memory_mode=mode)
    stock = make_method_trainer(nnUNetTrainer, planned_2d, monkeypatch, tmp_path)
    ours = make_method_trainer(CrossMatchTrainer, planned_2d, monkeypatch, tmp_path, ramp_length=0.0)
    trainers = (control, stock, ours)
    for trainer in trainers:
        trainer.network.load_state_dict(stock.network.state_dict())
    for seed in range(3):
        for trainer in trainers:
            trainer.train_step(make_batches(trainer if trainer is not stock else control, seed=seed)[2])
    after = [torch.cat([value.flatten() for value in one.network.state_dict().values()]) for one in trainers]
    assert (after[0] - after[1]).abs().max() < 1e-6
    assert (after[2] - after[1]).abs().max() > 1e-3, "with its terms it does not"


@pytest.mark.parametrize("mode", ["split", "stacked"])
def test_a_step_is_what_the_passes_by_hand_give(mode, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, confidence_threshold=0.4)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer._steps_in_epoch = 10, 10, 15
    labeled, unlabeled, _ = make_batches(trainer)
    trainer.step_gradients.memory_mode = mode
    torch.manual_seed(3)
    trainer.step_gradients(
        labeled, unlabeled, trainer.prepare(labeled, unlabeled), trainer.loss_weights(trainer.progress)
    )
    found = {n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None}

    # By hand, from the stock decoder's parts: every pass on its own, one loss, one backward pass.
    torch.manual_seed(3)
    network, images = trainer.training_network, images_of(trainer, labeled, unlabeled)
    masks = network.draw_dropout_masks(trainer.streams(), images)
    logits = {}
    for name, stream in trainer.streams().items():
        skips = network.encoder(images[stream.image])
        if name in masks:
            skips = [skip * mask for skip, mask in zip(skips, masks[name].levels, strict=True)]
        network.decoder.deep_supervision = stream.deep_supervision
        logits[name] = network.decoder(skips)
    terms = summed_terms(trainer, given(logits), labeled, unlabeled)
    w = np.exp(-5 * (1 - 0.15 / 0.3) ** 2)
    loss = terms["supervised"] + w * (terms["ip"] + 0.7 * terms["tkd"] + 0.3 * terms["dkd"])
    expected = torch.autograd.grad(loss, list(trainer.network.parameters()), allow_unused=True)
    scale = max(g.abs().max() for g in expected if g is not None).item()
    for (name, _), gradient in zip(trainer.network.named_parameters(), expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)
