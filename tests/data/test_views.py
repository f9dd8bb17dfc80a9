"""Strong views: intensities change as far as each channel's normalization allows, and the anatomy stays."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.ndimage import gaussian_filter
from torch import Tensor

from nnunet_ssl.data.views import BiasFieldTransform, UnlabeledViews, strong_intensity_transforms

Z_SCORE, CT, NONE, RESCALED, RGB = (f"{name}Normalization" for name in ("ZScore", "CT", "No", "RescaleTo01", "RGBTo01"))
# In HU, as of a liver: the soft tissue around it lies below 0 once it is normalized.
PROPERTIES = {"mean": 100.0, "std": 40.0, "percentile_00_5": -40.0, "percentile_99_5": 200.0}
CT_RANGE = (-3.5, 2.5)
SCHEMES = {"z-score": [Z_SCORE], "CT": [CT], "none": [NONE], "rescaled": [RESCALED], "RGB": [RGB] * 3}
DRAWS = 60


def texture(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Smooth structures, mean 0 and standard deviation 1."""
    image = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.5)
    return ((image - image.mean()) / image.std()).astype(np.float32)


def normalized(scheme: str, seed: int = 0, shape: tuple[int, ...] = (12, 24, 28)) -> Tensor:
    """An image of the scale that nnU-Net's normalization gives."""
    image = texture(seed, shape)
    if scheme == CT:
        image = CTNormalization(False, PROPERTIES).run(image * 50 + 40)
    elif scheme == NONE:
        image = 3000 + 500 * image
    elif scheme in (RESCALED, RGB):
        image = (image - image.min()) / (image.max() - image.min())
    return torch.from_numpy(image)


def weak_view(schemes: list[str], **options) -> Tensor:
    return torch.stack([normalized(scheme, seed, **options) for seed, scheme in enumerate(schemes)])


def transforms_of(schemes: list[str]):
    return strong_intensity_transforms(schemes, {str(channel): PROPERTIES for channel in range(len(schemes))})


def strong_views(schemes: list[str], weak: Tensor, draws: int = DRAWS) -> list[Tensor]:
    torch.manual_seed(0)
    np.random.seed(0)
    transforms = transforms_of(schemes)
    return [transforms(image=weak.clone())["image"] for _ in range(draws)]


@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", [(12, 24, 28), (40, 44)], ids=["3d", "2d"])
def test_intensities_change_and_structures_stay(schemes, shape):
    weak = weak_view(schemes, shape=shape)
    views = strong_views(schemes, weak)
    assert all(view.shape == weak.shape and view.dtype == weak.dtype for view in views)
    assert np.mean([torch.equal(view, weak) for view in views]) < 0.3
    correlations = [
        np.corrcoef(old.flatten(), new.flatten())[0, 1] for v in views for old, new in zip(weak, v, strict=True)
    ]
    assert np.median(correlations) > 0.95 and min(correlations) > 0.7


@pytest.mark.parametrize(
    ("scheme", "low", "high"), [(CT, *CT_RANGE), (RESCALED, 0.0, 1.0), (RGB, 0.0, 1.0)], ids=["CT", "rescaled", "RGB"]
)
def test_values_stay_in_the_range_of_the_normalization(scheme, low, high):
    weak = weak_view([scheme] * 3)
    assert weak.min() == low and weak.max() == high
    for view in strong_views([scheme] * 3, weak):
        assert view.min() >= low and view.max() <= high


def test_every_ct_channel_has_a_range_of_its_own():
    other = {**PROPERTIES, "percentile_00_5": 60.0, "percentile_99_5": 140.0}
    torch.manual_seed(0)
    transforms = strong_intensity_transforms([Z_SCORE, CT, CT], {"0": {}, "1": PROPERTIES, "2": other})
    views = [transforms(image=3 * torch.randn(3, 8, 9, 10))["image"] for _ in range(10)]
    reached = [(min(float(v[c].min()) for v in views), max(float(v[c].max()) for v in views)) for c in range(3)]
    assert reached[0][0] < -6 and reached[0][1] > 6
    assert reached[1:] == [CT_RANGE, (-1.0, 1.0)]


