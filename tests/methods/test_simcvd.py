"""SimCVD: its loss against a naive transcription of the paper, its gradients, its teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import pin_memory_of_all_eligible_items_in_dict
from method_steps import Given, distance_maps, gradients_step, images_of, make_batches, summed_terms
from method_steps import make_trainer as make_method_trainer

from nnunet_ssl.data.signed_distance import of_all_structures
from nnunet_ssl.losses.probabilities import consistency_mse
from nnunet_ssl.methods.simcvd import SimCVDTrainer, distance_error, structure_distillation
from nnunet_ssl.networks.streams import Stream, StreamOutput


def make_trainer(planned, monkeypatch, tmp_path, **options) -> SimCVDTrainer:
    return make_method_trainer(SimCVDTrainer, planned, monkeypatch, tmp_path, **options)


def random_outputs(trainer, labeled, unlabeled) -> Given:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    channels, maps = trainer.label_manager.num_segmentation_heads, trainer.num_structures
    outputs = Given()
    for name in trainer.streams():
        n = 2 if name == "x" else len(unlabeled.weak)
        spatial = unlabeled.weak.shape[2:]
        head = {"distance": draw(n, maps, *spatial), "projection": draw(n, 7, 6)}
        logits = draw(n, channels, *spatial)
        levels = [logits, *(draw(n, channels, *t.shape[2:]) for t in labeled.target[1:])]
        bottleneck = draw(n, 5, 3, 4)
        outputs[name] = StreamOutput(levels if name == "x" else logits, None, bottleneck, head)
    return outputs


def naive_simcvd(outputs, labeled, maps, temperature: float, regions: bool) -> dict[str, float]:
    """The equations in float64, one position at a time; ``maps`` are the signed distance maps of all structures."""

    def array(tensor):
        return tensor.detach().double().numpy()

    def contrast(rows, columns, tau):
        losses = [
            -np.log(np.exp(h @ columns[j] / tau) / sum(np.exp(h @ other / tau) for other in columns))
            for j, h in enumerate(rows)
        ]
        return np.mean(losses)

    def probabilities(z):
        e = np.exp(z)
        return e / (1 + e) if regions else e / e.sum(1, keepdims=True)

    x, teacher, student = outputs["x"], outputs["u_teacher"], outputs["u_student"]
    h_s, h_t = (array(o.head["projection"]).reshape(-1, 6) for o in (student, teacher))
    structure = []
    for v_s, v_t in zip(array(student.bottleneck), array(teacher.bottleneck), strict=True):
        a, b = (v.reshape(5, -1).T / np.linalg.norm(v.reshape(5, -1).T, axis=1, keepdims=True) for v in (v_s, v_t))
        structure.append(contrast(b, a, 1.0))
    return {
        "distance": ((array(x.head["distance"]) - array(maps)) ** 2).mean(),
        "contrast": contrast(h_s, h_t, temperature),
        "structure": np.mean(structure),
        "consistency": ((probabilities(array(student.logits)) - probabilities(array(teacher.logits))) ** 2).mean(),
    }


@pytest.mark.parametrize("regions", [False, True])
def test_terms_are_the_papers(regions, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, regions=regions, temperature=0.7)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    expected = naive_simcvd(outputs, labeled, distance_maps(trainer, labeled.full_resolution), 0.7, regions)
    assert set(terms) == {"supervised", *expected} == set(trainer.loss_weights(0.0))
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
    torch.testing.assert_close(terms["supervised"], trainer.loss(outputs["x"].logits, labeled.target))


def test_each_term_reaches_its_own_outputs_of_the_student(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    outputs["u_teacher"] = outputs["u_teacher"].detach()
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    leaves = {}
    for name in ("x", "u_student"):
        output = outputs[name]
        leaves[f"{name} logits"] = output.logits[0] if isinstance(output.logits, list) else output.logits
        leaves[f"{name} bottleneck"] = output.bottleneck
        leaves |= {f"{name} {head}": tensor for head, tensor in output.head.items()}

    def reached(term: str) -> set[str]:
        found = torch.autograd.grad(terms[term], list(leaves.values()), retain_graph=True, allow_unused=True)
        return {n for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}

    assert reached("supervised") == {"x logits"} and reached("distance") == {"x distance"}
    assert reached("contrast") == {"u_student projection"} and reached("structure") == {"u_student bottleneck"}
    assert reached("consistency") == {"u_student logits"}


@pytest.mark.parametrize("mode", ["stacked", "split"])
def test_the_teacher_gets_no_gradient_and_the_student_does_from_each_term(mode, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    trainer.step_gradients.memory_mode = mode
    labeled, unlabeled, _ = make_batches(trainer)
    names = list(trainer.loss_weights(1.0))
    reached = {}
    for name in names:
        weights = {other: float(other == name) for other in names}
        gradients_step(trainer, labeled, unlabeled, weights)
        reached[name] = {
            n for n, p in trainer.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12
        }
        assert not any("teacher" in parameter for parameter in reached[name])
        assert any(parameter.startswith("encoder.stages.0") for parameter in reached[name]), name
    heads = {name: {p.split(".")[2] for p in reached[name] if ".head." in p} for name in names}
    assert heads == {
        "supervised": set(), "distance": {"distance"}, "contrast": {"distance", "projector"}, "structure": set(),
        "consistency": set(),
    }  # fmt: skip
    assert not any(p.startswith("decoder.stages") for p in reached["structure"])


def test_streams_are_the_papers(planned_2d, monkeypatch, tmp_path):
    on = ("bottleneck", "features")
    assert make_trainer(planned_2d, monkeypatch, tmp_path).streams() == {
        "x": Stream("x", dropout=0.5, dropout_on=on, deep_supervision=True, head=True),
        "u_teacher": Stream("u", dropout=0.5, dropout_on=on, gradient=False, head=True, bottleneck=True, teacher=True),
        "u_student": Stream("u_student", dropout=0.5, dropout_on=on, head=True, bottleneck=True),
    }


def test_student_and_teacher_have_masks_of_their_own_and_the_student_noise(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer, u=64)
    images = images_of(trainer, labeled, unlabeled)
    noise = images["u_student"] - images["u"]
    assert torch.equal(images["u"], unlabeled.weak)
    assert noise.abs().max().item() == pytest.approx(0.2, abs=1e-6) and noise.std().item() == pytest.approx(
        0.1, abs=0.01
    )
    masks = trainer.training_network.draw_dropout_masks(trainer.streams(), images)
    for skip in (0, 1):
        assert masks["u_teacher"].levels[skip] is None
    for of in (lambda m: m.levels[-1], lambda m: m.features):
        assert of(masks["u_teacher"]).shape == of(masks["u_student"]).shape
        assert not torch.equal(of(masks["u_teacher"]), of(masks["u_student"]))


def test_as_a_setting_the_student_sees_the_strong_view(planned_2d, monkeypatch, tmp_path):
    assert make_trainer(planned_2d, monkeypatch, tmp_path).unlabeled_views().strong == 0
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, student_view="strong", ramp_length=0.0)
    labeled, unlabeled, batch = make_batches(trainer)
    images = images_of(trainer, labeled, unlabeled)
    assert images["u"] is unlabeled.weak and images["u_student"] is unlabeled.strong[0]
    assert trainer.train_step(batch)["loss/consistency"] > 0


def test_the_teacher_is_the_students_moving_average(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, ema_decay=0.6)
    network = trainer.training_network
    _, _, batch = make_batches(trainer)
    student = dict(network.named_parameters())
    expected: dict[str, np.ndarray] = {}
    # min(0.6, 1 - 1/(step + 1)): the first update copies.
    for step, decay in enumerate((0.0, 0.5, 0.6, 0.6)):
        trainer.train_step(batch)
        assert network.teacher.updates == step + 1
        for name, parameter in network.teacher.named_parameters():
            value = student[name].detach().double().numpy()
            expected[name] = decay * expected.get(name, 0.0) + (1 - decay) * value
            np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-4, atol=1e-6)
    assert any(".head." in f".{name}" for name in expected)
    assert any(not torch.equal(p, student[name]) for name, p in network.teacher.named_parameters())


@pytest.mark.parametrize("predict_with", ["student", "teacher"])
def test_the_checkpoint_holds_the_weights_to_predict_with(predict_with, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, predict_with=predict_with)
    _, _, batch = make_batches(trainer)
    for _ in range(3):
        trainer.train_step(batch)
    trainer.logger.log("ema_fg_dice", 0.5, 0)
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    checkpoint = torch.load(tmp_path / "c.pth", weights_only=True)
    network = trainer.training_network
    chosen, other = (network.teacher, network) if predict_with == "teacher" else (network, network.teacher)
    weights = checkpoint["network_weights"]
    for part in ("encoder", "decoder"):
        for name, tensor in getattr(chosen, part).state_dict().items():
            assert torch.equal(tensor, weights[f"{part}.{name}"])
    assert any(
        not torch.equal(tensor, weights[f"encoder.{name}"]) for name, tensor in other.encoder.state_dict().items()
    )
    # What nnU-Net's validation runs is what the checkpoint predicts with, and deep supervision can be switched.
    stock = SimCVDTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=True
    )
    stock.load_state_dict(weights)
    image = batch["data"]
    for ours, theirs in zip(trainer.network(image), stock(image), strict=True):
        assert torch.equal(ours, theirs)
    trainer.set_deep_supervision_enabled(False)
    assert torch.equal(trainer.network(image), stock(image)[0])


def test_positions_are_capped_per_patch_and_per_batch(planned_3d, monkeypatch, tmp_path):
    def positions(u, **options) -> int:
        trainer = make_trainer(planned_3d, monkeypatch, tmp_path, unlabeled_batch_size=u, **options)
        head = trainer.training_network.training_only["head"]
        patch = trainer.configuration_manager.patch_size
        found = head(torch.zeros(2, 1, *patch), torch.zeros(2, 4, *patch))["projection"]
        assert found.shape[2] == 128
        return found.shape[1]

    assert 256 < positions(2) <= 512
    assert positions(2, contrast_positions=100) <= 100
    assert 60 < positions(8) <= 128
    assert positions(2, contrast_positions_in_batch=50) <= 25


def test_bottleneck_voxels_are_drawn_where_there_are_many():
    student, teacher = (StreamOutput(torch.zeros(1), None, torch.randn(2, 4, 9, 9)) for _ in range(2))
    few = structure_distillation(student, teacher, voxels=10)
    assert few < np.log(10) + 2 < structure_distillation(student, teacher, voxels=81) + 2  # at most log(voxels) + 2
    same = StreamOutput(torch.zeros(1), None, student.bottleneck)
    torch.manual_seed(0)
    drawn = [structure_distillation(student, same, voxels=10).item() for _ in range(2)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_labeled_loaders_targets_are_the_distance_maps_in_mm(regions, workers, planned_3d, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path, regions=regions)
    trainer.configuration_manager.configuration["spacing"] = [4.0, 1.0, 0.5]
    trainer.extra_targets = trainer.labeled_targets()
    present = []
    try:
        trainer.on_train_start()
        assert "extra" not in next(trainer.dataloader_val)
        for _ in range(3):
            batch = pin_memory_of_all_eligible_items_in_dict(next(trainer.dataloader_train))
            labeled, _ = trainer.next_batches(batch)
            assert len(labeled.target) == len(trainer._get_deep_supervision_scales())
            expected = distance_maps(trainer, labeled.full_resolution)
            maps, places = labeled.extra["distance"]
            found = of_all_structures(torch.zeros_like(expected), maps, places)
            torch.testing.assert_close(found, expected, atol=2.5e-4, rtol=0)
            structures = expected.amin(tuple(range(2, expected.ndim))) < 1
            assert maps.dtype == torch.float16 and len(maps) == len(places) == structures.sum()
            present.append(structures)
    finally:
        trainer.loaders.finish()
    assert torch.cat(present).any()


def test_voxels_with_the_ignore_label_have_no_distance_error(planned_2d, monkeypatch, tmp_path):
    for regions in (False, True):
        trainer = make_trainer(planned_2d, monkeypatch, tmp_path, ignore=True, regions=regions)
        labeled, _, _ = make_batches(trainer)
        known = trainer.known_voxels(labeled)
        ignored = labeled.target[0][:, -1:] == (1 if regions else 3)
        assert ignored.any() and torch.equal(known, ~ignored)
        target = distance_maps(trainer, labeled.full_resolution)
        wrong = torch.where(ignored, target + 5, target)
        assert distance_error(wrong, target, known) == 0
        assert distance_error(target + 2, target, known).item() == pytest.approx(4)


def test_consistency_is_zero_for_equal_logits():
    z = torch.randn(2, 3, 4, 4)
    assert consistency_mse(z, z) == 0


def test_weights_follow_the_settings_and_only_consistency_is_ramped_up(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    assert trainer.loss_weights(0.0) == pytest.approx(
        {"supervised": 1, "distance": 0.1, "contrast": 0.5, "structure": 0.1, "consistency": 0.1 * np.exp(-5)}
    )
    assert trainer.loss_weights(0.3)["consistency"] == pytest.approx(0.1)
