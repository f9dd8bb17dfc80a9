"""BCP: its images and loss against a naive transcription of the paper, its gradients, its stages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_steps import Given, make_batches, summed_terms
from method_steps import make_trainer as make_method_trainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import ndimage

from nnunet_ssl.methods.bcp import BCPTrainer
from nnunet_ssl.networks.streams import Stream, StreamOutput

KINDS = [{}, {"regions": True}, {"ignore": True}, {"regions": True, "ignore": True}]


def make_trainer(planned, monkeypatch, tmp_path, *, pretrain_fraction=0.0, **options) -> BCPTrainer:
    trainer = make_method_trainer(
        BCPTrainer, planned, monkeypatch, tmp_path, pretrain_fraction=pretrain_fraction, **options
    )
    with torch.no_grad():
        for parameter in trainer.training_network.teacher.parameters():
            parameter.mul_(0.7).add_(torch.randn_like(parameter), alpha=0.1)
    return trainer


def random_logits(trainer, count: int, spatial) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    channels = trainer.label_manager.num_segmentation_heads
    return {name: torch.randn(count, channels, *spatial, generator=generator) * 4 for name in ("in", "out")}


def given(logits: dict[str, torch.Tensor]) -> Given:
    return Given({name: StreamOutput(value) for name, value in logits.items()})


def naive_pairs(labeled: int, unlabeled: int) -> list[tuple[int, int]]:
    """Each patch of the larger batch once, those of the smaller one in runs as equal as can be."""
    count = max(labeled, unlabeled)
    return [(int(np.floor(n / count * labeled)), int(np.floor(n / count * unlabeled))) for n in range(count)]


def one_hot(target: np.ndarray, channels: int, regions: bool) -> np.ndarray:
    """Of classes (B, 1, *spatial) or regions (B, R, *spatial): (B, C, *spatial)."""
    return target[:, :channels] > 0 if regions else np.concatenate([target == k for k in range(channels)], 1)


def naive_pseudo_label(z: np.ndarray, regions: bool) -> np.ndarray:
    """(U, C, *spatial), one channel for each class or region, foreground reduced to its largest component."""
    label = z > 0 if regions else np.stack([z.argmax(1) == k for k in range(z.shape[1])], 1)
    for sample in label:
        for k in range(0 if regions else 1, len(sample)):
            components, count = ndimage.label(sample[k], np.ones([3] * sample[k].ndim))
            if count:
                sizes = [(components == c).sum() for c in range(1, count + 1)]
                sample[k] = components == 1 + int(np.argmax(sizes))
        if not regions:
            sample[0] = ~sample[1:].any(0)
    return label


def naive_loss(z: np.ndarray, y: np.ndarray, mask: np.ndarray, regions: bool) -> float:
    """[D + CE] / 2 over the voxels of the mask (N, *spatial); y is (N, C, *spatial)."""
    if regions:
        p = 1 / (1 + np.exp(-z))
        ce = -(y * np.log(p) + (1 - y) * np.log(1 - p))
        cross_entropy = np.mean([ce[:, k][mask].mean() for k in range(z.shape[1])])
    else:
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        cross_entropy = -np.log((p * y).sum(1)[mask]).mean()
    dice = []
    for k in range(0 if regions else 1, z.shape[1]):
        overlap = (mask * p[:, k] * y[:, k]).sum()
        size = (mask * p[:, k] ** 2).sum() + (mask * y[:, k]).sum()
        dice.append(1 - (2 * overlap + 1e-5) / (size + 1e-5))
    return (np.mean(dice) + cross_entropy) / 2


def inside(trainer, pairs) -> np.ndarray:
    """M of each pair, (N, *spatial); it is a box with sides of 2/3 of the patch's."""
    mask = pairs.box[:, 0].numpy()
    for one in mask:
        extent = [np.flatnonzero(one.any(tuple(a for a in range(one.ndim) if a != axis))) for axis in range(one.ndim)]
        assert [len(axis) for axis in extent] == [int(n * 2 / 3) for n in one.shape]
        assert one.sum() == np.prod([len(axis) for axis in extent]), "it is a box"
    return mask


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dim", ["planned_2d", "planned_3d"])
def test_terms_are_the_papers(dim, options, request, monkeypatch, tmp_path):
    trainer = make_trainer(request.getfixturevalue(dim), monkeypatch, tmp_path, **options)
    labeled, unlabeled, _ = make_batches(trainer)
    pairs = trainer.prepare(labeled, unlabeled)
    mask, indices = inside(trainer, pairs), naive_pairs(2, 3)
    regions, channels = trainer.label_manager.has_regions, trainer.label_manager.num_segmentation_heads
    logits = random_logits(trainer, 3, mask.shape[1:])
    terms = summed_terms(trainer, given(logits), labeled, unlabeled, pairs)

    teacher = Stream("u", teacher=True, gradient=False)
    pseudo = naive_pseudo_label(trainer.without_gradient(unlabeled.augmented, teacher).logits.numpy(), regions)
    pseudo = np.stack([pseudo[u] for _, u in indices])
    target = labeled.full_resolution.numpy()
    known = np.ones_like(mask)
    if options.get("ignore"):
        known = np.stack([(target[x, 2] == 0) if regions else (target[x, 0] != 3) for x, _ in indices])
    label = np.stack([one_hot(target, channels, regions)[x] for x, _ in indices])
    z = {name: value.double().numpy() for name, value in logits.items()}
    supervised = [
        naive_loss(z["in"], label, mask & known, regions),
        naive_loss(z["out"], label, ~mask & known, regions),
    ]
    unsupervised = [naive_loss(z["in"], pseudo, ~mask, regions), naive_loss(z["out"], pseudo, mask, regions)]
    assert pseudo.any() and not pseudo.all()
    assert set(terms) == {"supervised", "pseudo_label"}
    assert terms["supervised"].item() == pytest.approx(sum(supervised), abs=1e-5)
    assert terms["pseudo_label"].item() == pytest.approx(sum(unsupervised), abs=1e-5)


