"""Batches of unlabeled patches, made by worker processes as nnU-Net's labeled batches are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from threadpoolctl import threadpool_limits

from nnunet_ssl.data.cutmix import CutMix
from nnunet_ssl.data.predicted_foreground import ANYWHERE, Aim, PredictedForeground, coordinates_of, subsampled
from nnunet_ssl.data.unlabeled_cases import UnlabeledCase
from nnunet_ssl.data.views import PatchViews, UnlabeledViews


def unlabeled_workers(labeled: int, cores: int) -> int:
    """How many worker processes make unlabeled batches: as many as nnU-Net's labeled ones, or half of them.

    nnU-Net starts half as many again for validation. Half it is where the machine has fewer cores than all of them
    together: more processes than cores make no more batches, and each takes its memory.

    Args:
        labeled: nnU-Net's number for the labeled training batches of one process; 0 for none.
        cores: the machine's, for each process that trains.
    """
    together = labeled + max(1, labeled // 2) + labeled
    return labeled if labeled == 0 or together <= cores else max(1, labeled // 2)


class UnlabeledDataset:
    """Preprocessed unlabeled cases, read block by block from disk with nnU-Net's own dataset classes.

    Args:
        cases: the cases.
        previous_stage: in a cascade, the folder of their segmentations by the previous stage, one folder per source
            in it.

    Attributes:
        identifiers: one key per case, ``source/case``: a case of imagesUn may bear the name of one of imagesTr.
    """

    def __init__(self, cases: Sequence[UnlabeledCase], previous_stage: Path | None = None) -> None:
        self._cases = {f"{case.source}/{case.identifier}": case for case in cases}
        self.identifiers = sorted(self._cases)
        self._sources = {
            source: infer_dataset_class(str(folder))(
                str(folder),
                [case.identifier for case in cases if case.source == source],
                None if previous_stage is None else str(previous_stage / source),
            )
            for source, folder in sorted({(case.source, case.folder) for case in cases})
        }

    def load_case(self, key: str) -> tuple[Any, Any, Any]:
        """Image (C, X, Y, Z), segmentation (1, X, Y, Z) and the previous stage's segmentation (X, Y, Z) of a case.

        They are arrays that read from disk when sliced; the last one is None where there is no previous stage.
        """
        case = self._cases[key]
        image, segmentation, previous, _ = self._sources[case.source].load_case(case.identifier)
        return image, segmentation, previous


class UnlabeledDataLoader(nnUNetDataLoader):
    """Yields unlabeled batches without end.

    A batch is a dict:

    - ``weak``: (U, C, *patch size), float32;
    - ``strong``: a list of tensors like ``weak``, one per strong view, of the same spatial samples;
    - ``boxes``: one CutMix box per strong view and sample, a list of (U, dim, 2) int64 (see :class:`CutMix`);
    - ``partner``: (U,) int64, for each sample another one of the batch to mix with;
    - ``augmented``, where the method asks for it: like ``weak``, with nnU-Net's own changes of intensity;
    - ``keys``: the U cases;
    - where a class is rare, ``aims``, what each patch was centered on, those cropped at random first, and
      ``coordinates`` of its voxels, (U, 3, *:func:`~nnunet_ssl.data.predicted_foreground.subsampled`).

    Args:
        labeled: nnU-Net's loader of labeled training batches, whose patch sizes and transforms this one shares.
        dataset: the unlabeled cases.
        batch_size: U, at least 2.
        views: makes the views of a patch.
        cutmix: how boxes are drawn; None where there is no strong view.
        foreground: where the network has predicted foreground; None to cut all patches anywhere.
        foreground_share: of how many patches are centered there, where a class is rare.
    """

    def __init__(
        self,
        labeled: nnUNetDataLoader,
        dataset: UnlabeledDataset,
        batch_size: int,
        *,
        views: UnlabeledViews,
        cutmix: CutMix | None,
        foreground: PredictedForeground | None = None,
        foreground_share: float = 0.0,
    ) -> None:
        # Not nnUNetDataLoader's: it wants a label manager, whose only use is to find labels.
        super(nnUNetDataLoader, self).__init__(dataset, batch_size, 1, None, True, False, True, None)
        self.indices = dataset.identifiers
        self.patch_size_was_2d = labeled.patch_size_was_2d
        self.patch_size = labeled.patch_size
        self.final_patch_size = labeled.final_patch_size
        self.need_to_pad = labeled.need_to_pad
        self.has_ignore = False
        self.views = views
        self.cutmix = cutmix
        self.foreground = foreground
        self.foreground_share = foreground_share
        self._seeded_in: int | None = os.getpid()

    def generate_train_batch(self) -> dict[str, Any]:
        """One batch; called by the worker processes."""
        self._seed_this_process()
        keys = list(self.get_indices())
        aimed = self.foreground is not None and bool(self.foreground.rare)
        # Those that are cropped at random come first, as in nnU-Net's batches.
        drawn = sorted(
            ((key, self._aim(key) if aimed else ANYWHERE) for key in keys), key=lambda pair: pair[1].structure >= 0
        )
        keys, aims = [key for key, _ in drawn], [aim for _, aim in drawn]
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            patches = [self._patch(key, aim, with_coordinates=aimed) for key, aim in zip(keys, aims, strict=True)]
        weak = torch.stack([views.weak for views, _ in patches])
        strong = [torch.stack(view) for view in zip(*(views.strong for views, _ in patches), strict=True)]
        patch_size = weak.shape[2:]
        boxes = [torch.from_numpy(self.cutmix.draw(len(keys), patch_size)) for _ in strong] if self.cutmix else []
        partner = (torch.arange(len(keys)) + np.random.randint(1, len(keys))) % len(keys)
        batch = {"weak": weak, "strong": strong, "boxes": boxes, "partner": partner, "keys": keys}
        augmented = [views.augmented for views, _ in patches if views.augmented is not None]
        if augmented:
            batch["augmented"] = torch.stack(augmented)
        if aimed:
            batch |= {"aims": aims, "coordinates": torch.stack([coordinates for _, coordinates in patches])}
        return batch

    def _aim(self, key: str) -> Aim:
        assert self.foreground is not None
        return self.foreground.draw(key) if np.random.uniform() < self.foreground_share else ANYWHERE

    def _patch(self, key: str, aim: Aim, *, with_coordinates: bool) -> tuple[PatchViews, Any]:
        """The views of a patch, and subsampled coordinates of its voxels or None."""
        image, segmentation, box = self._crop(key, aim)
        channels = len(image)
        if with_coordinates:
            # As channels of the image they are moved as its voxels are.
            coordinates = coordinates_of(box)
            image = torch.cat((image, coordinates[:, 0] if self.patch_size_was_2d else coordinates))
        sample = self.views.moved(image, segmentation)
        sample["image"], coordinates = sample["image"][:channels], sample["image"][channels:]
        return self.views.of_sample(sample), subsampled(coordinates) if with_coordinates else None

    def _crop(self, key: str, aim: Aim) -> tuple[torch.Tensor, torch.Tensor | None, list[list[int]]]:
        image, segmentation, previous = self._data.load_case(key)
        shape = image.shape[1:]
        # A voxel of any key is as good, and nnU-Net's are numbered with the channel first.
        voxel = np.minimum(aim.voxel, np.asarray(shape) - 1)
        lower, upper = self.get_bbox(shape, aim.structure >= 0, {0: np.asarray([[0, *voxel]])})
        box = [[int(low), int(high)] for low, high in zip(lower, upper, strict=True)]
        crop = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
        crop = crop[:, 0] if self.patch_size_was_2d else crop
        if not self.views.needs_segmentation:
            return crop, None, box
        channels = [crop_and_pad_nd(segmentation, box, -1, cast_cropped_to=np.int16)]
        if previous is not None:
            channels.append(crop_and_pad_nd(previous, box, -1, cast_cropped_to=np.int16)[None])
        labels = torch.from_numpy(np.concatenate(channels).astype(np.int16, copy=False))
        return crop, labels[:, 0] if self.patch_size_was_2d else labels, box

    def _seed_this_process(self) -> None:
        # Workers inherit torch's random state from the process that starts them, or all begin with torch's default
        # seed. batchgenerators seeds only NumPy in each, so without this they would all draw the same.
        if self._seeded_in != os.getpid():
            torch.manual_seed(np.random.randint(2**31 - 1))
            self._seeded_in = os.getpid()
