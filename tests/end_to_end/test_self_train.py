"""Self-trained datasets go through nnU-Net's own commands, as they are printed, in two rounds."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Planned, nnunet_environment

from nnunet_ssl.data.queue import LOOK, RELIABLE, Model, Queue, Row, StructureRow, case_files, write_queue, write_rows

pytestmark = pytest.mark.slow

SHORT = ("-tr", "nnUNetTrainer_short", "-device", "cpu")


@pytest.fixture
def planned(planned_2d, tmp_path) -> Planned:
    root = tmp_path / "copy"
    shutil.copytree(planned_2d.root, root)
    raw = root / "raw" / planned_2d.raw.name
    return Planned(root, planned_2d.dataset_id, raw, nnunet_environment(root), planned_2d.phantoms)


def model(planned: Planned, trainer: str, dataset: str | None = None) -> Model:
    """A trained model, as a queue names it."""
    name = dataset or planned.raw.name
    folder = planned.root / "results" / name / f"{trainer}__nnUNetPlans__tiny" / "fold_0"
    (fold,) = json.loads((planned.root / "preprocessed" / name / "splits_final.json").read_text())
    digest = hashlib.sha256((folder / "checkpoint_final.pth").read_bytes()).hexdigest()
    lists = tuple(fold["train"]), tuple(fold["val"])
    return Model(trainer, "nnUNetPlans", "tiny", 0, "checkpoint_final.pth", digest, *lists, dataset)


def rank(planned: Planned, folder: Path, models: list[Model]) -> Path:
    """A queue of what the models predict; the first three cases are reliable, whatever came out."""
    predicted = [folder / str(number) for number in range(len(models))]
    for one, output in zip(models, predicted, strict=True):
        images = ("-i", planned.raw / "imagesUn", "-o", output)
        trained = ("-d", one.dataset or planned.dataset_id, "-c", "tiny", "-f", 0, "-tr", one.trainer)
        planned.run("nnUNetv2_predict", *trained, *images, "-device", "cpu")
    cases = sorted(file.name[: -len(".nii.gz")] for file in predicted[0].glob("*.nii.gz"))
    labels = json.loads((planned.raw / "dataset.json").read_text())["labels"]
    images = {case: (f"imagesUn/{case}_0000.nii.gz",) for case in cases}
    queue = Queue(planned.raw.name, "tiny", "nnUNetPlans", ".nii.gz", labels, None, images, tuple(models))
    for case in cases:
        files = case_files(folder, case, ".nii.gz")
        found = [sitk.ReadImage(str(output / f"{case}.nii.gz")) for output in predicted]
        first, *others = map(sitk.GetArrayFromImage, found)
        unlike = sitk.GetImageFromArray(np.any([first != one for one in others], axis=0).astype(np.uint8))
        unlike.CopyInformation(found[0])
        for file, image in ((files.consensus, found[0]), (files.disagreement, unlike)):
            file.parent.mkdir(exist_ok=True)
            sitk.WriteImage(image, str(file))
    structures = {name: StructureRow(1.0, 1.0, 1) for name in queue.structures}
    verdicts = zip(cases, (RELIABLE, RELIABLE, RELIABLE, LOOK), strict=True)
    write_queue(folder, queue)
    write_rows(folder, queue, [Row(case, verdict, "", 1.0, 0.0, structures) for case, verdict in verdicts])
    return folder


def printed(output: str, command: str) -> list[str]:
    """Arguments of a command that was printed as one of the next."""
    (found,) = re.findall(rf"^  {command} (.*)$", output, re.MULTILINE)
    return found.split()


def self_train(planned: Planned, queue: Path, number: int) -> str:
    """Make a dataset, preprocess it and train a fold, as printed; returns what was printed."""
    output = planned.run("nnunet-ssl", "self-train", "-d", planned.dataset_id, "--queue", queue, "--as", number).stdout
    planned.run("nnUNetv2_preprocess", *printed(output, "nnUNetv2_preprocess"), "-np", 1)
    log = planned.run("nnUNetv2_train", *printed(output, "nnUNetv2_train"), *SHORT).stdout
    assert "This split has 6 training and 2 validation cases." in log and "Mean Validation Dice" in log
    return output


def test_two_rounds(planned) -> None:
    teachers = ("nnUNetTrainer_short", "MeanTeacherTrainer_short")
    for trainer in teachers:
        planned.run("nnUNetv2_train", planned.dataset_id, "tiny", 0, "-tr", trainer, "-device", "cpu")
    output = self_train(planned, rank(planned, planned.root / "queue", [model(planned, one) for one in teachers]), 951)

    arguments = " ".join(printed(output, "nnUNetv2_predict"))
    for name, place in (("IMAGES", planned.raw / "imagesTs"), ("PREDICTIONS", planned.root / "predicted")):
        arguments = arguments.replace(name, str(place))
    planned.run("nnUNetv2_predict", *arguments.split(), *SHORT)
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(planned.root / "predicted" / "test_000.nii.gz")))
    assert set(np.unique(labels)) <= {0, 1, 2}, "the ignore label is not predicted"
    log = planned.run("nnUNetv2_train", 951, "tiny", 0, "-tr", "CrossMatchTrainer_short", "-device", "cpu").stdout
    assert "1 unlabeled cases, 6 labeled cases" in log

    new = f"Dataset951_{planned.raw.name[11:]}_SelfTrained"
    students = [model(planned, trainer, new) for trainer in ("nnUNetTrainer_short", "CrossMatchTrainer_short")]
    output = self_train(planned, rank(planned, planned.root / "queue2", students), 952)
    assert "pseudo-labeled 3, unlabeled 1 case(s)" in output