@pytest.mark.parametrize("dim", ["planned_2d", "planned_3d"])
def test_images_are_pasted_into_each_other_in_both_directions(dim, request, monkeypatch, tmp_path):
    trainer = make_trainer(request.getfixturevalue(dim), monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    pairs = trainer.prepare(labeled, unlabeled)
    images = trainer.images(labeled, unlabeled, pairs)
    assert not torch.equal(pairs.box[0], pairs.box[1]), "each pair has its own box"
    for n, (mask, (x, u)) in enumerate(zip(inside(trainer, pairs), naive_pairs(2, 3), strict=True)):
        x, u = labeled.image[x, 0].numpy(), unlabeled.augmented[u, 0].numpy()
        np.testing.assert_array_equal(images["in"][n, 0].numpy(), x * mask + u * (1 - mask))
        np.testing.assert_array_equal(images["out"][n, 0].numpy(), u * mask + x * (1 - mask))


@pytest.mark.parametrize("u", [1, 2, 3, 5])
def test_every_patch_is_in_a_pair(u, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer, u=u)
    pairs = trainer.prepare(labeled, unlabeled)
    assert set(pairs.labeled.tolist()) == {0, 1} and set(pairs.unlabeled.tolist()) == set(range(u))
    assert list(zip(pairs.labeled.tolist(), pairs.unlabeled.tolist(), strict=True)) == naive_pairs(2, u)


def test_each_part_of_a_mixed_image_learns_from_its_own_label(planned_3d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path, ignore=True)
    labeled, unlabeled, _ = make_batches(trainer)
    pairs = trainer.prepare(labeled, unlabeled)
    logits = random_logits(trainer, 3, unlabeled.weak.shape[2:])
    for value in logits.values():
        value.requires_grad_()
    terms = summed_terms(trainer, given(logits), labeled, unlabeled, pairs)

    def reached(term: str, direction: str) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(terms[term], logits[direction], retain_graph=True)
        return gradient.abs().amax(1, keepdim=True) > 0

    known = trainer.known_voxels(labeled)[pairs.labeled]
    assert not known.all()
    assert torch.equal(reached("supervised", "in"), pairs.box & known)
    assert torch.equal(reached("supervised", "out"), ~pairs.box & known)
    assert torch.equal(reached("pseudo_label", "in"), ~pairs.box)
    assert torch.equal(reached("pseudo_label", "out"), pairs.box)


def test_the_teachers_label_may_keep_all_its_components(planned_2d, monkeypatch, tmp_path):
    labels = []
    for largest in (True, False):
        torch.manual_seed(0)
        trainer = make_trainer(planned_2d, monkeypatch, tmp_path, largest_component=largest)
        labeled, unlabeled, _ = make_batches(trainer)
        labels.append(trainer.prepare(labeled, unlabeled).pseudo)
    teacher = trainer.without_gradient(unlabeled.augmented, Stream("u", teacher=True, gradient=False)).logits
    assert torch.equal(labels[1].long(), teacher.argmax(1, keepdim=True))
    assert (labels[0] > 0).sum() < (labels[1] > 0).sum()


def test_the_settings_are_the_papers(planned_2d, monkeypatch, tmp_path):
    trainer = make_method_trainer(BCPTrainer, planned_2d, monkeypatch, tmp_path)
    assert trainer.settings.ema_decay == 0.99 and trainer.settings.box_fraction == 2 / 3
    assert trainer.stages() == ("pretraining", "copy-paste")
    assert [trainer.stage(t) for t in (0.0, 0.19, 0.2, 0.99)] == ["pretraining"] * 2 + ["copy-paste"] * 2
    assert trainer.loss_weights(0.2) == trainer.loss_weights(1.0) == {"supervised": 1.0, "pseudo_label": 0.5}
    ramped = make_trainer(planned_2d, monkeypatch, tmp_path, pretrain_fraction=0.2, ramp_length=0.3)
    assert ramped.loss_weights(0.35)["pseudo_label"] == pytest.approx(0.5 * np.exp(-5 * 0.5**2))


def test_the_pretraining_takes_nnunets_steps(planned_2d, monkeypatch, tmp_path):
    trainer = make_method_trainer(BCPTrainer, planned_2d, monkeypatch, tmp_path)
    stock = make_method_trainer(nnUNetTrainer, planned_2d, monkeypatch, tmp_path)
    trainer.network.load_state_dict(stock.network.state_dict())
    for seed in range(3):
        for one in (trainer, stock):
            logged = one.train_step(make_batches(trainer, seed=seed)[2])
            assert "loss/pseudo_label" not in logged
    for name, weight in stock.network.state_dict().items():
        torch.testing.assert_close(trainer.network.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)
    assert trainer.training_network.teacher.updates == 3


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_labeled_images_are_pasted_into_each_other(options, deep_supervision, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(
        planned_2d, monkeypatch, tmp_path, pretrain_fraction=0.2, labeled_into_labeled=True, **options
    )
    trainer.enable_deep_supervision = deep_supervision
    labeled, unlabeled, _ = make_batches(trainer)
    pasted = trainer.prepare(labeled, unlabeled)
    assert torch.equal(trainer.images(labeled, unlabeled, pasted)["x"], pasted.image)
    for n, image in enumerate(pasted.image):
        own, other = image == labeled.image[n], image == labeled.image[1 - n]
        assert (own | other).all()
        rows, columns = own[0].any(1), own[0].any(0)
        assert own.sum() == rows.sum() * columns.sum() == int(24 * 2 / 3) ** 2, "a box of its own voxels"
        before, after = ([b.target] if not deep_supervision else b.target for b in (labeled, pasted))
        assert len(before) == (2 if deep_supervision else 1)
        for level, found in zip(before, after, strict=True):
            every = 24 // level.shape[-1]
            assert torch.equal(found[n], torch.where(own[:, ::every, ::every], level[n], level[1 - n]))
