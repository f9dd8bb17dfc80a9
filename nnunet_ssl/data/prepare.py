"""Before a training: preprocess the unlabeled cases, collect those of the fold, and check them for leaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.fold_check import check_fold, train_all
from nnunet_ssl.data.leak_guard import check_leaks
from nnunet_ssl.data.preprocessing import preprocess_unlabeled
from nnunet_ssl.data.splits import SPLITS_FILE
from nnunet_ssl.data.unlabeled_cases import (
    UnlabeledCase,
    collect_unlabeled_cases,
    no_unlabeled_cases_message,
    preprocessed_cases,
)
from nnunet_ssl.data.worker_processes import default_workers
from nnunet_ssl.distributed import Ranks
from nnunet_ssl.errors import UserError


@dataclass(frozen=True)
class UnlabeledSource:
    """Where the unlabeled cases of a training come from.

    Attributes:
        raw: the dataset in nnUNet_raw; None on a machine that has the preprocessed data alone.
        preprocessed: the dataset in nnUNet_preprocessed.
        plans_manager: nnU-Net's plans.
        dataset_json: nnU-Net's description of the dataset.
        fold: a number or ``all``.
        configuration: that is trained.
        trainer_name: of its class.
    """

    raw: Path | None
    preprocessed: Path
    plans_manager: PlansManager
    dataset_json: dict[str, Any]
    fold: int | str
    configuration: str
    trainer_name: str

    def check_fold(self, log: Callable[..., None]) -> None:
        """Check the fold before any work; what does not stop a training is logged.

        Raises:
            UserError: see :func:`~nnunet_ssl.data.fold_check.check_fold`.
        """
        plans = self.plans_manager
        labeled = self.labeled_folder
        notes = check_fold(
            self.preprocessed / SPLITS_FILE,
            self.fold,
            labeled,
            preprocessed_cases(labeled),
            train_all=train_all(plans.dataset_name, self.configuration, plans.plans_name, self.trainer_name),
        )
        for note in notes:
            log(f"WARNING: {note}")

    @property
    def labeled_folder(self) -> Path:
        """Of the preprocessed labeled cases."""
        return self.preprocessed / self.plans_manager.get_configuration(self.configuration).data_identifier

    def preprocess(self, configuration: str, log: Callable[..., None]) -> None:
        """Bring the cases of imagesUn up to date for a configuration; ``log`` is nnU-Net's print_to_log_file."""
        report = preprocess_unlabeled(
            raw_dataset_folder=self.raw,
            preprocessed_dataset_folder=self.preprocessed,
            plans_manager=self.plans_manager,
            configuration=configuration,
            dataset_json=self.dataset_json,
            num_processes=default_workers(),
            log=log,
        )
        if report.done or report.removed or report.failed or report.warnings:
            log(report.table(), add_timestamp=False)

    def collect(self, configuration: str) -> list[UnlabeledCase]:
        """The fold's unlabeled cases, as they are preprocessed for a configuration."""
        manager = self.plans_manager.get_configuration(configuration)
        return collect_unlabeled_cases(self.preprocessed, manager.data_identifier, self.fold)


def prepare_unlabeled_cases(
    source: UnlabeledSource,
    split: Callable[[], tuple[list[str], list[str]]],
    *,
    allow_transductive: bool,
    ranks: Ranks,
    log: Callable[..., None],
) -> list[UnlabeledCase]:
    """The unlabeled cases of a training; the first rank does the work, the others wait for it.

    Args:
        source: where they come from.
        split: returns the fold's labeled cases for training and for validation.
        allow_transductive: see :func:`~nnunet_ssl.data.leak_guard.check_leaks`.
        ranks: this process among those that train together.
        log: nnU-Net's print_to_log_file.

    Raises:
        UserError: there is no unlabeled case, or one is a validation case.
    """
    if ranks.first:
        source.preprocess(source.configuration, log)
        cases = source.collect(source.configuration)
        if not cases:
            raise UserError(
                no_unlabeled_cases_message(source.raw or Path("nnUNet_raw"), source.preprocessed, source.fold)
            )
        train, val = split()
        check_leaks(
            unlabeled=cases,
            labeled_folder=source.labeled_folder,
            train=train,
            val=val,
            allow_transductive=allow_transductive,
            log=log,
        )
        log(f"{len(cases)} unlabeled cases, {len(train)} labeled cases")
    ranks.wait()
    # A file is read for every case: not twice by the same process.
    return cases if ranks.first else source.collect(source.configuration)
