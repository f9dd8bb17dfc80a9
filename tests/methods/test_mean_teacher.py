"""Mean teacher: its loss against a naive transcription of the paper, its gradients, its teacher."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from method_steps import gradients_step, images_of, make_batches, summed_terms
from method_steps import make_trainer as make_method_trainer
from method_steps import random_outputs as outputs_of

from nnunet_ssl.methods.mean_teacher import MeanTeacherTrainer
from nnunet_ssl.networks.streams import Stream


def make_trainer(planned, monkeypatch, tmp_path, **options) -> MeanTeacherTrainer:
    return make_method_trainer(MeanTeacherTrainer, planned, monkeypatch, tmp_path, **options)


random_outputs = partial(outputs_of, x=("x",), u=("u_teacher", "u_student"))


def naive_consistency(student: torch.Tensor, teacher: torch.Tensor, regions: bool) -> float:
    """The equation in float64, one sample and one voxel at a time."""

    def probabilities(z):
        return 1 / (1 + np.exp(-z)) if regions else np.exp(z) / np.exp(z).sum()

    z_s, z_t = (z.detach().double().numpy().reshape(*z.shape[:2], -1) for z in (student, teacher))
    squares = []
    for sample in range(z_s.shape[0]):
        for voxel in range(z_s.shape[2]):
            p_s, p_t = probabilities(z_s[sample, :, voxel]), probabilities(z_t[sample, :, voxel])
            squares += [(a - b) ** 2 for a, b in zip(p_s, p_t, strict=True)]
    return float(np.mean(squares))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dim", ["planned_2d", "planned_3d"])
def test_terms_are_the_papers(dim, regions, request, monkeypatch, tmp_path):
    trainer = make_trainer(request.getfixturevalue(dim), monkeypatch, tmp_path, regions=regions)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    assert set(terms) == {"supervised", "consistency"} == set(trainer.loss_weights(0.0))
    expected = naive_consistency(outputs["u_student"].logits, outputs["u_teacher"].logits, regions)
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(terms["supervised"], trainer.loss(outputs["x"].logits, labeled.target))
    outputs["u_student"] = outputs["u_teacher"]
    assert summed_terms(trainer, outputs, labeled, unlabeled)["consistency"] == 0


def test_each_term_reaches_its_own_output_of_the_student(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    leaves = {name: output.full_resolution for name, output in outputs.items()}

    def reached(term: str) -> set[str]:
        found = torch.autograd.grad(terms[term], list(leaves.values()), retain_graph=True, allow_unused=True)
        return {n for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}

    assert reached("supervised") == {"x"} and reached("consistency") == {"u_student"}


@pytest.mark.parametrize("mode", ["stacked", "split"])
def test_the_consistency_moves_the_whole_student_and_not_the_teacher(mode, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    trainer.step_gradients.memory_mode = mode
    labeled, unlabeled, _ = make_batches(trainer)
    gradients_step(trainer, labeled, unlabeled, {"supervised": 0.0, "consistency": 1.0})
    found = {n for n, p in trainer.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not any("teacher" in name for name in found)
    assert {"encoder.stages.0.0.convs.0.conv.weight", "decoder.seg_layers.1.weight"} <= found


def test_streams_are_the_papers(planned_2d, monkeypatch, tmp_path):
    assert make_trainer(planned_2d, monkeypatch, tmp_path).streams() == {
        "x": Stream("x", deep_supervision=True),
        "u_teacher": Stream("u_teacher", gradient=False, teacher=True),
        "u_student": Stream("u_student"),
    }


def test_student_and_teacher_see_noise_of_their_own(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer, u=64)
    images = images_of(trainer, labeled, unlabeled)
    assert torch.equal(images["x"], labeled.image)
    xi, xi_prime = (images[name] - unlabeled.weak for name in ("u_student", "u_teacher"))
    for noise in (xi, xi_prime):
        assert noise.abs().max().item() == pytest.approx(0.2, abs=1e-6)
        assert noise.std().item() == pytest.approx(0.1, abs=0.01) and abs(noise.mean().item()) < 0.01
    assert abs((xi * xi_prime).mean().item()) < 1e-3, "drawn apart"


def test_as_a_setting_the_student_sees_the_strong_view(planned_2d, monkeypatch, tmp_path):
    assert make_trainer(planned_2d, monkeypatch, tmp_path).unlabeled_views().strong == 0
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, student_view="strong", ramp_length=0.0)
    labeled, unlabeled, batch = make_batches(trainer)
    (strong,) = unlabeled.strong
    images = images_of(trainer, labeled, unlabeled)
    assert images["u_student"] is strong
    assert 0 < (images["u_teacher"] - unlabeled.weak).abs().max() < 0.21
    assert trainer.train_step(batch)["loss/consistency"] > 0


def test_the_teacher_is_the_students_moving_average(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    network = trainer.training_network
    _, _, batch = make_batches(trainer)
    student = dict(network.named_parameters())
    expected: dict[str, np.ndarray] = {}
    for step in range(4):
        trainer.train_step(batch)
        decay = min(0.99, 1 - 1 / (step + 1))
        for name, parameter in network.teacher.named_parameters():
            value = student[name].detach().double().numpy()
            expected[name] = decay * expected.get(name, 0.0) + (1 - decay) * value
            np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-4, atol=1e-6)
    network.teacher.updates = 1000
    before = {name: parameter.clone() for name, parameter in network.teacher.named_parameters()}
    trainer.train_step(batch)
    for name, parameter in network.teacher.named_parameters():
        torch.testing.assert_close(parameter, 0.99 * before[name] + 0.01 * student[name])


def test_the_weight_rises_to_the_end_of_the_training(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    for progress in (0.0, 0.3, 1.0):
        expected = {"supervised": 1.0, "consistency": 0.1 * np.exp(-5 * (1 - progress) ** 2)}
        assert trainer.loss_weights(progress) == pytest.approx(expected)
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, ramp_length=0.0, consistency_weight=2.0)
    assert trainer.loss_weights(0.0)["consistency"] == 2.0
