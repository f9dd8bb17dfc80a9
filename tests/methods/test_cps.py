"""CPS: its loss against a naive transcription of the paper, its gradients, its two networks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from method_steps import Given, gradients_step, images_of, make_batches, summed_terms
from method_steps import make_trainer as make_method_trainer
from method_steps import random_outputs as outputs_of

from nnunet_ssl.methods.cps import CPSTrainer
from nnunet_ssl.networks.streams import Stream

STREAMS = ("x_a", "x_b", "u_a", "u_b")


def make_trainer(planned, monkeypatch, tmp_path, **options) -> CPSTrainer:
    return make_method_trainer(CPSTrainer, planned, monkeypatch, tmp_path, **options)


random_outputs = partial(outputs_of, x=STREAMS[:2], u=STREAMS[2:])


def naive_cps(outputs: Given, regions: bool) -> tuple[float, dict[str, np.ndarray]]:
    """L_cps and its gradient in float64, one voxel at a time: labeled and unlabeled voxels in one list."""
    shapes = {name: outputs[name].full_resolution.shape for name in STREAMS}
    z = {  # (voxels, C)
        name: np.moveaxis(outputs[name].full_resolution.detach().double().numpy(), 1, -1).reshape(-1, shapes[name][1])
        for name in STREAMS
    }
    loss, gradients = 0.0, {}
    for student, teacher in (("a", "b"), ("b", "a")):
        logits, others = (np.concatenate([z[f"x_{name}"], z[f"u_{name}"]]) for name in (student, teacher))
        values, slopes = [], []
        for own, other in zip(logits, others, strict=True):
            if regions:
                p, label = 1 / (1 + np.exp(-own)), (1 / (1 + np.exp(-other)) > 0.5).astype(float)
                values.append(np.mean([-np.log(q if y else 1 - q) for q, y in zip(p, label, strict=True)]))
                slopes.append((p - label) / len(p))
            else:
                p, label = np.exp(own) / np.exp(own).sum(), np.eye(len(own))[other.argmax()]
                values.append(-np.log(p[other.argmax()]))
                slopes.append(p - label)
        loss += np.mean(values)
        parts = np.split(np.array(slopes) / len(values), [len(z[f"x_{student}"])])
        for image, part in zip("xu", parts, strict=True):
            n, channels, *spatial = shapes[f"{image}_{student}"]
            gradients[f"{image}_{student}"] = np.moveaxis(part.reshape(n, *spatial, channels), -1, 1)
    return float(loss), gradients


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dim", ["planned_2d", "planned_3d"])
def test_terms_are_the_papers_and_labels_carry_no_gradient(dim, regions, request, monkeypatch, tmp_path):
    trainer = make_trainer(request.getfixturevalue(dim), monkeypatch, tmp_path, regions=regions)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    assert set(terms) == {"supervised", "supervised_b", "cps"} == set(trainer.loss_weights(0.0))
    loss, gradients = naive_cps(outputs, regions)
    assert terms["cps"].item() == pytest.approx(loss, rel=1e-5)
    found = torch.autograd.grad(terms["cps"], [outputs[name].full_resolution for name in STREAMS])
    for name, gradient in zip(STREAMS, found, strict=True):
        np.testing.assert_allclose(gradient.numpy(), gradients[name], atol=1e-8, rtol=1e-4, err_msg=name)
    for term, name in (("supervised", "x_a"), ("supervised_b", "x_b")):
        torch.testing.assert_close(terms[term], trainer.loss(outputs[name].logits, labeled.target))


def test_each_network_has_its_own_supervised_loss(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    leaves = {name: output.full_resolution for name, output in outputs.items()}

    def reached(term: str) -> set[str]:
        found = torch.autograd.grad(terms[term], list(leaves.values()), retain_graph=True, allow_unused=True)
        return {n for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}

    assert reached("supervised") == {"x_a"} and reached("supervised_b") == {"x_b"} and reached("cps") == set(STREAMS)


@pytest.mark.parametrize("mode", ["stacked", "split"])
def test_what_they_learn_from_each_other_moves_both_networks(mode, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    trainer.step_gradients.memory_mode = mode
    labeled, unlabeled, _ = make_batches(trainer)

    def moved(**weights: float) -> set[str]:
        gradients_step(trainer, labeled, unlabeled, {"supervised": 0.0, "supervised_b": 0.0, "cps": 0.0} | weights)
        return {n for n, p in trainer.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    encoder, b = "encoder.stages.0.0.convs.0.conv.weight", "training_only.network_b."
    assert {encoder, b + encoder} <= moved(cps=1.0)
    assert not any(name.startswith(b) for name in moved(supervised=1.0))
    assert all(name.startswith(b) for name in moved(supervised_b=1.0))


def test_streams_are_the_papers(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    assert trainer.streams() == {
        "x_a": Stream("x", deep_supervision=True),
        "x_b": Stream("x", network="b", deep_supervision=True),
        "u_a": Stream("u"),
        "u_b": Stream("u", network="b"),
    }
    labeled, unlabeled, _ = make_batches(trainer)
    images = images_of(trainer, labeled, unlabeled)
    assert images["x"] is labeled.image and images["u"] is unlabeled.weak


def test_the_networks_are_drawn_apart_and_the_first_predicts(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    network = trainer.training_network
    b = network.training_only["network_b"]
    own_names = {name for name, _ in network.named_parameters() if not name.startswith("training_only.")}
    assert {name for name, _ in b.named_parameters()} == own_names
    for name, weight in b.named_parameters():
        if name.endswith("conv.weight"):
            own = network.get_parameter(name)
            assert not torch.equal(weight, own), name
            assert weight.std().item() == pytest.approx(own.std().item(), rel=0.5), "drawn in the same way"
    _, _, batch = make_batches(trainer)
    trainer.train_step(batch)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, network.get_parameter(name))
    assert any(name.startswith("training_only.network_b.") for name in network.training_state())


def test_the_weight_rises_to_the_end_of_the_training(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    for progress in (0.0, 0.3, 1.0):
        expected = {"supervised": 1.0, "supervised_b": 1.0, "cps": 0.1 * np.exp(-5 * (1 - progress) ** 2)}
        assert trainer.loss_weights(progress) == pytest.approx(expected)
    papers = make_trainer(planned_2d, monkeypatch, tmp_path, ramp_length=0.0, cps_weight=1.5)
    assert papers.loss_weights(0.0)["cps"] == 1.5


@pytest.mark.parametrize("regions", [False, True])
def test_voxels_with_the_ignore_label_are_learned_from_the_other_network(regions, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, regions=regions, ignore=True)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    ignored = ~trainer.known_voxels(labeled)
    (gradient,) = torch.autograd.grad(terms["cps"], [outputs["x_a"].full_resolution])
    assert ignored.any() and (gradient.abs().amax(1, keepdim=True)[ignored] > 0).all()
