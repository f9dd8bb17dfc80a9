"""``nnunet-ssl rank`` with models as the trainers write them, on phantoms that nnU-Net has planned."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from small_disk import can_limit_files, small_disk

from nnunet_ssl.cli.main import main
from nnunet_ssl.data.queue import case_files, read_queue, read_rows
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.ranking.scores import components, entropy_map, pairwise_dice, volumes

DATASET = "Dataset998_Phantoms"
TRAINERS = (nnUNetTrainer, CrossMatchTrainer)


def make_models(planned, results: Path, labels: dict | None = None) -> None:
    """A model of each trainer, as the trainers write it, whose weights are random; ``labels`` of other ones."""
    plans = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text())
    dataset_json = json.loads((planned.preprocessed / "dataset.json").read_text()) | (labels or {})
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch, planned, results)
        for seed, trainer_class in enumerate(TRAINERS):
            torch.manual_seed(seed)
            given = {**json.loads(json.dumps(plans)), "continue_training": False}
            trainer = trainer_class(given, "tiny", 0, dataset_json, torch.device("cpu"))
            trainer.initialize()
            trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
            model = Path(trainer.output_folder_base)
            (model / "plans.json").write_text(json.dumps(plans))
            (model / "dataset.json").write_text(json.dumps(dataset_json))


def make_home(planned, root: Path) -> None:
    """Copies of a dataset's raw folder and plans, with one fold."""
    shutil.copytree(planned.raw, root / "raw" / planned.raw.name)
    preprocessed = root / "preprocessed" / planned.raw.name
    preprocessed.mkdir(parents=True)
    for file in planned.preprocessed.glob("*.json"):
        shutil.copy(file, preprocessed)
    (preprocessed / "splits_final.json").write_text(
        json.dumps([{"train": ["phantom_000", "phantom_001", "phantom_002"], "val": ["validation_000"]}])
    )


def set_folders(patch, planned, results: Path) -> None:
    for name, value in planned.environment.items():
        if name.startswith("nnUNet"):
            patch.setenv(name, value)
    patch.setenv("nnUNet_results", str(results))


def set_home(patch, planned, root: Path) -> None:
    set_folders(patch, planned, root / "results")
    patch.setenv("nnUNet_raw", str(root / "raw"))
    patch.setenv("nnUNet_preprocessed", str(root / "preprocessed"))


