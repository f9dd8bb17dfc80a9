"""UA-MT: its loss and its certainty against naive transcriptions of the paper, its gradients."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from method_steps import gradients_step, images_of, make_batches
from method_steps import make_trainer as make_method_trainer
from method_steps import random_outputs as outputs_of

from nnunet_ssl.methods.uamt import Prepared, UAMTTrainer
from nnunet_ssl.networks.streams import Stream

PLACES = ("bottleneck", "features")


def make_trainer(planned, monkeypatch, tmp_path, **options) -> UAMTTrainer:
    return make_method_trainer(UAMTTrainer, planned, monkeypatch, tmp_path, **options)


def probabilities(z: np.ndarray, regions: bool) -> np.ndarray:
    """Of logits (N, C, *spatial), in float64."""
    return 1 / (1 + np.exp(-z)) if regions else np.exp(z) / np.exp(z).sum(1, keepdims=True)


def naive_consistency(student: np.ndarray, teacher: np.ndarray, certain: np.ndarray, regions: bool) -> float:
    """Σ m (p_s - p_t)² / (C Σ m), one voxel and one channel at a time; of regions, each channel has its own m."""
    p_s, p_t = (probabilities(z, regions).reshape(*z.shape[:2], -1) for z in (student, teacher))
    m = certain.reshape(*certain.shape[:2], -1)
    numerator = denominator = 0.0
    for sample in range(p_s.shape[0]):
        for voxel in range(p_s.shape[2]):
            for k in range(p_s.shape[1]):
                if m[sample, k if regions else 0, voxel]:
                    numerator += (p_s[sample, k, voxel] - p_t[sample, k, voxel]) ** 2
                    denominator += 1
    return numerator / denominator


def naive_certain(passes: list[np.ndarray], share: float, regions: bool) -> np.ndarray:
    """Where the entropy of the passes' mean probability is below a share of its largest value."""
    mean = sum(probabilities(z, regions) for z in passes) / len(passes)
    if regions:
        entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean))
        return entropy < share * np.log(2)
    return -(mean * np.log(mean)).sum(1, keepdims=True) < share * np.log(mean.shape[1])


random_outputs = partial(outputs_of, x=("x",), u=("u_teacher", "u_student"))


def random_certain(trainer, unlabeled) -> torch.Tensor:
    channels = trainer.num_structures if trainer.label_manager.has_regions else 1
    shape = (len(unlabeled.weak), channels, *unlabeled.weak.shape[2:])
    return torch.rand(shape, generator=torch.Generator().manual_seed(6)) > 0.4


def terms_with(trainer, outputs, labeled, unlabeled, certain) -> dict[str, torch.Tensor]:
    prepared = Prepared(torch.zeros_like(unlabeled.weak), certain)
    parts = trainer.loss_terms(outputs, labeled, unlabeled, prepared)
    return {name: value for part in parts for name, value in part.items()}


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dim", ["planned_2d", "planned_3d"])
def test_terms_are_the_papers(dim, regions, request, monkeypatch, tmp_path):
    trainer = make_trainer(request.getfixturevalue(dim), monkeypatch, tmp_path, regions=regions)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs, certain = random_outputs(trainer, labeled, unlabeled), random_certain(trainer, unlabeled)
    terms = terms_with(trainer, outputs, labeled, unlabeled, certain)
    assert set(terms) == {"supervised", "consistency"} == set(trainer.loss_weights(0.0))
    z_s, z_t = (outputs[name].logits.detach().double().numpy() for name in ("u_student", "u_teacher"))
    expected = naive_consistency(z_s, z_t, certain.numpy(), regions)
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(terms["supervised"], trainer.loss(outputs["x"].logits, labeled.target))
    count, total = trainer.epoch_log.counts["certain"].tolist()
    assert count == certain.sum() and total == certain.numel()
    assert terms_with(trainer, outputs, labeled, unlabeled, torch.zeros_like(certain))["consistency"] == 0


