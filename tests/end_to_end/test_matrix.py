"""Label kinds × configurations × trainers, with nnU-Net's own commands from planning to postprocessing.

Modelled on nnU-Net's integration tests: four label kinds, four configurations, a cascade among them, whose plans are
added by hand as theirs are. The whole matrix is slow. By default runs a part of it, with fewer commands in each cell:
a cascade, on regions with an ignore label. Prints a table at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import method_steps
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import SHORT_TRAINERS, WARM, nnunet_environment
from warm_commands import CAN_FORK

from nnunet_ssl.data.phantoms import write_phantom_dataset
from nnunet_ssl.evaluation.tables import format_table

TRAINERS = tuple(f"{trainer.__name__}_short" for trainer in method_steps.TRAINERS)
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
LABELS = ("standard", "regions", "ignore", "regions_ignore")
FOLDS = (0, 1)

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="commands run in forked processes")


class Commands:
    """Runs nnU-Net's commands in the datasets' folders; see warm_commands.py."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = nnunet_environment(root)

    def __call__(self, command: str, *arguments: object, check: bool = True, **environment: str) -> str:
        """The command's output; with ``check`` it must have ended well."""
        log = self.root / "log.txt"
        code = WARM(command, arguments, environment=self.environment | environment, folder=self.root, log=log)
        output = log.read_text()
        assert (code == 0) == check, f"{command} {arguments} ended with {code}:\n{output[-5000:]}"
        return output


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    root = tmp_path_factory.mktemp("matrix")
    (root / "trainers").mkdir()
    (root / "trainers" / "short.py").write_text(SHORT_TRAINERS)
    return Commands(root)


class Dataset:
    """Four labeled, three unlabeled and one test case of three structures, planned and preprocessed."""

    def __init__(self, commands: Commands, labels: str) -> None:
        self.commands = commands
        self.number = 990 + LABELS.index(labels)
        self.raw = commands.root / "raw" / f"Dataset{self.number}_{labels}"
        self.preprocessed = commands.root / "preprocessed" / self.raw.name
        phantoms = write_phantom_dataset(
            self.raw, labeled=4, unlabeled=3, validation=0, test=1, seed=3, shape=(20, 24, 28), num_classes=3
        )
        self.test = phantoms.test[0]
        self._label(labels, phantoms.labeled)
        self._plan(phantoms.labeled)

    def _label(self, labels: str, cases: tuple[str, ...]) -> None:
        file = self.raw / "dataset.json"
        description = json.loads(file.read_text())
        if "regions" in labels:
            description["labels"] = {"background": 0, "all": [1, 2, 3], "chamber and wall": [1, 3], "wall": 3}
            description["regions_class_order"] = [2, 1, 3]
        if "ignore" in labels:
            description["labels"]["ignore"] = 4
            for case in cases:
                segmentation = sitk.ReadImage(self.raw / "labelsTr" / f"{case}.nii.gz")
                array = sitk.GetArrayFromImage(segmentation)
                array[::3] = 4
                sparse = sitk.GetImageFromArray(array)
                sparse.CopyInformation(segmentation)
                sitk.WriteImage(sparse, self.raw / "labelsTr" / f"{case}.nii.gz")
        file.write_text(json.dumps(description))

    def _plan(self, cases: tuple[str, ...]) -> None:
        self.commands(
            "nnUNetv2_plan_and_preprocess", "-d", self.number, "-c", "2d", "3d_fullres", "-np", 1, "-npfp", 1,
            "--verify_dataset_integrity",
        )  # fmt: skip
        file = self.preprocessed / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        configurations = plans["configurations"]
        for name, patch_size in {"2d": [24, 24], "3d_fullres": [12, 16, 16]}.items():
            dim = len(patch_size)
            configurations[name] |= {"patch_size": patch_size, "batch_size": 2}
            configurations[name]["architecture"]["arch_kwargs"] |= {
                "n_stages": 3,
                "features_per_stage": [4, 6, 8],
                "kernel_sizes": [[3] * dim] * 3,
                "strides": [[1] * dim, [2] * dim, [2] * dim],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
            }
        configurations["3d_lowres"] = {
            "inherits_from": "3d_fullres",
            "data_identifier": "nnUNetPlans_3d_lowres",
            "spacing": [1.5, 1.5, 1.5],
            "median_image_size_in_voxels": [13, 16, 19],
            "patch_size": [8, 16, 16],
            "next_stage": "3d_cascade_fullres",
        }
        configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        file.write_text(json.dumps(plans))
        self.commands("nnUNetv2_preprocess", "-d", self.number, "-c", "3d_lowres", "-np", 1)
        first, second = cases[:2], cases[2:]
        folds = [{"train": first, "val": second}, {"train": second, "val": first}]
        (self.preprocessed / "splits_final.json").write_text(json.dumps(folds))

    def results(self, trainer: str, configuration: str) -> Path:
        return self.commands.root / "results" / self.raw.name / f"{trainer}__nnUNetPlans__{configuration}"

    def train(self, trainer: str, configuration: str, fold: int, *options: str, **environment) -> str:
        return self.commands(
            "nnUNetv2_train", self.number, configuration, fold, "-tr", trainer, "-device", "cpu", *options,
            **environment,
        )  # fmt: skip

    def predict(self, trainer: str, configuration: str, *folds: int) -> Path:
        output = self.predictions(trainer, configuration, *folds)
        previous = (
            ["-prev_stage_predictions", self.predictions(trainer, "3d_lowres", *folds)]
            if "cascade" in configuration
            else []
        )
        self.commands(
            "nnUNetv2_predict", "-d", self.number, "-i", self.raw / "imagesTs", "-o", output, "-c", configuration,
            "-f", *folds, "-tr", trainer, "-device", "cpu", "-npp", 0, "-nps", 0, *previous,
            *(["--save_probabilities"] if len(folds) > 1 else []),
        )  # fmt: skip
        self.check(output)
        return output

    def predictions(self, trainer: str, configuration: str, *folds: int) -> Path:
        name = f"{trainer}_{configuration}_{''.join(map(str, folds))}"
        return self.commands.root / "predictions" / self.raw.name / name

    def check(self, folder: Path) -> None:
        prediction = sitk.ReadImage(folder / f"{self.test}.nii.gz")
        image = sitk.ReadImage(self.raw / "imagesTs" / f"{self.test}_0000.nii.gz")
        assert prediction.GetSize() == image.GetSize()
        assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2, 3}


