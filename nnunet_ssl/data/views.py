"""The views of an unlabeled patch: one weak, and strong ones of the same spatial sample."""

from __future__ import annotations

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor
from torch.nn.functional import interpolate

_SPATIAL = (Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform, MirrorTransform)


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


def strong_intensity_transforms() -> ComposeTransforms:
    """Intensity changes of a strong view: bias field, gamma, brightness, contrast, blur and noise.

    nnU-Net's own intensity transforms with wider ranges and higher probabilities **[choice]**: the paper names the
    changes, not their ranges.
    """
    return ComposeTransforms(
        [
            RandomTransform(BiasFieldTransform(), apply_probability=0.5),
            RandomTransform(
                GammaTransform(
                    gamma=BGContrast((0.5, 2.0)),
                    p_invert_image=0,
                    synchronize_channels=False,
                    p_per_channel=1,
                    p_retain_stats=1,
                ),
                apply_probability=0.5,
            ),
            RandomTransform(
                MultiplicativeBrightnessTransform(
                    multiplier_range=BGContrast((0.5, 1.5)), synchronize_channels=False, p_per_channel=1
                ),
                apply_probability=0.5,
            ),
            RandomTransform(
                ContrastTransform(
                    contrast_range=BGContrast((0.5, 1.5)),
                    preserve_range=True,
                    synchronize_channels=False,
                    p_per_channel=1,
                ),
                apply_probability=0.5,
            ),
            RandomTransform(
                GaussianBlurTransform(
                    blur_sigma=(0.5, 1.0), synchronize_channels=True, synchronize_axes=False, p_per_channel=1
                ),
                apply_probability=0.3,
            ),
            RandomTransform(
                GaussianNoiseTransform(noise_variance=(0, 0.2), p_per_channel=1, synchronize_channels=True),
                apply_probability=0.5,
            ),
        ]
    )


class UnlabeledViews:
    """Makes the views of one patch: the weak view, and ``strong`` views of the same spatial sample.

    Args:
        training_transforms: nnU-Net's training transforms. Those that move voxels are taken over as they are, with
            the parameters that nnU-Net, or a trainer derived from it, chose for the labeled images.
        strong: how many strong views.
    """

    def __init__(self, training_transforms: BasicTransform, *, strong: int) -> None:
        transforms = training_transforms.transforms
        self.spatial = ComposeTransforms([t for t in transforms if isinstance(t, _SPATIAL)])
        self.outside = ComposeTransforms([t for t in transforms if isinstance(t, MaskImageTransform)])
        self.intensity = strong_intensity_transforms()
        self.strong = strong

    @property
    def needs_segmentation(self) -> bool:
        """Whether the image is set to zero outside a mask that only the preprocessed segmentation holds."""
        return bool(self.outside.transforms)

    def __call__(self, image: Tensor, segmentation: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Views of one patch.

        Args:
            image: (C, *initial patch size), float32.
            segmentation: (1, *initial patch size), below 0 outside the image; only where it is needed.

        Returns:
            The weak view and the list of strong views, each (C, *patch size).
        """
        sample = {"image": image} if segmentation is None else {"image": image, "segmentation": segmentation}
        sample = self.spatial(**sample)
        weak = sample["image"].contiguous()
        # The transforms work in place.
        strong = [self.intensity(image=weak.clone())["image"] for _ in range(self.strong)]
        if self.needs_segmentation:
            masked = [
                self.outside(image=view, segmentation=sample["segmentation"])["image"] for view in [weak, *strong]
            ]
            weak, strong = masked[0], masked[1:]
        return weak, strong
