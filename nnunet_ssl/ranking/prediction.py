"""Predictions of several models for one case, through nnU-Net's own predictor."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from numpy.typing import NDArray

from nnunet_ssl.data.corrections import write_labels
from nnunet_ssl.data.image_checks import BadImageError, check_image, describe_labeled_images, read_image
from nnunet_ssl.errors import UserError
from nnunet_ssl.ranking.scores import ENTROPY_STEP
from nnunet_ssl.text import one_line


@dataclass(frozen=True)
class PreparedCase:
    """An image, ready for the networks.

    Attributes:
        image: first channel as read, (Z, Y, X).
        data: all channels as preprocessed.
        properties: of the image, which the way back needs.
    """

    image: NDArray[np.floating]
    data: torch.Tensor
    properties: dict[str, Any]


@dataclass(frozen=True)
class CasePrediction:
    """Predictions of a case, as large as its image.

    Attributes:
        consensus: label map of the mean probabilities, (Z, Y, X).
        probabilities: mean over the models, (C, Z, Y, X).
        label_maps: of each model.
    """

    consensus: NDArray[np.integer]
    probabilities: NDArray[np.float32]
    label_maps: list[NDArray[np.integer]]


class Ensemble:
    """Models, each loaded once. A trainer's folds share one network, into which nnU-Net puts a fold's weights."""

    def __init__(
        self,
        folders: Mapping[Path, Sequence[int | str]],
        checkpoint: str,
        preprocessed: Path,
        *,
        device: torch.device,
        mirroring: bool,
    ) -> None:
        """Load the models, as nnUNetv2_predict does.

        Args:
            folders: folds by the folder of the trainer's models.
            checkpoint: name of the file in a fold's folder.
            preprocessed: the dataset's folder in nnUNet_preprocessed, for what the labeled images are like.
            device: to predict on.
            mirroring: nnU-Net's test-time augmentation.

        Raises:
            UserError: a checkpoint cannot be loaded.
        """
        self._predictors: list[tuple[nnUNetPredictor, dict[str, Any]]] = []
        for folder, folds in folders.items():
            on_gpu = device.type == "cuda"
            try:
                # It prints where it looks for trainers.
                with contextlib.redirect_stdout(io.StringIO()):
                    predictor = nnUNetPredictor(
                        use_mirroring=mirroring, perform_everything_on_device=on_gpu, device=device, allow_tqdm=False
                    )
                    predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), checkpoint)
            except UserError:
                raise
            except Exception as error:
                files = ", ".join(str(folder / f"fold_{fold}" / checkpoint) for fold in folds)
                raise UserError(f"A checkpoint cannot be loaded: {files}: {one_line(error).rstrip('.')}.") from error
            names = [f"{folder.name.split('__')[0]} fold {fold}" for fold in folds]
            self._predictors.append((predictor, dict(zip(names, predictor.list_of_parameters, strict=True))))
        self._first = self._predictors[0][0]
        manager = self._first.plans_manager
        self.reader = manager.image_reader_writer_class()
        channels = len(self._first.dataset_json.get("channel_names", self._first.dataset_json.get("modality")))
        self._labeled = describe_labeled_images(preprocessed, manager, channels)

    @property
    def regions(self) -> bool:
        """Whether the models predict regions."""
        return bool(self._first.label_manager.has_regions)

    def prepare(self, files: Sequence[Path]) -> PreparedCase:
        """Read a case and preprocess it, once for all models.

        Args:
            files: its images, one per channel.

        Raises:
            BadImageError: it cannot be used.
        """
        for file in files:
            if not file.is_file():
                raise BadImageError(f"{file} does not exist")
        image, properties = read_image(self.reader, files)
        check_image(image, [float(size) for size in properties["spacing"]], labeled=self._labeled)
        first = self._first
        preprocessor = first.configuration_manager.preprocessor_class(verbose=False)
        try:
            data, _, properties = preprocessor.run_case_npy(
                image, None, properties, first.plans_manager, first.configuration_manager, first.dataset_json
            )
        except MemoryError:
            raise
        except Exception as error:
            raise BadImageError(f"nnU-Net's preprocessing failed: {one_line(error)}") from error
        return PreparedCase(image[0], torch.from_numpy(data).to(torch.float32).contiguous(), properties)

    def predict(self, case: PreparedCase) -> CasePrediction:
        """Predict with all models, one after the other; no more than two models' probabilities are in memory.

        Raises:
            BadImageError: a model's prediction is no number somewhere. Argmax would call that background.
        """
        total: NDArray[np.float32] | None = None
        label_maps: list[NDArray[np.integer]] = []
        for predictor, weights in self._predictors:
            for name, parameters in weights.items():
                predictor.list_of_parameters = [parameters]
                logits = _logits(predictor, case.data, name)
                label_map, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
                    logits,
                    predictor.plans_manager,
                    predictor.configuration_manager,
                    predictor.label_manager,
                    case.properties,
                    return_probabilities=True,
                )
                label_maps.append(label_map)
                if total is None:
                    total = np.array(probabilities, np.float32)
                else:
                    total += probabilities
                del logits, probabilities
        assert total is not None
        total /= len(label_maps)
        consensus = self._first.label_manager.convert_probabilities_to_segmentation(total)
        return CasePrediction(np.asarray(consensus).astype(label_maps[0].dtype), total, label_maps)

    def write(self, label_map: NDArray[np.integer], file: Path, properties: dict[str, Any]) -> None:
        """Write a label map as nnU-Net writes its predictions, in the image's geometry; errors as of write_labels."""
        write_labels(self.reader, label_map, file, properties)

    def write_map(self, values: NDArray[np.float32], file: Path, properties: dict[str, Any]) -> None:
        """Write an :func:`~nnunet_ssl.ranking.scores.entropy_map` as a NIfTI of single precision, in the same geometry.

        nnU-Net's writers know where voxels lie, and whole numbers alone. So they write the multiples, which are scaled
        afterwards; errors as of :meth:`write`. A format without geometry, such as PNG, gives the voxels their spacing
        alone.
        """
        if not {"sitk_stuff", "nibabel_stuff"} & set(properties):
            spacing = [float(size) for size in properties["spacing"]]
            affine = np.diag([*spacing[:0:-1], 1.0 if len(values) == 1 else spacing[0], 1.0])
            nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), affine), file)  # type: ignore[attr-defined]
            return
        self.reader.write_seg(np.rint(values / ENTROPY_STEP).astype(np.uint16), str(file), properties)
        try:
            steps = nibabel.load(file)
            scaled = np.asarray(steps.dataobj, np.float32) * np.float32(ENTROPY_STEP)  # type: ignore[attr-defined]
        except Exception as error:
            # A full disk is no error to every library.
            raise BadImageError(f"what was written cannot be read again: {one_line(error)}") from error
        image = nibabel.Nifti1Image(scaled, None, steps.header)  # type: ignore[attr-defined]
        image.set_data_dtype(np.float32)
        nibabel.save(image, file)  # type: ignore[attr-defined]


def _logits(predictor: nnUNetPredictor, data: torch.Tensor, model: str) -> torch.Tensor:
    """What a model predicts.

    Raises:
        BadImageError: it is not a number, or infinite, somewhere.
    """
    try:
        logits = predictor.predict_logits_from_preprocessed_data(data)
    except RuntimeError as error:
        if "inf in predicted array" not in str(error):
            raise
        finite = False
    else:
        finite = not bool(torch.isnan(logits).any())
    if not finite:
        raise BadImageError(
            f"{model} predicts values that are not numbers (NaN or infinite) for it; leave this model out, or train it "
            "again if it predicts them for other cases too"
        )
    return logits.cpu()
