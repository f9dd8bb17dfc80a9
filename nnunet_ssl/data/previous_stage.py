"""Cascades: what the previous stage makes of the unlabeled cases.

nnU-Net's second stage sees the first one's segmentation as further channels. For labeled cases nnU-Net writes it when
the first stage validates its folds; for unlabeled cases it is predicted here, by the first stage of the same fold,
which has not seen the labels of the fold's validation cases either.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.file_path_utilities import check_workers_alive_and_busy
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from tqdm import tqdm

from nnunet_ssl.data.prepare import UnlabeledSource
from nnunet_ssl.data.unlabeled_cases import UnlabeledCase
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import remove_abandoned, replacing
from nnunet_ssl.text import some_of


def previous_stage_folder(previous_results: Path, configuration: str, fold: int | str) -> Path:
    """Where the segmentations of unlabeled cases are, in one folder per source: ``imagesUn``, ``imagesTr``.

    Args:
        previous_results: results of the previous stage, such as ``Trainer__nnUNetPlans__3d_lowres``.
        configuration: the one that uses them.
        fold: of both stages.
    """
    return previous_results / "predicted_next_stage" / f"{configuration}_unlabeled" / f"fold_{fold}"


def check_labeled_cases(folder: Path, cases: Sequence[str], *, to_do: str) -> None:
    """Whether nnU-Net has the previous stage's segmentation of all labeled cases of a fold.

    Args:
        folder: where nnU-Net keeps them.
        cases: for training and validation.
        to_do: what to do if any is missing.

    Raises:
        UserError: some are missing.
    """
    missing = sorted(
        case for case in cases if not any((folder / f"{case}{end}").is_file() for end in (".b2nd", ".npz"))
    )
    if missing:
        raise UserError(
            f"{len(missing)} labeled case(s) have no segmentation of the previous stage in {folder}: "
            f"{some_of(missing)}. nnU-Net writes the segmentation of a case at the end of the fold that validates "
            f"it. {to_do}"
        )


@dataclass(frozen=True)
class PreviousStage:
    """The first stage of a cascade, trained by the same trainer on the same fold.

    Attributes:
        labeled: where nnU-Net keeps its segmentations of labeled cases, for the stage that uses them.
        configuration: its own.
    """

    labeled: Path
    configuration: str

    @property
    def results(self) -> Path:
        """Its folder in nnUNet_results."""
        return self.labeled.parents[1]

    def to_do(self, source: UnlabeledSource) -> str:
        """What to do where it is not trained."""
        return (
            f"Train all folds of the previous stage: nnUNetv2_train {source.plans_manager.dataset_name} "
            f"{self.configuration} FOLD -tr {source.trainer_name}"
        )

    def checkpoint(self, source: UnlabeledSource, labeled_cases: Sequence[str]) -> Path:
        """The file of its checkpoint.

        Raises:
            UserError: it is not trained, or has not validated all labeled cases of the fold.
        """
        to_do = self.to_do(source)
        file = self.results / f"fold_{source.fold}" / "checkpoint_final.pth"
        if not file.is_file():
            raise UserError(f"{source.configuration} needs {file}, which does not exist. {to_do}")
        check_labeled_cases(self.labeled, labeled_cases, to_do=to_do)
        return file

    def segment(
        self,
        cases: Sequence[UnlabeledCase],
        source: UnlabeledSource,
        checkpoint_file: Path,
        *,
        network: nn.Module,
        mirroring_axes: tuple[int, ...] | None,
        log: Callable[[str], None],
    ) -> Path:
        """Predict what is missing of its segmentations of unlabeled cases; returns their folder.

        Args:
            cases: to predict, preprocessed for the stage that uses the segmentations.
            source: of the cases, which are preprocessed for this stage too.
            checkpoint_file: of :meth:`checkpoint`.
            network: nnU-Net's network of this stage, with the checkpoint's weights, on the device to predict on.
            mirroring_axes: for test-time mirroring, as the checkpoint has them.
            log: takes lines of progress.
        """
        folder = previous_stage_folder(self.results, source.configuration, source.fold)
        segment_by_previous_stage(
            cases,
            source.collect(self.configuration),
            folder=folder,
            checkpoint=checkpoint_file,
            network=network,
            mirroring_axes=mirroring_axes,
            plans_manager=source.plans_manager,
            configuration=self.configuration,
            dataset_json=source.dataset_json,
            log=log,
        )
        return folder


def segment_by_previous_stage(
    cases: Sequence[UnlabeledCase],
    images: Sequence[UnlabeledCase],
    *,
    folder: Path,
    checkpoint: Path,
    network: nn.Module,
    mirroring_axes: tuple[int, ...] | None,
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: dict[str, Any],
    log: Callable[[str], None] = print,
) -> None:
    """Predict those unlabeled cases that have no segmentation yet, or one older than their image or the checkpoint.

    Each appears whole or not at all, so an interrupted run is continued by the next.

    Args:
        cases: preprocessed for the stage that uses the segmentations.
        images: the same cases, preprocessed for the previous stage.
        folder: of :func:`previous_stage_folder`.
        checkpoint: file of the previous stage.
        network: nnU-Net's network of the previous stage, with the checkpoint's weights, on the device to predict on.
        mirroring_axes: for test-time mirroring, as the checkpoint has them.
        plans_manager: of both stages.
        configuration: the previous stage's.
        dataset_json: the dataset.
        log: takes lines of progress.

    Raises:
        UserError: a case is not preprocessed for the previous stage.
    """
    sources = {(case.source, case.identifier): case for case in images}
    unknown = [case.identifier for case in cases if (case.source, case.identifier) not in sources]
    if unknown:
        raise UserError(
            f"Unlabeled case(s) are not preprocessed for the previous stage {configuration}: {some_of(unknown)}. "
            f"nnunet-ssl preprocess -c {configuration} says why."
        )
    to_do = [case for case in cases if not _up_to_date(case, folder, checkpoint)]
    if not to_do:
        return
    log(f"Predicting {len(to_do)} unlabeled case(s) with the previous stage, {checkpoint}, into {folder}")
    manager = plans_manager.get_configuration(configuration)
    device = next(network.parameters()).device
    in_the_making = f"{folder.name}_tmp_"
    remove_abandoned(_made(folder.parent), in_the_making)
    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)
    predictor.manual_initialization(network, plans_manager, manager, None, dataset_json, "", mirroring_axes)
    with (
        tempfile.TemporaryDirectory(prefix=in_the_making, dir=folder.parent) as temporary,
        multiprocessing.get_context("spawn").Pool(min(default_num_processes, len(to_do))) as pool,
    ):
        workers: list[Any] = list(pool._pool)  # type: ignore[attr-defined]
        results: list[Any] = []
        for index, case in enumerate(tqdm(to_do, "previous stage", unit="case", disable=None, file=sys.stderr)):
            while check_workers_alive_and_busy(pool, workers, results, allowed_num_queued=2):
                time.sleep(0.1)
            image, _, _, properties = _load_case(sources[case.source, case.identifier])
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image[:].copy())).cpu()
            shape = tuple(_load_case(case)[0].shape[1:])
            target = _made(folder / case.source) / f"{case.identifier}.b2nd"
            arguments = (logits, shape, plans_manager, configuration, properties, dataset_json)
            results.append(pool.apply_async(_resample, (*arguments, Path(temporary, str(index)), target)))
        for result in results:
            result.get()


def _up_to_date(case: UnlabeledCase, folder: Path, checkpoint: Path) -> bool:
    segmentation = folder / case.source / f"{case.identifier}.b2nd"
    if not segmentation.is_file():
        return False
    image = case.folder / f"{case.identifier}.pkl"
    return segmentation.stat().st_mtime >= max(checkpoint.stat().st_mtime, image.stat().st_mtime)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _load_case(case: UnlabeledCase) -> Any:
    """Image, segmentation, None and properties, as nnU-Net's dataset gives them."""
    dataset = infer_dataset_class(str(case.folder))(str(case.folder), [case.identifier])
    return dataset.load_case(case.identifier)


def _resample(
    logits: torch.Tensor,
    shape: tuple[int, ...],
    plans_manager: PlansManager,
    configuration: str,
    properties: dict[str, Any],
    dataset_json: dict[str, Any],
    temporary: Path,
    target: Path,
) -> None:
    manager = plans_manager.get_configuration(configuration)
    with replacing(target, aside=Path(f"{temporary}.b2nd")):
        resample_and_save(
            logits, list(shape), str(temporary), plans_manager, manager, properties, dataset_json,
            default_num_processes, nnUNetDatasetBlosc2,
        )  # fmt: skip
