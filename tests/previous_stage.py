"""A configuration as the previous stage of a cascade."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.preprocessing import preprocess_unlabeled
from nnunet_ssl.data.previous_stage import previous_stage_folder, segment_by_previous_stage
from nnunet_ssl.data.unlabeled_cases import UnlabeledCase, collect_unlabeled_cases


class Stage:
    """The configuration ``tiny`` as a previous stage, with a network that has learned nothing."""

    def __init__(self, planned, folder: Path) -> None:
        self.plans = PlansManager(json.loads((planned.preprocessed / "nnUNetPlans.json").read_text()))
        self.dataset_json = json.loads((planned.preprocessed / "dataset.json").read_text())
        self.manager = self.plans.get_configuration("tiny")
        preprocess_unlabeled(
            raw_dataset_folder=planned.raw,
            preprocessed_dataset_folder=planned.preprocessed,
            plans_manager=self.plans,
            configuration="tiny",
            dataset_json=self.dataset_json,
            num_processes=0,
        )
        self.cases = collect_unlabeled_cases(planned.preprocessed, self.manager.data_identifier, 0)
        torch.manual_seed(0)
        self.network = nnUNetTrainer.build_network_architecture(self.plans, self.manager, 1, 3, False).eval()
        self.folder = previous_stage_folder(folder, "cascade", 0)
        self.checkpoint = folder / "checkpoint_final.pth"
        self.checkpoint.touch()

    def segment(self, cases: list[UnlabeledCase] | None = None, images: list[UnlabeledCase] | None = None) -> list[str]:
        log: list[str] = []
        segment_by_previous_stage(
            self.cases if cases is None else cases,
            self.cases if images is None else images,
            folder=self.folder,
            checkpoint=self.checkpoint,
            network=self.network,
            mirroring_axes=(0, 1, 2),
            plans_manager=self.plans,
            configuration="tiny",
            dataset_json=self.dataset_json,
            log=log.append,
        )
        return log

    def files(self) -> dict[str, int]:
        return {file.stem: file.stat().st_mtime_ns for file in (self.folder / "imagesUn").glob("*.b2nd")}
