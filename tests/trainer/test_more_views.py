"""The views that a method may ask for: an augmented one of unlabeled patches, and a weak one of labeled patches."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from author_methods import TwoNetworks
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from method_steps import make_short
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.data.views import UnlabeledViews, WithWeakView, flat
from nnunet_ssl.trainer.loaders import loader_of

INTENSITY = [
    "GaussianNoiseTransform",
    "GaussianBlurTransform",
    "MultiplicativeBrightnessTransform",
    "ContrastTransform",
    "SimulateLowResolutionTransform",
    "GammaTransform",
    "GammaTransform",
]


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)


def of_random(transforms) -> list[str]:
    return [type(getattr(one, "transform", one)).__name__ for one in transforms]


def stock_transforms(patch=(12, 16, 20), *, mask: bool = False, cascade: bool = False):
    return nnUNetTrainer.get_training_transforms(
        patch, (-0.3, 0.3), None, (0, 1, 2), False, use_mask_for_norm=[mask], is_cascaded=cascade,
        foreground_labels=[1, 2],
    )  # fmt: skip


@pytest.fixture
def trainer(request, environment, tmp_path):
    trainer = make_short(TwoNetworks, request.getfixturevalue(request.param), tmp_path)
    os.environ["nnUNet_n_proc_DA"] = "0"
    trainer.on_train_start()
    yield trainer
    trainer.loaders.finish()


@pytest.mark.parametrize("trainer", ["planned_2d", "planned_3d"], indirect=True)
def test_both_views_come_from_the_loaders(trainer) -> None:
    patch = tuple(trainer.configuration_manager.patch_size)
    labeled, unlabeled = trainer.next_batches(next(trainer.dataloader_train))
    assert labeled.weak.shape == labeled.image.shape == (2, 1, *patch)
    assert unlabeled.augmented.shape == unlabeled.weak.shape == (2, 1, *patch)
    assert labeled.target[0].shape[2:] == patch and len(labeled.target) == 2
    assert of_random(trainer.dataloader_unlabeled.data_loader.views.augmentation.transforms) == INTENSITY
    assert math_ok(trainer.train_step(next(trainer.dataloader_train)))


def math_ok(values: dict) -> bool:
    return bool(np.isfinite(list(values.values())).all())


@pytest.mark.parametrize("trainer", ["planned_3d"], indirect=True)
def test_the_weak_view_of_labeled_patches_lies_as_the_label_and_has_the_values_of_the_case(trainer) -> None:
    loader = loader_of(trainer.dataloader_train)
    transforms = loader.transforms
    assert isinstance(transforms, WithWeakView)
    # Mirrored alone, an image that is its label stays it, voxel by voxel.
    transforms.moving = ComposeTransforms(
        [one for one in transforms.moving.transforms if isinstance(one, MirrorTransform)]
    )
    assert transforms.moving.transforms
    load_case = loader._data.load_case

    def image_is_label(key):
        _, segmentation, previous, properties = load_case(key)
        return np.asarray(segmentation[:], dtype=np.float32), segmentation, previous, properties

    loader._data.load_case = image_is_label
    seed(0)
    changed = []
    for _ in range(4):
        labeled, _ = trainer.next_batches(next(trainer.dataloader_train))
        assert torch.equal(labeled.weak.clamp(min=0), labeled.target[0].float())
        changed.append(not torch.equal(labeled.image, labeled.weak))
    assert any(changed), "the image itself has other intensities"
    # Without changes of intensity the image is the weak view.
    transforms.then = ComposeTransforms(
        [one for one in transforms.then.transforms if of_random([one])[0] not in INTENSITY]
    )
    for _ in range(2):
        labeled, _ = trainer.next_batches(next(trainer.dataloader_train))
        assert torch.equal(labeled.image, labeled.weak) and labeled.weak.any()


def test_the_augmented_view_is_what_nnunet_makes_of_the_weak_one() -> None:
    transforms = stock_transforms()
    views = UnlabeledViews(
        transforms, strong=0, augmented=True, normalization_schemes=["ZScoreNormalization"], intensity_properties={}
    )
    own = ComposeTransforms([one for one in flat(transforms) if of_random([one])[0] in INTENSITY])
    assert of_random(own.transforms) == INTENSITY
    differ = []
    for number in range(8):
        image = torch.randn(1, 12, 16, 20, generator=torch.Generator().manual_seed(number))
        seed(number)
        found = views.of_sample({"image": image.clone()})
        seed(number)
        expected = own(image=image.clone())["image"]
        assert torch.equal(found.weak, image) and torch.equal(found.augmented, expected)
        differ.append(not torch.equal(found.augmented, image))
    assert any(differ)


def test_both_views_have_the_mask_and_the_previous_stage() -> None:
    transforms = stock_transforms(mask=True, cascade=True)
    views = UnlabeledViews(
        transforms, strong=1, augmented=True, normalization_schemes=["ZScoreNormalization"], intensity_properties={}
    )
    segmentation = torch.zeros(2, 12, 16, 20, dtype=torch.int16)
    segmentation[0, :, :4] = -1
    segmentation[1, :6] = 1
    segmentation[1, 6:, 8:] = 2
    previous = torch.stack([segmentation[1] == 1, segmentation[1] == 2]).float()
    image = torch.rand(1, 12, 16, 20) + 1
    weak, (strong,), augmented = views.of_sample({"image": image, "segmentation": segmentation})
    for view in (weak, strong, augmented):
        assert view.shape == (3, 12, 16, 20)
        assert (view[0, :, :4] == 0).all() and (view[0, :, 4:] != 0).any()
    assert torch.equal(weak[1:], previous)

    labeled = WithWeakView(flat(transforms))
    labeled.moving = ComposeTransforms([])
    made = labeled(image=image.clone(), segmentation=segmentation.clone())
    weak = made["segmentation"][-1]
    assert torch.equal(weak[0, :, 4:], image[0, :, 4:]) and (weak[0, :, :4] == 0).all()
    assert torch.equal(weak[1:], previous)
    assert len(made["segmentation"][0]) == 1, "the label alone"