@pytest.fixture(scope="module")
def trained(planned_3d, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("ranked")
    make_models(planned_3d, results)
    return results


@pytest.fixture
def home(trained, planned_3d, monkeypatch, tmp_path) -> Path:
    """Copies of nnU-Net's folders that a test may spoil."""
    make_home(planned_3d, tmp_path)
    shutil.copytree(trained / DATASET, tmp_path / "results" / DATASET)
    set_home(monkeypatch, planned_3d, tmp_path)
    return tmp_path


def rank(home: Path, *options: str, trainers=("nnUNetTrainer", "CrossMatchTrainer"), folds=("0",)) -> int:
    command = ["rank", "-d", "998", "-c", "tiny", "-tr", *trainers, "-f", *folds, "-o", str(home / "queue")]
    return main([*command, "-device", "cpu", "--disable_tta", *options])


def keep(home: Path, *cases: str) -> None:
    """Leave these unlabeled cases alone."""
    for file in (home / "raw" / DATASET / "imagesUn").iterdir():
        if not file.name.startswith(cases):
            file.unlink()


def read(file: Path) -> sitk.Image:
    return sitk.ReadImage(str(file))


def stock(home: Path, trainer: str, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Label map and probabilities of one model, by nnU-Net's own function for a single image."""
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(
        str(home / "results" / DATASET / f"{trainer}__nnUNetPlans__tiny"), (0,), "checkpoint_final.pth"
    )
    reader = predictor.plans_manager.image_reader_writer_class()
    image = reader.read_images([str(home / "raw" / DATASET / "imagesUn" / f"{case}_0000.nii.gz")])
    return predictor.predict_single_npy_array(*image, None, None, True)


def test_the_queue_is_what_stock_predictions_give(home, capsys) -> None:
    keep(home, "unlabeled_000", "unlabeled_001")
    assert rank(home) == 0
    queue = read_queue(home / "queue")
    assert list(queue.cases) == ["unlabeled_000", "unlabeled_001"]
    assert queue.cases["unlabeled_000"] == ("imagesUn/unlabeled_000_0000.nii.gz",)
    assert [str(model) for model in queue.models] == ["nnUNetTrainer fold 0", "CrossMatchTrainer fold 0"]
    assert queue.models[1].trained_on == ("phantom_000", "phantom_001", "phantom_002")
    assert queue.models[1].validated_on == ("validation_000",)
    assert not queue.mirroring
    rows = {row.case: row for row in read_rows(home / "queue", queue)}
    assert set(rows) == set(queue.cases)

    case = "unlabeled_001"
    predictions = [stock(home, trainer, case) for trainer in ("nnUNetTrainer", "CrossMatchTrainer")]
    label_maps, mean = [one[0] for one in predictions], (predictions[0][1] + predictions[1][1]) / 2
    files = case_files(home / "queue", case, ".nii.gz")
    image = read(home / "raw" / DATASET / "imagesUn" / f"{case}_0000.nii.gz")
    consensus = sitk.GetArrayFromImage(read(files.consensus))
    assert np.array_equal(consensus, mean.argmax(axis=0))
    disagreement = read(files.disagreement)
    assert np.array_equal(sitk.GetArrayFromImage(disagreement), label_maps[0] != label_maps[1])
    assert disagreement.GetPixelID() == sitk.sitkUInt8
    uncertainty = read(files.uncertainty)
    expected = entropy_map(mean, regions=False)
    assert np.allclose(sitk.GetArrayFromImage(uncertainty), expected, atol=1 / 1024)
    assert uncertainty.GetPixelID() == sitk.sitkFloat32
    for written in (read(files.consensus), disagreement, uncertainty):
        assert written.GetSize() == image.GetSize()
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(written, get)(), getattr(image, get)())
    assert files.picture.is_file()

    foreground = (consensus > 0) | (label_maps[0] > 0) | (label_maps[1] > 0)
    assert rows[case].entropy == pytest.approx(expected[foreground].mean(), abs=2e-4)
    dice = pairwise_dice(label_maps, queue.structures)
    ml = volumes(consensus, queue.structures, image.GetSpacing()[::-1])
    for name, value in queue.structures.items():
        one = rows[case].structures[name]
        assert (one.dice, one.volume) == pytest.approx((dice[name], ml[name]), abs=1e-4)
        assert one.components == components(consensus, value)
    # What is unfinished is gone; the page and the table are there.
    assert sorted(file.name for file in (home / "queue" / "work").iterdir()) == ["done.jsonl", "labeled.json", "lock"]
    said = capsys.readouterr().out
    assert "Predicting 2 case(s) with 2 model(s) on cpu" in said
    assert str(home / "queue" / "index.html") in said
    assert "unlabeled_001" in (home / "queue" / "index.html").read_text()

    # A second run has nothing to predict, and judges again.
    times = {file: file.stat().st_mtime_ns for file in (home / "queue" / "consensus").iterdir()}
    assert rank(home, "--reliable", "0", "--first", "0") == 0
    assert "All 2 case(s) are predicted already." in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (home / "queue" / "consensus").iterdir()} == times
    assert not any(row.verdict == "label this first" for row in read_rows(home / "queue", queue))


def test_hidden_labeled_cases_are_ranked_unless_a_model_knows_their_labels(home, capsys) -> None:
    keep(home, "unlabeled_000")
    splits = [{"train": ["phantom_000"], "val": [], "unlabeled": ["phantom_001", "phantom_999"]}]
    (home / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(splits))
    assert rank(home, trainers=("CrossMatchTrainer",)) == 1
    assert list(read_queue(home / "queue").cases) == ["phantom_001", "unlabeled_000"]
    said = capsys.readouterr().out
    assert "phantom_999 was not predicted: a fold names it as 'unlabeled'" in said
    rows = read_rows(home / "queue", read_queue(home / "queue"))
    assert {row.verdict for row in rows} == {"look at it"}
    assert all(row.reason.startswith("one model alone") and np.isnan(row.dice) for row in rows)


