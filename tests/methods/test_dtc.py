"""DTC: its loss against a naive transcription of the paper, its gradients, its head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_steps import Given, distance_maps, gradients_step, make_batches, summed_terms
from method_steps import make_trainer as make_method_trainer

from nnunet_ssl.data.signed_distance import SignedDistanceMaps
from nnunet_ssl.methods.dtc import DTCTrainer, dual_task_consistency
from nnunet_ssl.networks.streams import Stream, StreamOutput

KINDS = pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])


def make_trainer(planned, monkeypatch, tmp_path, **options) -> DTCTrainer:
    return make_method_trainer(DTCTrainer, planned, monkeypatch, tmp_path, **options)


def random_outputs(trainer, labeled, unlabeled) -> Given:
    generator = torch.Generator().manual_seed(5)
    channels, maps = trainer.label_manager.num_segmentation_heads, trainer.num_structures

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    outputs = Given()
    for name, n in (("x", 2), ("u", len(unlabeled.weak))):
        sizes = [t.shape[2:] for t in labeled.target] if name == "x" else [unlabeled.weak.shape[2:]]
        logits = [draw(n, channels, *size).requires_grad_() for size in sizes]
        distance = (draw(n, maps, *sizes[0]) / 100).tanh().requires_grad_()
        outputs[name] = StreamOutput(logits if name == "x" else logits[0], head={"distance": distance})
    return outputs


def naive_tasks(outputs, steepness: float, regions: bool) -> float:
    """L_dtc in float64, voxel by voxel, over labeled and unlabeled images together."""
    squares = []
    for output in outputs.values():
        z, sdm = (t.detach().double().numpy() for t in (output.full_resolution, output.head["distance"]))
        for sample, *voxel in np.ndindex(z.shape[0], *z.shape[2:]):
            at = (sample, slice(None), *voxel)
            p = 1 / (1 + np.exp(-z[at])) if regions else (np.exp(z[at]) / np.exp(z[at]).sum())[1:]
            inside = 1 / (1 + np.exp(steepness * sdm[at]))
            squares += list((inside - p) ** 2)
    return float(np.mean(squares))


@KINDS
@pytest.mark.parametrize(("dim", "steepness"), [("planned_2d", 1500.0), ("planned_2d", 30.0), ("planned_3d", 1500.0)])
def test_terms_are_the_papers(regions, dim, steepness, request, monkeypatch, tmp_path):
    planned = request.getfixturevalue(dim)
    trainer = make_trainer(planned, monkeypatch, tmp_path, regions=regions, steepness=steepness)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    assert set(terms) == set(trainer.loss_weights(0.0))
    torch.testing.assert_close(terms["supervised"], trainer.loss(outputs["x"].logits, labeled.target))
    target = distance_maps(trainer, labeled.full_resolution).double().numpy()
    predicted = outputs["x"].head["distance"].detach().double().numpy()
    # Targets are of half precision.
    assert terms["distance"].item() == pytest.approx(((predicted - target) ** 2).mean(), rel=1e-3)
    assert terms["tasks"].item() == pytest.approx(naive_tasks(outputs, steepness, regions), rel=1e-4)


def test_each_term_reaches_its_own_outputs(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    leaves = {f"{name} logits": output.full_resolution for name, output in outputs.items()}
    leaves |= {f"{name} distance": output.head["distance"] for name, output in outputs.items()}
    reached = {}
    for term, value in summed_terms(trainer, outputs, labeled, unlabeled).items():
        found = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        reached[term] = {n for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}
    assert reached == {"supervised": {"x logits"}, "distance": {"x distance"}, "tasks": set(leaves)}


@pytest.mark.parametrize("mode", ["stacked", "split"])
def test_the_head_learns_from_distances_and_from_the_other_task(mode, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    trainer.step_gradients.memory_mode = mode
    labeled, unlabeled, _ = make_batches(trainer)
    names = list(trainer.loss_weights(1.0))
    for term, head, segmentation in (
        ("supervised", False, True), ("distance", True, False), ("tasks", True, True),
    ):  # fmt: skip
        gradients_step(trainer, labeled, unlabeled, {name: float(name == term) for name in names})
        reached = {n for n, p in trainer.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert ("training_only.head.layer.weight" in reached) == head, term
        assert ("decoder.seg_layers.1.weight" in reached) == segmentation, term
        assert any(name.startswith("encoder.stages.0") for name in reached), term


def test_a_segmentation_and_the_map_of_its_distances_agree():
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    mask[..., 3:9, 4:10] = True
    maps, _ = SignedDistanceMaps((1.0, 1.0), labels=[1])(mask.to(torch.int64))
    logits = torch.where(mask, 20.0, -20.0)
    agreement = dual_task_consistency(logits, maps[None], steepness=1500.0, regions=True)
    # On the boundary, which is the structure's own, the distance is 0 and its sigmoid one half.
    boundary = (maps[None] == 0).sum().item() * 0.25 / 144
    assert agreement.item() == pytest.approx(boundary, rel=1e-5)
    contradiction = dual_task_consistency(-logits, maps[None], steepness=1500.0, regions=True)
    assert contradiction.item() > 0.8


def test_voxels_with_the_ignore_label_have_no_distance_error(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, ignore=True)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    distance = outputs["x"].head["distance"]
    error = summed_terms(trainer, outputs, labeled, unlabeled)["distance"]
    (gradient,) = torch.autograd.grad(error, distance)
    ignored = (labeled.full_resolution == 3).expand_as(gradient)
    assert ignored.any() and gradient[ignored].abs().max() == 0 and (gradient[~ignored] != 0).all()


@KINDS
def test_the_targets_are_of_the_datasets_structures(regions, planned_2d, monkeypatch, tmp_path):
    target = make_trainer(planned_2d, monkeypatch, tmp_path, regions=regions, ignore=True).extra_targets["distance"]
    assert target.labels == (None if regions else (1, 2)) and target.structures == 2
    assert target.spacing == tuple(make_trainer(planned_2d, monkeypatch, tmp_path).configuration_manager.spacing)


def test_streams_weights_and_head_are_the_papers(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    assert trainer.streams() == {"x": Stream("x", deep_supervision=True, head=True), "u": Stream("u", head=True)}
    ramp = np.exp(-5 * 0.8**2)
    assert trainer.loss_weights(0.2) == pytest.approx({"supervised": 1.0, "distance": 0.3, "tasks": ramp})
    assert trainer.loss_weights(1.0) == {"supervised": 1.0, "distance": 0.3, "tasks": 1.0}
    assert trainer.settings.steepness == 1500
    head = trainer.training_network.training_only["head"]
    features = torch.randn(2, 4, 8, 8) * 9
    distance = head(torch.zeros(2, 1, 8, 8), features)["distance"]
    assert distance.shape == (2, 2, 8, 8) and distance.abs().max() <= 1
    torch.testing.assert_close(distance, torch.tanh(head.layer(features)))
