"""Self-trained datasets go through nnU-Net's own commands, as they are printed, in two rounds."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Planned, nnunet_environment

from nnunet_ssl.data.queue import read_queue

pytestmark = pytest.mark.slow

SHORT = ("-tr", "nnUNetTrainer_short", "-device", "cpu")
CASES = ("unlabeled_000", "unlabeled_001", "unlabeled_002")


@pytest.fixture
def planned(planned_2d, tmp_path) -> Planned:
    root = tmp_path / "copy"
    shutil.copytree(planned_2d.root, root)
    raw = root / "raw" / planned_2d.raw.name
    return Planned(root, planned_2d.dataset_id, raw, nnunet_environment(root), planned_2d.phantoms)


def printed(output: str, command: str) -> list[str]:
    """Arguments of a command that was printed as one of the next."""
    (found,) = re.findall(rf"^  {command} (.*)$", output, re.MULTILINE)
    return found.split()


def one_round(planned: Planned, number: int, *rank: object) -> str:
    """Rank, make a dataset, preprocess it and train a fold, as printed; returns what self-train has printed."""
    queue = planned.root / f"queue_{number}"
    planned.run("nnunet-ssl", "rank", "-d", planned.dataset_id, "-c", "tiny", "-f", 0, "-o", queue, *rank)
    # Trained for some steps, models agree on nothing, so that the cases have to be named.
    wanted = ("--queue", queue, "--as", number, "--cases", *CASES)
    output = planned.run("nnunet-ssl", "self-train", "-d", planned.dataset_id, *wanted).stdout
    assert "labeled 5, pseudo-labeled 3, unlabeled 1 case(s)" in output
    planned.run("nnUNetv2_preprocess", *printed(output, "nnUNetv2_preprocess"), "-np", 1)
    log = planned.run("nnUNetv2_train", *printed(output, "nnUNetv2_train"), *SHORT).stdout
    assert "This split has 6 training and 2 validation cases." in log and "Mean Validation Dice" in log
    return output


def test_two_rounds(planned) -> None:
    teachers = ("nnUNetTrainer_short", "MeanTeacherTrainer_short")
    for trainer in teachers:
        planned.run("nnUNetv2_train", planned.dataset_id, "tiny", 0, "-tr", trainer, "-device", "cpu")
    output = one_round(planned, 951, "-tr", *teachers)

    arguments = " ".join(printed(output, "nnUNetv2_predict"))
    for name, place in (("IMAGES", planned.raw / "imagesTs"), ("PREDICTIONS", planned.root / "predicted")):
        arguments = arguments.replace(name, str(place))
    planned.run("nnUNetv2_predict", *arguments.split(), *SHORT)
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(planned.root / "predicted" / "test_000.nii.gz")))
    assert set(np.unique(labels)) <= {0, 1, 2}, "the ignore label is not predicted"
    log = planned.run("nnUNetv2_train", 951, "tiny", 0, "-tr", "CrossMatchTrainer_short", "-device", "cpu").stdout
    assert "1 unlabeled cases, 6 labeled cases" in log

    one_round(planned, 952, "--models-of", 951, "-tr", "nnUNetTrainer_short", "CrossMatchTrainer_short")
    new = f"Dataset951_{planned.raw.name[11:]}_SelfTrained"
    queue = read_queue(planned.root / "queue_952")
    assert [model.dataset for model in queue.models] == [new, new] and len(queue.cases) == 4
    assert queue.models[0].trained_on == tuple(sorted(planned.phantoms.labeled))