def test_each_term_reaches_its_own_output_and_only_certain_voxels(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs, certain = random_outputs(trainer, labeled, unlabeled), random_certain(trainer, unlabeled)
    terms = terms_with(trainer, outputs, labeled, unlabeled, certain)
    leaves = {name: output.full_resolution for name, output in outputs.items()}

    def reached(term: str) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(terms[term], list(leaves.values()), retain_graph=True, allow_unused=True)
        return {n: g for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}

    assert set(reached("supervised")) == {"x"} and set(reached("consistency")) == {"u_student"}
    learned = reached("consistency")["u_student"].abs().amax(1, keepdim=True) > 0
    assert torch.equal(learned, certain)


@pytest.mark.parametrize("regions", [False, True])
def test_it_is_certain_where_the_teachers_passes_are(regions, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, regions=regions, passes=3, first_threshold=0.9)
    labeled, unlabeled, _ = make_batches(trainer)
    network = trainer.training_network
    stream = Stream("u", dropout=0.5, dropout_on=PLACES, gradient=False, teacher=True)
    with torch.no_grad():  # predictions that are here more certain and there less
        network.teacher.decoder.seg_layers[-1].weight.mul_(20)
    torch.manual_seed(3)
    prepared = trainer.prepare(labeled, unlabeled)

    # By hand: the stock decoder of the teacher, with dropout where its last features go into its head.
    torch.manual_seed(3)
    teacher, passes, images = network.teacher, [], []
    teacher.decoder.deep_supervision = False
    for _ in range(3):
        images.append(unlabeled.weak + (torch.randn_like(unlabeled.weak) * 0.1).clamp(-0.2, 0.2))
        masks = network.draw_dropout_masks({"u": stream}, {"u": images[-1]})["u"]
        hook = teacher.decoder.seg_layers[-1].register_forward_pre_hook(
            lambda _, features, of=masks: (features[0] * of.features,)
        )
        with torch.no_grad():
            skips = teacher.encoder(images[-1])
            passes.append(teacher.decoder([*skips[:-1], skips[-1] * masks.levels[-1]]).double().numpy())
        hook.remove()
    assert not np.allclose(passes[0], passes[1]) and not torch.equal(images[0], images[1])
    share = 0.9 + 0.1 * np.exp(-5)
    expected = naive_certain(passes, share, regions)
    assert 0.05 < expected.mean() < 0.95
    np.testing.assert_array_equal(prepared.certain.numpy(), expected)
    noise = (torch.randn_like(unlabeled.weak) * 0.1).clamp(-0.2, 0.2)
    assert torch.equal(prepared.noise, noise), "the pass that the student learns from has noise of its own"


@pytest.mark.parametrize("mode", ["stacked", "split"])
def test_the_consistency_moves_the_whole_student_and_not_the_teacher(mode, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, first_threshold=1.0)
    trainer.step_gradients.memory_mode = mode
    labeled, unlabeled, _ = make_batches(trainer)
    gradients_step(trainer, labeled, unlabeled, {"supervised": 0.0, "consistency": 1.0})
    found = {n for n, p in trainer.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not any("teacher" in name for name in found)
    assert {"encoder.stages.0.0.convs.0.conv.weight", "decoder.seg_layers.1.weight"} <= found


def test_streams_are_the_papers(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    assert trainer.streams() == {
        "x": Stream("x", dropout=0.5, dropout_on=PLACES, deep_supervision=True),
        "u_teacher": Stream("u_noisy", dropout=0.5, dropout_on=PLACES, gradient=False, teacher=True),
        "u_student": Stream("u", dropout=0.5, dropout_on=PLACES),
    }
    labeled, unlabeled, _ = make_batches(trainer, u=64)
    images = images_of(trainer, labeled, unlabeled)
    assert images["x"] is labeled.image and images["u"] is unlabeled.weak
    noise = images["u_noisy"] - unlabeled.weak
    assert noise.abs().max().item() == pytest.approx(0.2, abs=1e-6)
    assert noise.std().item() == pytest.approx(0.1, abs=0.01)


def test_weight_and_threshold_rise_to_the_end_of_the_training(planned_2d, monkeypatch, tmp_path):
    classes = make_trainer(planned_2d, monkeypatch, tmp_path, classes=4)
    regions = make_trainer(planned_2d, monkeypatch, tmp_path, regions=True, ramp_length=0.1)
    for progress in (0.0, 0.3, 1.0):
        ramp = np.exp(-5 * (1 - progress) ** 2)
        assert classes.loss_weights(progress) == pytest.approx({"supervised": 1.0, "consistency": 0.1 * ramp})
        assert classes.threshold(progress) == pytest.approx((0.75 + 0.25 * ramp) * np.log(5))
        assert regions.threshold(progress) == pytest.approx((0.75 + 0.25 * ramp) * np.log(2))
    assert regions.loss_weights(0.1)["consistency"] == pytest.approx(0.1)


def test_the_teacher_is_the_students_moving_average(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, passes=1)
    network = trainer.training_network
    _, _, batch = make_batches(trainer)
    for step in range(3):
        before = {name: parameter.clone() for name, parameter in network.teacher.named_parameters()}
        trainer.train_step(batch)
        decay = min(0.99, 1 - 1 / (step + 1))
        for name, parameter in network.teacher.named_parameters():
            student = network.get_parameter(name)
            torch.testing.assert_close(parameter, decay * before[name] + (1 - decay) * student)
