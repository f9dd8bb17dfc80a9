"""The views of a patch: a weak one, and others of the same spatial sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor
from torch.nn.functional import interpolate

# What the views keep of nnU-Net's training transforms, in its order.
_SPATIAL = (Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform, MirrorTransform)
_FROM_SEGMENTATION = (MaskImageTransform, MoveSegAsOneHotToDataTransform)
_ERRORS = (ApplyRandomBinaryOperatorTransform, RemoveRandomConnectedComponentFromOneHotEncodingTransform)


class BiasFieldTransform(ImageOnlyTransform):
    """Multiply the image, measured from its minimum, by a smooth random field: a receive coil's inhomogeneity.

    The field is exp(f), f interpolated from a coarse grid of normal values, scaled to ``strength`` at its extreme.
    nnU-Net's images are normalised, so zero is no anchor; the minimum of the patch stands for the air.
    """

    def __init__(self, strength: tuple[float, float] = (0.1, 0.5), grid: int = 4) -> None:
        super().__init__()
        self.strength = strength
        self.grid = grid

    def get_parameters(self, **data_dict: Tensor) -> dict[str, Tensor]:
        """Draw one field for all channels."""
        spatial = data_dict["image"].shape[1:]
        mode = "bilinear" if len(spatial) == 2 else "trilinear"
        coarse = torch.randn(1, 1, *[min(self.grid, size) for size in spatial])
        field = interpolate(coarse, size=spatial, mode=mode, align_corners=True)[0]
        field *= np.random.uniform(*self.strength) / field.abs().max().clamp(min=1e-6)
        return {"field": field.exp_()}

    def _apply_to_image(self, img: Tensor, **params: Tensor) -> Tensor:
        floor = img.amin(dim=tuple(range(1, img.ndim)), keepdim=True)
        return (img - floor) * params["field"] + floor


class RelativeNoiseTransform(ImageOnlyTransform):
    """Add Gaussian noise whose standard deviation is a share of each channel's own in the patch."""

    def __init__(self, share: tuple[float, float] = (0.0, 0.2)) -> None:
        super().__init__()
        self.share = share

    def get_parameters(self, **data_dict: Tensor) -> dict[str, float]:
        """Draw one share for all channels."""
        return {"share": np.random.uniform(*self.share)}

    def _apply_to_image(self, img: Tensor, **params: float) -> Tensor:
        std = img.std(dim=tuple(range(1, img.ndim)), keepdim=True)
        return img.add_(torch.randn_like(img).mul_(params["share"] * std))