@pytest.fixture(scope="module")
def dataset(commands) -> Callable[[str], Dataset]:
    made: dict[str, Dataset] = {}

    def get(labels: str) -> Dataset:
        if labels not in made:
            made[labels] = Dataset(commands, labels)
        return made[labels]

    return get


@pytest.fixture(scope="module")
def table(request):
    """One row per trainer and label kind, one column per configuration."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    yield cells
    if cells:
        rows = [[*key, *(row.get(c, "") for c in CONFIGURATIONS)] for key, row in sorted(cells.items())]
        text = format_table(["trainer", "labels", *CONFIGURATIONS], rows, style="markdown")
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n\n{text}\n")


class Cell:
    """Notes in the table how a cell went and how long it took."""

    def __init__(self, table: dict, trainer: str, labels: str, configuration: str) -> None:
        self.row, self.configuration = table.setdefault((trainer, labels), {}), configuration

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.row[self.configuration] = f"{'failed' if kind else 'ok'}, {time.monotonic() - self.start:.0f} s"


def check_training(log: str, data: Dataset, trainer: str, configuration: str, fold: int) -> None:
    assert "3 unlabeled cases, 2 labeled cases" in log and "Mean Validation Dice" in log
    folder = data.results(trainer, configuration)
    assert (folder / f"fold_{fold}" / "checkpoint_final.pth").is_file()
    if configuration == "3d_cascade_fullres":
        segmentations = data.results(trainer, "3d_lowres") / "predicted_next_stage" / "3d_cascade_fullres_unlabeled"
        assert len(list((segmentations / f"fold_{fold}" / "imagesUn").glob("*.b2nd"))) == 3


# Standard labels in 2D are in test_commands.py. A cascade's trainer trains the previous stage, too.
PART = {"3d_lowres": TRAINERS[2], "3d_cascade_fullres": TRAINERS[2]}


def test_part_of_the_matrix(dataset, table):
    labels = LABELS[3]
    data = dataset(labels)
    for configuration, trainer in PART.items():
        with Cell(table, trainer, labels, configuration):
            # nnU-Net has the first stage's segmentation of a labeled case once its fold was validated.
            for fold in FOLDS if configuration == "3d_lowres" else FOLDS[:1]:
                log = data.train(trainer, configuration, fold)
                check_training(log, data, trainer, configuration, fold)
            data.predict(trainer, configuration, 0)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("labels", LABELS)
def test_matrix(labels, trainer, dataset, table):
    data = dataset(labels)
    for configuration in CONFIGURATIONS:
        with Cell(table, trainer, labels, configuration):
            data.train(trainer, configuration, 0, check=False, STOP_AFTER_EPOCHS="1")
            for fold, options in zip(FOLDS, (["--c", "--npz"], ["--npz"]), strict=True):
                log = data.train(trainer, configuration, fold, *options)
                check_training(log, data, trainer, configuration, fold)
                assert "Epoch 1" in log and ("Epoch 0" in log) == (fold == 1)
                assert len(list((data.results(trainer, configuration) / f"fold_{fold}/validation").glob("*.npz"))) == 2
            data.predict(trainer, configuration, 0)
            data.predict(trainer, configuration, *FOLDS)
    # nnU-Net compares all pairs of configurations, too; that takes long, so for one trainer of each label kind.
    ensembles = trainer == TRAINERS[LABELS.index(labels) % 3]
    data.commands(
        "nnUNetv2_find_best_configuration", data.number, "-c", *CONFIGURATIONS, "-tr", trainer, "-f", *FOLDS, "-np", 1,
        *([] if ensembles else ["--disable_ensembling"]),
    )  # fmt: skip
    information = json.loads((data.results(trainer, "2d").parent / "inference_information.json").read_text())
    assert len(information["all_results"]) == (10 if ensembles else 4)
    best = information["best_model_or_ensemble"]
    predictions = [data.predictions(trainer, m["configuration"], *FOLDS) for m in best["selected_model_or_models"]]
    merged = predictions[0]
    if len(predictions) > 1:
        merged = merged.with_suffix(".merged")
        data.commands("nnUNetv2_ensemble", "-i", *predictions, "-o", merged, "-np", 1)
        data.check(merged)
    postprocessed = merged.with_suffix(".postprocessed")
    data.commands(
        "nnUNetv2_apply_postprocessing", "-i", merged, "-o", postprocessed, "-np", 1,
        "-pp_pkl_file", best["postprocessing_file"], "-plans_json", best["some_plans_file"],
        "-dataset_json", Path(best["some_plans_file"]).with_name("dataset.json"),
    )  # fmt: skip
    data.check(postprocessed)
