"""Self-training as an arm: two trainings teach, and nnUNetTrainer learns from what they agree on.

A training of such an arm has nnU-Net's three folders for itself. There, everything is a link but folds, plans and what
is made: the datasets with pseudo-labels, one a round. This package's commands rank the cases and make the datasets.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.benchmark.arms import Arm, Stage, plans_of_arm, stages
from nnunet_ssl.benchmark.campaign import Campaign, fold_of
from nnunet_ssl.data.nnunet_files import read_plans
from nnunet_ssl.data.splits import SPLITS_FILE, write_splits
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_text
from nnunet_ssl.text import dataset_number

BEST = "50%"
"""Of the unlabeled cases, those on which the teachers agree most. Weak teachers agree well on no case."""

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_REMEDY = "Run the benchmark again; it writes the file again."


@dataclass(frozen=True)
class Home:
    """nnU-Net's three folders of one training.

    Attributes:
        folder: that holds them.
        campaign: of the training.
        setting: name of the training's setting.
        arm: with ``rounds``.
        device: cpu, cuda or mps.
    """

    folder: Path
    campaign: Campaign
    setting: str
    arm: Arm
    device: str

    def dataset(self, number: int) -> str:
        """Name of the dataset of a round: the source, then what is made of it."""
        source = self.campaign.dataset
        free = [one for one in range(999, 980, -1) if one != int(dataset_number(source))]
        return source if not number else f"Dataset{free[number - 1]}_{source[11:]}_Round{number}"

    def preprocessed(self, number: int) -> Path:
        """Preprocessed folder of a round's dataset."""
        return self.folder / "nnUNet_preprocessed" / self.dataset(number)

    def plans(self, stage: Stage) -> tuple[dict[str, Any], str]:
        """Plans of a stage's dataset, with the configuration of its arm, and that one's name."""
        file = self.preprocessed(stage.round) / f"{self.campaign.plans}.json"
        return plans_of_arm(read_plans(file, otherwise=_REMEDY), self.campaign.configuration, stage.arm)

    def enter(self) -> None:
        """Make the folders of this process and of those that it starts nnU-Net's; they are made as a whole.

        Raises:
            UserError: nnUNet_raw lacks the dataset, or the folders cannot be made.
        """
        raw, preprocessed = (Path(os.environ[name]) / self.campaign.dataset for name in _FOLDERS[:2])
        if not self.folder.is_dir():
            making = self.folder.with_name(f"{self.folder.name}.unfinished")
            shutil.rmtree(making, ignore_errors=True)
            try:
                self._fill(making, raw.resolve(), preprocessed.resolve())
                making.rename(self.folder)
            except OSError as error:
                raise UserError(
                    f"{making} cannot be made: {error}. Correct this, and run the benchmark again."
                ) from None
        for name in _FOLDERS:
            os.environ[name] = str(self.folder / name)

    def _fill(self, folder: Path, raw: Path, preprocessed: Path) -> None:
        for name in _FOLDERS:
            (folder / name).mkdir(parents=True)
        (folder / "nnUNet_raw" / raw.name).symlink_to(raw)
        own = folder / "nnUNet_preprocessed" / preprocessed.name
        own.mkdir()
        for entry in preprocessed.iterdir():
            if entry.is_dir():
                (own / entry.name).symlink_to(entry)
            elif entry.suffix == ".json":
                shutil.copyfile(entry, own / entry.name)
        plans, _ = plans_of_arm(
            read_plans(self.campaign.plans_file, otherwise=_REMEDY), self.campaign.configuration, self.arm
        )
        write_text(own / f"{self.campaign.plans}.json", json.dumps(plans, indent=4) + "\n")
        fold = fold_of(self.campaign, self.setting)
        # Two trainings of one trainer, which differ by chance alone, need two folds.
        write_splits(own / SPLITS_FILE, [fold, fold])

    def make_dataset(self, number: int) -> float:
        """Rank the unlabeled cases with the teachers of the round before, and make a round's dataset, preprocessed.

        Returns:
            seconds that it took now.

        Raises:
            UserError: a command failed; the log has its message.
        """
        done = self.folder / f"round_{number}.done"
        if done.is_file():
            return 0.0
        started = time.monotonic()
        teachers = next(one for one in stages(self.arm, self.campaign.epochs) if one.round == number - 1)
        queue, made = self.folder / f"queue_{number}", self.dataset(number)
        _, configuration = self.plans(teachers)
        source = ["-d", self.dataset(0)]
        command = [*source, "-c", configuration, "-p", self.campaign.plans, "-tr", teachers.arm.trainer, "-f", "0", "1"]
        # Mirroring would make ranking take longer than the trainings.
        command += ["-o", str(queue), "-device", self.device, "--disable_tta"]
        if number > 1:
            command += ["--models-of", self.dataset(number - 1)]
        _run("rank", *command, accepted=(0, 1))
        if not self.preprocessed(number).is_dir():
            _run("self-train", *source, "--queue", str(queue), "--as", made, "--best", BEST, "-np", "1")

        from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

        from nnunet_ssl.data.worker_processes import default_workers

        configurations = (self.campaign.configuration,)
        preprocess_dataset(int(dataset_number(made)), self.campaign.plans, configurations, [default_workers()])
        done.touch()
        return time.monotonic() - started


def _run(command: str, *arguments: str, accepted: tuple[int, ...] = (0,)) -> None:
    """A command of this package; what it prints goes where this process prints."""
    print(f"nnunet-ssl {command} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "nnunet_ssl.cli.main", command, *arguments]).returncode
    if code not in accepted:
        raise UserError(f"nnunet-ssl {command} ended with {code}. Its message is above.")