class ClipTransform(ImageOnlyTransform):
    """Clip every channel to its own (lowest, highest) value."""

    def __init__(self, ranges: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        self.ranges = ranges

    def _apply_to_image(self, img: Tensor, **params: object) -> Tensor:
        for channel, (lowest, highest) in zip(img, self.ranges, strict=True):
            channel.clamp_(lowest, highest)
        return img


class ChannelsTransform(ImageOnlyTransform):
    """Apply a transform to some channels, which is all that it sees of the image."""

    def __init__(self, transform: BasicTransform, channels: Sequence[int]) -> None:
        super().__init__()
        self.transform = transform
        self.channels = list(channels)

    def _apply_to_image(self, img: Tensor, **params: object) -> Tensor:
        img[self.channels] = self.transform(image=img[self.channels])["image"]
        return img


_Z_SCORE = "ZScoreNormalization"
_CT = "CTNormalization"
_RESCALED = "RescaleTo01Normalization"
_RGB = "RGBTo01Normalization"

# What a strong view changes, in this order, by nnU-Net's name of the channel's normalization **[choice]**.
_CHANGES = {
    _Z_SCORE: ("bias field", "gamma", "brightness", "contrast", "blur", "noise"),
    # A value is a density. No coil, so no bias field. 0 is the mean of the labeled structures, so a factor would move
    # denser and less dense tissue in opposite directions. Gamma and contrast keep the patch's own mean.
    _CT: ("gamma", "contrast", "blur", "noise"),
    # 0 is black: a factor is illumination. The standard deviation is far below 1, so noise is measured by it.
    _RESCALED: ("bias field", "gamma", "brightness", "contrast", "blur", "relative noise"),
    # Brightness, contrast and gamma are drawn for every channel, so the color changes with them. A camera has no coil.
    _RGB: ("gamma", "brightness", "contrast", "blur", "relative noise"),
    # The values may be anything, such as uptake or a probability: nothing that takes 0 or 1 for a scale.
    "NoNormalization": ("contrast", "blur", "relative noise"),
}


def strong_intensity_transforms(
    normalization_schemes: Sequence[str],
    intensity_properties: Mapping[str, Mapping[str, float]],
    *,
    dummy_2d: bool = False,
) -> ComposeTransforms:
    """Intensity changes of a strong view, for every channel those that its normalization allows.

    nnU-Net's own intensity transforms with wider ranges and higher probabilities **[choice]**: the paper names the
    changes (for MRI), not their ranges. Channels of one scheme are changed together, as those of a z-scored image are;
    no channel sees one of another scheme. A scheme that is not nnU-Net's is taken for z-score, as nnU-Net takes an
    unknown channel name.

    Args:
        normalization_schemes: the configuration's, one name per channel.
        intensity_properties: the plans' ``foreground_intensity_properties_per_channel``; read for CT channels, which
            nnU-Net cannot normalize without.
        dummy_2d: whether the spatial augmentation takes thick slices one by one; then so does the blur.
    """
    channels_of: dict[str, list[int]] = {}
    for channel, scheme in enumerate(normalization_schemes):
        channels_of.setdefault(scheme if scheme in _CHANGES else _Z_SCORE, []).append(channel)
    transforms = []
    for scheme, channels in channels_of.items():
        known = _changes(dummy_2d)
        changes: list[BasicTransform] = [known[name] for name in _CHANGES[scheme]]
        # What the normalization cannot give, the network never sees in an image: noise in air, or whiter than white.
        if scheme == _CT:
            changes.append(ClipTransform([_ct_range(intensity_properties[str(channel)]) for channel in channels]))
        elif scheme in (_RESCALED, _RGB):
            changes.append(ClipTransform([(0.0, 1.0)] * len(channels)))
        transforms.append(ChannelsTransform(ComposeTransforms(changes), channels))
    return ComposeTransforms(transforms)


def _ct_range(properties: Mapping[str, float]) -> tuple[float, float]:
    """Lowest and highest value that nnU-Net's CTNormalization gives."""
    std = max(properties["std"], 1e-8)
    low, high = ((properties[name] - properties["mean"]) / std for name in ("percentile_00_5", "percentile_99_5"))
    return low, high


def _changes(dummy_2d: bool) -> dict[str, RandomTransform]:
    blur: BasicTransform = GaussianBlurTransform(
        blur_sigma=(0.5, 1.0), synchronize_channels=True, synchronize_axes=False, p_per_channel=1
    )
    if dummy_2d:
        # nnU-Net's low-resolution transform leaves the thick axis alone here, its blur does not. With a sigma of one
        # slice the first and last slice of a patch would be more of their neighbor than of themselves, while the
        # pseudo-label is that of the slice.
        blur = ComposeTransforms([Convert3DTo2DTransform(), blur, Convert2DTo3DTransform()])
    return {
        "bias field": RandomTransform(BiasFieldTransform(), apply_probability=0.5),
        "gamma": RandomTransform(
            GammaTransform(
                gamma=BGContrast((0.5, 2.0)),
                p_invert_image=0,
                synchronize_channels=False,
                p_per_channel=1,
                p_retain_stats=1,
            ),
            apply_probability=0.5,
        ),
        "brightness": RandomTransform(
            MultiplicativeBrightnessTransform(
                multiplier_range=BGContrast((0.5, 1.5)), synchronize_channels=False, p_per_channel=1
            ),
            apply_probability=0.5,
        ),
        "contrast": RandomTransform(
            ContrastTransform(
                contrast_range=BGContrast((0.5, 1.5)),
                preserve_range=True,
                synchronize_channels=False,
                p_per_channel=1,
            ),
            apply_probability=0.5,
        ),
        "blur": RandomTransform(blur, apply_probability=0.3),
        "noise": RandomTransform(
            GaussianNoiseTransform(noise_variance=(0, 0.2), p_per_channel=1, synchronize_channels=True),
            apply_probability=0.5,
        ),
        "relative noise": RandomTransform(RelativeNoiseTransform(), apply_probability=0.5),
    }


class PatchViews(NamedTuple):
    """Views of one unlabeled patch, each (C, *patch size).

    Attributes:
        weak: moved as nnU-Net moves labeled images, intensities as they are.
        strong: with strong changes of intensity.
        augmented: with nnU-Net's own changes of intensity, so augmented as labeled images are; None if not asked for.
    """

    weak: Tensor
    strong: list[Tensor]
    augmented: Tensor | None


class UnlabeledViews:
    """Makes the views of one patch: the weak view, and others of the same spatial sample.

    Args:
        training_transforms: nnU-Net's training transforms. Those that move voxels are kept as they are, with
            the parameters that nnU-Net, or a trainer derived from it, chose for the labeled images.
        strong: how many strong views.
        augmented: whether there is a view with nnU-Net's own changes of intensity.
        normalization_schemes: the configuration's, one name per channel.
        intensity_properties: the plans' ``foreground_intensity_properties_per_channel``.
    """

    def __init__(
        self,
        training_transforms: BasicTransform,
        *,
        strong: int,
        augmented: bool = False,
        normalization_schemes: Sequence[str],
        intensity_properties: Mapping[str, Mapping[str, float]],
    ) -> None:
        transforms = flat(training_transforms)
        self.spatial = ComposeTransforms([t for t in transforms if isinstance(t, _SPATIAL)])
        self.from_segmentation = ComposeTransforms([t for t in transforms if isinstance(t, _FROM_SEGMENTATION)])
        self.errors = ComposeTransforms([t for t in transforms if isinstance(getattr(t, "transform", None), _ERRORS)])
        self.intensity = strong_intensity_transforms(
            normalization_schemes,
            intensity_properties,
            dummy_2d=any(isinstance(t, Convert3DTo2DTransform) for t in transforms),
        )
        self.strong = strong
        self.augmentation = ComposeTransforms([t for t in transforms if _changes_intensity(t)]) if augmented else None

    @property
    def needs_segmentation(self) -> bool:
        """Whether the image is zero outside a mask, or has the previous stage's segmentation as channels."""
        return bool(self.from_segmentation.transforms)

    def __call__(self, image: Tensor, segmentation: Tensor | None = None) -> PatchViews:
        """Views of one patch.

        Args:
            image: (C, *initial patch size), float32.
            segmentation: (1, *initial patch size), below 0 outside the image; in a cascade (2, *initial patch size),
                the second channel the previous stage's segmentation. Only where it is needed.

        Returns:
            The views. In a cascade C counts a channel more for each foreground label, which is 1 where the previous
            stage found it. **[choice]** In all views but the weak one it has the errors that nnU-Net puts into that of
            labeled images.
        """
        return self.of_sample(self.moved(image, segmentation))

    def moved(self, image: Tensor, segmentation: Tensor | None) -> dict[str, Tensor]:
        """A patch as ``spatial`` moves it: its ``image``, of any channels, and ``segmentation`` where it has one."""
        sample = {"image": image} if segmentation is None else {"image": image, "segmentation": segmentation}
        return self.spatial(**sample)

    def of_sample(self, sample: Mapping[str, Tensor]) -> PatchViews:
        """Views of what :meth:`moved` has made of a patch."""
        weak = sample["image"].contiguous()
        # The transforms work in place.
        changed = [self.intensity(image=weak.clone())["image"] for _ in range(self.strong)]
        if self.augmentation is not None:
            changed.append(self.augmentation(image=weak.clone())["image"])
        if self.needs_segmentation:
            weak, *changed = (
                self.from_segmentation(image=view, segmentation=sample["segmentation"])["image"]
                for view in [weak, *changed]
            )
        changed = [self.errors(image=view)["image"] for view in changed]
        return PatchViews(weak, changed[: self.strong], changed[-1] if self.augmentation is not None else None)


def _changes_intensity(transform: BasicTransform) -> bool:
    """Whether it is one of nnU-Net's changes of intensity, or one that a trainer has added to them."""
    inner = getattr(transform, "transform", transform)
    return isinstance(inner, ImageOnlyTransform) and not isinstance(inner, (*_FROM_SEGMENTATION, *_ERRORS))


def flat(transform: BasicTransform) -> list[BasicTransform]:
    """The transforms that a composed one applies, in order."""
    if isinstance(transform, WithWeakView):
        return [*transform.moving.transforms, *transform.then.transforms]
    if isinstance(transform, ComposeTransforms):
        return [one for inner in transform.transforms for one in flat(inner)]
    return [transform]


class WithWeakView(BasicTransform):
    """nnU-Net's training transforms of labeled patches, which also append the weak view to the list of segmentations.

    The weak view is the image as moved, before its intensities change. For this, all transforms that move voxels come
    first; nnU-Net mirrors after the changes of intensity, which makes no difference to what is drawn on average.

    Args:
        transforms: nnU-Net's, in its order.

    Attributes:
        moving: those that move voxels.
        then: the others.
    """

    def __init__(self, transforms: Sequence[BasicTransform]) -> None:
        moving = [t for t in transforms if isinstance(t, _SPATIAL)]
        super().__init__()
        self.moving = ComposeTransforms(moving)
        self.then = ComposeTransforms([t for t in transforms if not isinstance(t, _SPATIAL)])
        self._from_segmentation = ComposeTransforms([t for t in transforms if isinstance(t, _FROM_SEGMENTATION)])

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Transform one patch: its ``image`` (C, *spatial) and ``segmentation`` (1 or 2, *spatial)."""
        data_dict = self.moving(**data_dict)
        weak = self._from_segmentation(
            image=data_dict["image"].clone(), segmentation=data_dict["segmentation"].clone()
        )["image"]
        data_dict = self.then(**data_dict)
        segmentation = data_dict["segmentation"]
        levels = segmentation if isinstance(segmentation, list) else [segmentation]
        return {**data_dict, "segmentation": [*levels, weak]}