@pytest.mark.parametrize("scheme", [CT, NONE], ids=["CT", "none"])
def test_the_mean_of_a_patch_stays_where_zero_means_nothing(scheme):
    # A patch far from 0: a factor around 0 would move it by up to half of that.
    weak = (normalized(NONE) if scheme == NONE else 0.3 * normalized(Z_SCORE) - 2)[None]
    for view in strong_views([scheme], weak):
        assert abs(view.mean() - weak.mean()) < 0.15 * weak.std()


def test_noise_without_normalization_is_measured_by_the_patch():
    for scale in (1e-3, 1.0, 1e4):
        weak = (normalized(Z_SCORE)[None] + 5) * scale
        changes = [(view - weak).std() / weak.std() for view in strong_views([NONE], weak)]
        assert 0.15 < max(changes) < 0.6
        lowest = min(view.min() for view in strong_views([NONE], weak))
        assert lowest > weak.min() - weak.std()


@pytest.mark.parametrize(
    ("scheme", "has_field"),
    [(Z_SCORE, True), (RESCALED, True), (RGB, False), (CT, False), (NONE, False)],
    ids=["z-score", "rescaled", "RGB", "CT", "none"],
)
def test_a_bias_field_only_where_the_scheme_allows_it(scheme, has_field):
    # A board of two values. Whatever depends on a voxel's value alone keeps all fields of a color alike.
    low, high = (0.2, 0.5) if scheme in (RESCALED, RGB) else (-1.0, 1.0)
    color = (torch.arange(64)[:, None] // 16 + torch.arange(64) // 16) % 2
    weak = torch.where(color == 1, high, low)[None].float()
    spreads = []
    for view in strong_views([scheme], weak):
        # Neither blur nor noise reaches the mean of a field's inside.
        inside = view[0].unfold(0, 16, 16).unfold(1, 16, 16)[..., 4:12, 4:12].mean((-2, -1))
        spreads.append(float(inside[color[::16, ::16] == 1].std() / (high - low)))
    assert (max(spreads) > 0.1) == has_field, max(spreads)


def test_the_colors_of_an_rgb_image_change():
    weak = weak_view([RGB] * 3)
    gains = torch.stack([view.mean((1, 2, 3)) / weak.mean((1, 2, 3)) for view in strong_views([RGB] * 3, weak)])
    assert ((gains.amax(1) - gains.amin(1)) > 0.1).float().mean() > 0.3
    assert gains.max() > 1.1 and gains.min() < 0.9


def test_channels_of_other_schemes_are_out_of_reach():
    schemes = [CT, NONE, Z_SCORE]
    weak = weak_view(schemes)
    changed = weak.clone()
    changed[0] *= -0.5
    for before, after in zip(strong_views(schemes, weak), strong_views(schemes, changed), strict=True):
        assert torch.equal(before[1:], after[1:])
    views = strong_views(schemes, weak)
    assert all(abs(view[1].mean() - weak[1].mean()) < 0.15 * weak[1].std() for view in views)
    assert all(CT_RANGE[0] <= view[0].min() and view[0].max() <= CT_RANGE[1] for view in views)
    differs = np.array([[not torch.equal(new, old) for new, old in zip(view, weak, strict=True)] for view in views])
    assert len({tuple(row) for row in differs}) > 2 and differs.any(0).all()


def test_channels_without_a_scheme_stay():
    weak = torch.stack([normalized(Z_SCORE), torch.ones(12, 24, 28)])
    assert all(torch.equal(view[1], weak[1]) for view in strong_views([Z_SCORE], weak, draws=10))


def test_an_unknown_scheme_is_taken_for_z_score():
    weak = weak_view([Z_SCORE, Z_SCORE])
    known, unknown = (strong_views(schemes, weak, 5) for schemes in ([Z_SCORE] * 2, [Z_SCORE, "OfMyLab"]))
    assert all(torch.equal(*pair) for pair in zip(known, unknown, strict=True))


@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
def test_constant_patches_stay_finite(schemes):
    for view in strong_views(schemes, torch.zeros(len(schemes), 16, 16, 16), draws=20):
        assert torch.isfinite(view).all()


@pytest.mark.parametrize("spatial", [(8, 9), (3, 8, 9)])
def test_bias_field_keeps_the_minimum_and_is_smooth(spatial):
    torch.manual_seed(0)
    image = torch.rand(2, *spatial) + 1
    changed = BiasFieldTransform()(image=image.clone())["image"]
    floor = image.flatten(1).min(1).values
    torch.testing.assert_close(changed.flatten(1).min(1).values, floor)
    assert not torch.equal(changed, image)
    factor = (changed[0] - floor[0]) / (image[0] - floor[0])
    assert factor[image[0] > floor[0]].min() > np.exp(-0.51) and factor[image[0] > floor[0]].max() < np.exp(0.51)


def unlabeled_views(schemes: list[str], patch: tuple[int, ...], *, masked: list[bool], dummy_2d: bool = False):
    transforms = nnUNetTrainer.get_training_transforms(
        patch, (-0.3, 0.3), None, tuple(range(len(patch))), dummy_2d, use_mask_for_norm=masked
    )
    properties = {str(channel): PROPERTIES for channel in range(len(schemes))}
    return UnlabeledViews(transforms, strong=2, normalization_schemes=schemes, intensity_properties=properties)


def test_outside_the_mask_only_masked_channels_are_zero():
    torch.manual_seed(0)
    views = unlabeled_views([Z_SCORE, NONE], (8, 16, 16), masked=[True, False])
    views.spatial.transforms = []
    image = torch.stack([normalized(Z_SCORE, shape=(8, 16, 16)), normalized(NONE, shape=(8, 16, 16))])
    outside = torch.zeros(8, 16, 16, dtype=torch.bool)
    outside[:, :6] = True
    image[0, outside] = 0
    segmentation = -outside[None].to(torch.int16)
    for _ in range(20):
        weak, strong, _ = views(image.clone(), segmentation.clone())
        assert torch.equal(weak, image)
        for view in strong:
            assert (view[0, outside] == 0).all() and (view[0, ~outside] != 0).float().mean() > 0.99
            assert (view[1] > 500).all()


def test_a_bias_field_is_not_measured_from_the_zeros_outside():
    image = normalized(Z_SCORE)[None]
    cropped = image.clone()
    cropped[:, :, :8] = 0
    inside = image[:, :, 8:]
    assert inside.min() == image.min()  # so the field's anchor is tissue in both
    transform = BiasFieldTransform()
    torch.manual_seed(0)
    field = transform.get_parameters(image=image)
    whole, masked = (transform.apply({"image": x.clone()}, **field)["image"] for x in (image, cropped))
    assert torch.equal(whole[:, :, 8:], masked[:, :, 8:]) and not torch.equal(whole[:, :, 8:], inside)


@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
def test_slices_stay_apart_where_the_augmentation_is_two_dimensional(schemes):
    patch = (6, 32, 24)
    torch.manual_seed(1)
    np.random.seed(1)
    views = unlabeled_views(schemes, patch, masked=[False] * len(schemes), dummy_2d=True)
    # Neighboring slices have nothing in common.
    slices = [torch.stack([normalized(scheme, z, (40, 36)) for z in range(6)]) for scheme in schemes]
    for _ in range(10):
        weak, strong, _ = views(torch.stack(slices))
        assert weak.shape == (len(schemes), *patch)
        for view in strong:
            for old, new in zip(weak, view, strict=True):
                same = np.corrcoef(old.flatten(1), new.flatten(1))[:6, 6:]
                assert (same.argmax(0) == np.arange(6)).all()


def test_views_of_all_schemes_pickle():
    schemes = [Z_SCORE, CT, NONE, RESCALED, RGB]
    views = unlabeled_views(schemes, (8, 12, 12), masked=[True, False, False, False, False])
    copy = pickle.loads(pickle.dumps(views))
    image, segmentation = weak_view(schemes, shape=(10, 14, 14)), torch.zeros(1, 10, 14, 14, dtype=torch.int16)
    drawn = []
    for made in (views, copy):
        torch.manual_seed(0)
        np.random.seed(0)
        weak, strong, _ = made(image.clone(), segmentation.clone())
        drawn.append(torch.stack([weak, *strong]))
    assert torch.equal(*drawn) and not torch.equal(drawn[0][0], drawn[0][1])