def test_bad_images_are_named_and_the_rest_goes_on(home, capsys) -> None:
    images = home / "raw" / DATASET / "imagesUn"
    keep(home, "unlabeled_000", "unlabeled_001")
    good = images / "unlabeled_000_0000.nii.gz"
    content = good.read_bytes()
    (images / "cut_0000.nii.gz").write_bytes(content[: len(content) // 2])
    (images / "empty_0000.nii.gz").write_bytes(b"")
    (images / "nochannel.nii.gz").write_bytes(content)
    (images / "gone_0000.nii.gz").symlink_to(home / "nowhere.nii.gz")
    nan = sitk.GetArrayFromImage(read(good)).astype(np.float32)
    nan[0, 0, 0] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(nan), str(images / "nan_0000.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(nan[:, 0]), str(images / "flat_0000.nii.gz"))
    assert rank(home, trainers=("nnUNetTrainer",)) == 1
    said = capsys.readouterr().out
    for case, reason in (
        ("cut", "damaged or incomplete"), ("empty", "is empty"), ("nochannel", "no channel number"),
        ("gone", "does not exist"), ("nan", "NaN"), ("flat", ""),
    ):  # fmt: skip
        assert re.search(f"{case} was not predicted: .*{reason}", said), (case, said)
    assert [row.case for row in read_rows(home / "queue", read_queue(home / "queue"))] in (
        ["unlabeled_000", "unlabeled_001"], ["unlabeled_001", "unlabeled_000"])  # fmt: skip
    assert sorted(file.name for file in (home / "queue" / "consensus").iterdir()) == [
        "unlabeled_000.nii.gz", "unlabeled_001.nii.gz"]  # fmt: skip
    assert "cut" in (home / "queue" / "index.html").read_text()


def refused(capsys, home: Path, *options: str, **arguments) -> str:
    """The one line with which the command refuses; nothing is left behind."""
    assert rank(home, *options, **arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("nnunet-ssl rank: error: ")
    assert len(said.splitlines()) == 1
    assert not (home / "queue").exists()
    return said


def change(file: Path, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_missing_models_are_named_with_those_that_there_are(home, capsys) -> None:
    said = refused(capsys, home, folds=("0", "1"))
    assert "2 of 4 checkpoints are not there" in said
    assert "nnUNetTrainer fold_0 (checkpoint_final.pth)" in said
    assert "no fold 1" not in said
    assert "fold_0" in refused(capsys, home, "-chk", "checkpoint_best.pth")
    assert "CrossMatchTrainer fold_0" in refused(capsys, home, trainers=("UnheardOfTrainer",))
    assert "-tr CrossMatchTrainer -p nnUNetPlans -c tiny" in refused(capsys, home, "-c", "3d_fullres")


def test_a_trainer_that_nnunet_does_not_find_is_named(home, capsys) -> None:
    results = home / "results" / DATASET
    (results / "nnUNetTrainer__nnUNetPlans__tiny").rename(results / "LostTrainer__nnUNetPlans__tiny")
    assert "nnU-Net does not find the trainer LostTrainer" in refused(capsys, home, trainers=("LostTrainer",))


def test_models_of_other_plans_or_labels_are_named(home, capsys) -> None:
    model = home / "results" / DATASET / "CrossMatchTrainer__nnUNetPlans__tiny"
    plans = (model / "plans.json").read_text()

    def other_spacing(content) -> None:
        content["configurations"]["3d_fullres"]["spacing"] = [9.0, 9.0, 9.0]

    change(model / "plans.json", other_spacing)
    said = refused(capsys, home)
    assert "do not go together: 'spacing'" in said
    assert str(model / "plans.json") in said
    (model / "plans.json").write_text(plans)
    change(model / "dataset.json", lambda content: content["labels"].update(other=3))
    assert "'labels'" in refused(capsys, home)
    (model / "dataset.json").write_text("{")
    assert "not valid JSON" in refused(capsys, home)


def test_a_broken_checkpoint_is_named(home, capsys) -> None:
    file = home / "results" / DATASET / "CrossMatchTrainer__nnUNetPlans__tiny" / "fold_0" / "checkpoint_final.pth"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    assert rank(home) == 2
    said = capsys.readouterr().err
    assert "A checkpoint cannot be loaded" in said
    assert str(file) in said
    # The queue has it, but nothing is done with it.
    file.write_bytes(content)
    keep(home, "unlabeled_000")
    assert rank(home) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_predicts_no_numbers_is_named(home, capsys, value) -> None:
    """Argmax of NaN is background, so that two such models would agree."""
    keep(home, "unlabeled_000")
    file = home / "results" / DATASET / "CrossMatchTrainer__nnUNetPlans__tiny" / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    for tensor in checkpoint["network_weights"].values():
        tensor.fill_(value)
    torch.save(checkpoint, file)
    assert rank(home) == 1
    assert "unlabeled_000 was not predicted: CrossMatchTrainer fold 0 predicts values that" in capsys.readouterr().out
    assert not read_rows(home / "queue", read_queue(home / "queue"))


def test_a_consensus_that_was_corrected_is_kept_when_the_case_is_predicted_again(home, capsys) -> None:
    keep(home, "unlabeled_000", "unlabeled_001")
    image = home / "raw" / DATASET / "imagesUn" / "unlabeled_001_0000.nii.gz"
    assert rank(home) == 0
    files = case_files(home / "queue", "unlabeled_000", ".nii.gz")
    found = files.consensus.read_bytes()
    sitk.WriteImage(read(files.consensus) * 0 + 1, str(files.consensus))
    corrected = files.consensus.read_bytes()
    shutil.rmtree(files.uncertainty.parent)
    image.write_bytes(b"no image")
    assert rank(home) == 1
    assert "Predicted again: unlabeled_000.nii.gz" in capsys.readouterr().out
    assert files.consensus.read_bytes() == found
    assert (home / "queue" / "replaced" / "unlabeled_000.nii.gz").read_bytes() == corrected
    # What was found in an image that is gone does not stay in the table.
    assert [row.case for row in read_rows(home / "queue", read_queue(home / "queue"))] == ["unlabeled_000"]


@can_limit_files
def test_a_disk_on_which_a_segmentation_does_not_fit(home, capsys) -> None:
    """ITK does not tell that it could not write; a limit on the size of files is such a disk."""
    keep(home, "unlabeled_000")
    with small_disk(2500):
        assert rank(home) == 2
    assert "unlabeled_000.nii.gz cannot be written. Make room there" in capsys.readouterr().err
    assert not (home / "queue" / "consensus" / "unlabeled_000.nii.gz").exists()


def test_no_unlabeled_case_is_an_error(home, capsys) -> None:
    keep(home, "none")
    assert "There is no unlabeled case" in refused(capsys, home)


def test_a_fold_that_is_not_in_the_splits_is_an_error(home, capsys) -> None:
    results = home / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__tiny"
    (results / "fold_0").rename(results / "fold_7")
    assert "no fold 7" in refused(capsys, home, trainers=("nnUNetTrainer",), folds=("7",))


def test_wrong_options_are_named(home, capsys) -> None:
    assert "a fold must be" in refused(capsys, home, folds=("x",))
    assert "--first is 0.9" in refused(capsys, home, "--first", "0.9", "--reliable", "0.5")
    assert "name of a file" in refused(capsys, home, "-chk", "../x.pth")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(home, capsys) -> None:
    assert "-device cpu" in refused(capsys, home, "-device", "cuda")


def test_a_foreign_folder_and_other_models_are_refused(home, capsys) -> None:
    keep(home, "unlabeled_000")
    (home / "queue").mkdir()
    (home / "queue" / "mine.txt").touch()
    assert rank(home) == 2
    assert "holds something else already: mine.txt" in capsys.readouterr().err
    (home / "queue" / "mine.txt").unlink()
    assert rank(home, trainers=("nnUNetTrainer",)) == 0
    before = (home / "queue" / "cases.csv").read_bytes()
    capsys.readouterr()
    assert rank(home) == 2
    assert "was made otherwise: without CrossMatchTrainer fold 0" in capsys.readouterr().err
    assert (home / "queue" / "cases.csv").read_bytes() == before


def test_an_interruption_leaves_the_table_of_what_is_done(home, monkeypatch, capsys) -> None:
    keep(home, "unlabeled_000", "unlabeled_001")
    calls = []
    written = nnUNetPredictor.predict_logits_from_preprocessed_data

    def interrupted(self, data):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return written(self, data)

    monkeypatch.setattr(nnUNetPredictor, "predict_logits_from_preprocessed_data", interrupted)
    assert rank(home) == 130
    assert "interrupted" in capsys.readouterr().err
    queue = read_queue(home / "queue")
    assert [row.case for row in read_rows(home / "queue", queue)] == ["unlabeled_000"]
    assert rank(home) == 0
    assert len(calls) == 5  # the first case is not predicted again
    assert len(read_rows(home / "queue", queue)) == 2


def test_regions_with_an_ignore_label(planned_3d, monkeypatch, tmp_path) -> None:
    labels = {
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    }
    make_home(planned_3d, tmp_path)
    make_models(planned_3d, tmp_path / "results", labels)
    set_home(monkeypatch, planned_3d, tmp_path)
    raw = tmp_path / "raw" / DATASET
    change(raw / "dataset.json", lambda content: content.update(labels))
    partly = raw / "labelsTr" / "phantom_000.nii.gz"
    label_map = read(partly)
    label_map[0, 0, 0] = 3
    sitk.WriteImage(label_map, str(partly))
    keep(tmp_path, "unlabeled_002")
    assert rank(tmp_path) == 0
    queue = read_queue(tmp_path / "queue")
    assert list(queue.structures) == ["whole", "core"]
    predictions = [stock(tmp_path, trainer, "unlabeled_002") for trainer in ("nnUNetTrainer", "CrossMatchTrainer")]
    mean = (predictions[0][1] + predictions[1][1]) / 2
    assert mean.shape[0] == 2
    expected = np.where(mean[1] > 0.5, 2, np.where(mean[0] > 0.5, 1, 0))
    files = case_files(tmp_path / "queue", "unlabeled_002", ".nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(read(files.consensus)), expected)
    uncertainty = sitk.GetArrayFromImage(read(files.uncertainty))
    assert np.allclose(uncertainty, entropy_map(mean, regions=True), atol=1 / 1024)
    # The case with the ignore label does not say how large a structure is.
    ranges = json.loads((tmp_path / "queue" / "work" / "labeled.json").read_text())
    others = [read(raw / "labelsTr" / f"phantom_{number:03d}.nii.gz") for number in (1, 2)]
    found = [volumes(sitk.GetArrayFromImage(one), queue.structures, one.GetSpacing()[::-1]) for one in others]
    for name in queue.structures:
        assert ranges[name] == pytest.approx([min(one[name] for one in found), max(one[name] for one in found)])


def test_two_dimensional_images(planned_2d, monkeypatch, tmp_path) -> None:
    make_home(planned_2d, tmp_path)
    make_models(planned_2d, tmp_path / "results")
    set_home(monkeypatch, planned_2d, tmp_path)
    command = [
        "rank",
        "-d",
        "997",
        "-c",
        "tiny",
        "-tr",
        "nnUNetTrainer",
        "CrossMatchTrainer",
        "-f",
        "0",
        "-device",
        "cpu",
    ]
    assert main([*command, "-o", str(tmp_path / "queue")]) == 0
    queue = read_queue(tmp_path / "queue")
    assert len(read_rows(tmp_path / "queue", queue)) == len(queue.cases) == 4
    assert queue.mirroring
    image = read(tmp_path / "raw" / planned_2d.raw.name / "imagesUn" / "unlabeled_000_0000.nii.gz")
    files = case_files(tmp_path / "queue", "unlabeled_000", ".nii.gz")
    for file in (files.consensus, files.disagreement):
        assert read(file).GetSize() == image.GetSize()
    assert sitk.GetArrayFromImage(read(files.uncertainty)).squeeze().shape == image.GetSize()[::-1]
    assert 0 < sitk.GetArrayFromImage(read(files.uncertainty)).max() <= 1


def test_models_of_the_next_round(home) -> None:
    """The same weights, as models of a dataset that self-training has made: the same consensus, of the same cases."""
    keep(home, "unlabeled_000", "unlabeled_001")
    assert rank(home) == 0
    teachers = (home / "queue").rename(home / "teachers")
    self_train = ["self-train", "-d", "998", "--queue", str(teachers), "--as", "951", "-np", "0"]
    assert main([*self_train, "--cases", "unlabeled_000"]) == 0
    new = "Dataset951_Phantoms_SelfTrained"
    shutil.copytree(home / "results" / DATASET, home / "results" / new)
    for model in (home / "results" / new).iterdir():
        shutil.copy(home / "preprocessed" / new / "dataset.json", model)
    assert rank(home, "--models-of", "951") == 0
    queue = read_queue(home / "queue")
    assert {model.dataset for model in queue.models} == {new}
    assert queue.models[0].trained_on == ("phantom_000", "phantom_001", "phantom_002")
    assert queue.dataset == DATASET and list(queue.cases) == ["unlabeled_000", "unlabeled_001"]
    for case in queue.cases:
        first, second = (read(case_files(folder, case, ".nii.gz").consensus) for folder in (teachers, home / "queue"))
        assert np.array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))
