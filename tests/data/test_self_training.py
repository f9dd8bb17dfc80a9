"""Cases that models agree on become training cases of a new dataset."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from accepting_home import read_json, read_labels, write_json
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import move_plans_between_datasets
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from ranked_home import HIDING, RankedHome, consensus, disagreement, image, truth
from small_disk import can_limit_files, small_disk
from tiny_dataset import write_image

from nnunet_ssl.data import new_dataset as new_dataset_module
from nnunet_ssl.data.corrections import LabelValues
from nnunet_ssl.data.self_training import Made, Wanted, self_train
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.segmentations import Segmentations

NAME = "Dataset951_Tiny"


@pytest.fixture
def home(tmp_path) -> RankedHome:
    return RankedHome(tmp_path / "home").fill()


def training(home: RankedHome, name: str = NAME, **wanted) -> Made:
    found = Segmentations.from_dataset_json(home.raw / "dataset.json")
    values = LabelValues(found.labels, found.values, found.ignore_label)
    return self_train(home.folders, values, Wanted(name, home.queue, **wanted), log=lambda line: None)


def pseudo_label(case: str, ignore: int = 2) -> np.ndarray:
    return np.where(disagreement(case) == 1, ignore, consensus(case))


def refused(home: RankedHome, message: str, **wanted) -> str:
    """The error; and nothing has changed."""
    before = home.everything()
    with pytest.raises(UserError, match=message) as raised:
        training(home, **wanted)
    assert home.everything() == before
    return str(raised.value)


def test_what_the_new_dataset_holds(home) -> None:
    before = home.everything()
    made = training(home)
    raw, preprocessed = home.made()
    description = read_json(raw / "dataset.json")
    assert (
        description
        == read_json(preprocessed / "dataset.json")
        == {
            **home.dataset_json,
            "labels": {"background": 0, "blob": 1, "ignore": 2},
            "numTraining": 6,
        }
    )
    found = get_filenames_of_train_images_and_targets(str(raw), description)
    assert sorted(found) == ["L0", "L1", "L2", "L3", "U0", "U1"]
    for case in ("L0", "L3"):
        assert (raw / "labelsTr" / f"{case}.nii.gz").read_bytes() == (
            home.raw / "labelsTr" / f"{case}.nii.gz"
        ).read_bytes()
    for case in ("U0", "U1"):
        assert np.array_equal(read_labels(Path(found[case]["label"])), pseudo_label(case))
        labels, scan = (sitk.ReadImage(str(file)) for file in (found[case]["label"], found[case]["images"][0]))
        assert labels.GetSpacing() == pytest.approx(scan.GetSpacing())
    linked = raw / "imagesTr" / "U1_0000.nii.gz"
    assert linked.is_symlink() and linked.resolve() == (home.raw / "imagesUn" / linked.name).resolve()
    assert [file.name for file in (raw / "imagesUn").iterdir()] == ["U2_0000.nii.gz"]
    assert read_splits(preprocessed / "splits_final.json") == [{"train": ["L0", "L1", "L2", "U0", "U1"], "val": ["L3"]}]
    verify_dataset_integrity(str(raw), 1)
    assert made.ignored == {"U0": 0.2, "U1": 0.2} and (made.plans, made.configuration) == ("nnUNetPlans", "3d_fullres")
    assert [(one.number, one.reason is None) for one in made.cases.folds] == [(0, True), (1, False)]
    assert {name: what for name, what in home.everything().items() if NAME not in name} == before


def test_plans_are_moved_as_nnunet_moves_them(home, monkeypatch) -> None:
    training(home)
    _, preprocessed = home.made()
    file = preprocessed / "nnUNetPlans.json"
    ours = json.loads(file.read_text())
    file.unlink()
    monkeypatch.setenv("nnUNet_raw", str(home.raw.parent))
    monkeypatch.setenv("nnUNet_preprocessed", str(home.preprocessed.parent))
    move_plans_between_datasets(home.raw.name, NAME, "nnUNetPlans")
    assert ours == json.loads(file.read_text())
    assert (preprocessed / "dataset_fingerprint.json").read_bytes() == (
        home.preprocessed / "dataset_fingerprint.json"
    ).read_bytes()


def test_copies_instead_of_links(home) -> None:
    training(home, copy=True)
    raw, _ = home.made()
    for name in ("imagesTr/L0", "imagesTr/U0", "imagesUn/U2"):
        file = raw / f"{name}_0000.nii.gz"
        assert file.is_file() and not file.is_symlink()


def test_regions_keep_their_order(home) -> None:
    home.dataset_json["labels"] = {"background": 0, "whole": [1, 2], "core": [2], "rest": 4}
    home.dataset_json["regions_class_order"] = [1, 2, 4]
    write_json(home.raw / "dataset.json", home.dataset_json)
    write_json(home.preprocessed / "dataset.json", home.dataset_json)
    home.rank({"U0": "reliable"})
    training(home)
    raw, preprocessed = home.made()
    description = read_json(preprocessed / "dataset.json")
    manager = PlansManager(read_json(preprocessed / "nnUNetPlans.json")).get_label_manager(description)
    assert manager.ignore_label == 5 and manager.foreground_regions == [(1, 2), (2,), 4]
    assert list(description["labels"]) == ["background", "whole", "core", "rest", "ignore"]
    assert description["regions_class_order"] == [1, 2, 4]
    assert np.array_equal(read_labels(raw / "labelsTr" / "U0.nii.gz"), pseudo_label("U0", 5))


def test_an_ignore_label_that_is_there_is_used(home) -> None:
    home.dataset_json["labels"] = {"background": 0, "ignore": 3, "blob": 1, "other": 2}
    write_json(home.raw / "dataset.json", home.dataset_json)
    write_json(home.preprocessed / "dataset.json", home.dataset_json)
    home.rank({"U0": "reliable"})
    training(home)
    raw, _ = home.made()
    assert read_json(raw / "dataset.json")["labels"] == home.dataset_json["labels"]
    assert np.array_equal(read_labels(raw / "labelsTr" / "U0.nii.gz"), pseudo_label("U0", 3))


def test_other_verdicts_and_named_cases(home) -> None:
    assert sorted(training(home, verdicts=["reliable", "look at it"]).cases.pseudo_labeled) == ["U0", "U1", "U2"]
    made = training(home, "Dataset952_Tiny", cases=["U2"])
    assert list(made.cases.pseudo_labeled) == ["U2"] and list(made.cases.unlabeled) == ["U0", "U1"]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ("1", ["U1"]),
        ("2", ["U0", "U1"]),
        ("3", ["U0", "U1", "U2"]),
        ("1%", ["U1"]),
        ("34%", ["U1"]),
        ("50%", ["U0", "U1"]),
    ],
)
def test_the_best_cases(home, best, expected) -> None:
    """Whatever their verdicts; of the two that are as good, the first by name."""
    home.rank({"U0": "look at it", "U1": "label this first", "U2": "reliable"}, dice={"U0": 0.5, "U1": 0.8, "U2": 0.5})
    assert list(training(home, best=best).cases.pseudo_labeled) == expected


def test_one_model_tells_nothing_of_the_best_cases(home) -> None:
    home.rank({"U0": "look at it"}, dice={"U0": math.nan})
    refused(home, "That takes two models or more", best="1")


@pytest.mark.parametrize(
    ("trainers", "advice"), [(1, "with two or more models"), (2, "with a lower --reliable")], ids=["one", "two"]
)
def test_no_case_is_reliable(home, trainers: int, advice: str) -> None:
    models = [home.model(trainer=name) for name in ("nnUNetTrainer", "CrossMatchTrainer")[:trainers]]
    home.rank({"U0": "look at it"}, models)
    with pytest.raises(UserError, match=f"there are 1 'look at it'.*nnunet-ssl rank again {advice}"):
        training(home)


# Folds, and labels that they hide


def test_a_fold_that_a_model_has_seen_is_left_out(home) -> None:
    home.rank({"U0": "reliable"}, [home.model(0), home.model(1)])
    error = refused(home, "no fold could tell what the pseudo-labels are worth")
    assert "fold 0: nnUNetTrainer fold 1 has seen the labels of 1 of its 1 validation cases (L3)" in error
    assert "fold 1: nnUNetTrainer fold 0 has seen the labels of 1 of its 1 validation cases (L0)" in error
    assert "nnunet-ssl rank ... -f 0" in error


def test_hidden_labels_do_not_get_in(tmp_path) -> None:
    home = RankedHome(tmp_path / "home").fill(HIDING[:1])
    home.rank({"U0": "reliable", "L1": "reliable", "L2": "look at it", "U1": "label this first"})
    made = training(home)
    raw, preprocessed = home.made()
    assert read_splits(preprocessed / "splits_final.json") == [{"train": ["L0", "L1", "U0"], "val": ["L3"]}]
    assert np.array_equal(read_labels(raw / "labelsTr" / "L1.nii.gz"), pseudo_label("L1"))
    assert not np.array_equal(pseudo_label("L1"), truth("L1"))
    assert sorted(file.name for file in (raw / "labelsTr").iterdir()) == [
        f"{case}.nii.gz" for case in ("L0", "L1", "L3", "U0")
    ]
    assert sorted(made.cases.unlabeled) == ["L2", "U1", "U2"]
    assert (raw / "imagesUn" / "L2_0000.nii.gz").is_symlink()


def test_a_fold_that_trains_with_labels_that_another_hides(tmp_path) -> None:
    """Fold 1 trains with L1, whose labels fold 0 hides."""
    home = RankedHome(tmp_path / "home").fill(HIDING)
    home.rank({"U0": "reliable", "L2": "reliable"})
    training(home)
    raw, preprocessed = home.made()
    assert read_splits(preprocessed / "splits_final.json") == [
        {"train": ["L0", "L2", "U0"], "val": ["L3"], "unlabeled": ["L1"]},
        {"train": ["L0", "L1", "L2", "U0"], "val": ["L3"]},
    ]
    assert np.array_equal(read_labels(raw / "labelsTr" / "L1.nii.gz"), truth("L1"))
    assert not list((raw / "imagesUn").glob("L*"))

    home.rank({"L1": "reliable"})
    made = training(home, "Dataset952_Tiny")
    assert [one.number for one in made.cases.carried] == [0]
    assert made.cases.folds[1].reason == "it does not hide the labels of L1, which get pseudo-labels"


def test_a_model_that_has_seen_hidden_labels(tmp_path) -> None:
    home = RankedHome(tmp_path / "home").fill(HIDING)
    home.rank({"U0": "reliable"}, [home.model(1)])
    made = training(home)
    assert [one.number for one in made.cases.carried] == [1]
    assert "has seen the labels of 1 of its 2 cases whose labels it hides (L1)" in str(made.cases.folds[0].reason)


def test_cases_that_have_got_labels_since_keep_them(home) -> None:
    home.rank({"U0": "reliable", "L1": "reliable"})
    made = training(home)
    assert list(made.cases.pseudo_labeled) == ["U0"] and "L1" in made.cases.labeled
    assert made.cases.notes == ["1 case(s) have labels by now and keep them: L1."]
    refused(home, "L1: it has labels, and no fold", name="Dataset952_Tiny", cases=["L1"])


# Rounds


def test_the_second_round(tmp_path) -> None:
    home = RankedHome(tmp_path / "home").fill(HIDING[:1])
    home.rank({"U0": "reliable", "L1": "reliable", "U1": "look at it"})
    training(home)
    record = read_json(home.made()[0] / "self_training.json")
    assert record == read_json(home.made()[1] / "self_training.json")
    assert sorted(record["pseudo_labeled"]) == ["L1", "U0"] and record["labels_seen"] == ["L0"]
    assert [model["trainer"] for model in record["models"]] == ["nnUNetTrainer", "CrossMatchTrainer"]

    # The models of the new dataset have trained on L1 and U0 with pseudo-labels: they may label them again.
    student = home.model(dataset=NAME, trained_on=("L0", "L1", "U0"))
    home.rank({"U0": "reliable", "L1": "reliable", "U1": "reliable"}, [student])
    second = training(home, "Dataset952_Tiny")
    assert list(second.cases.pseudo_labeled) == ["L1", "U0", "U1"]
    assert read_json(home.made("Dataset952_Tiny")[0] / "self_training.json")["labels_seen"] == ["L0"]


def test_labels_seen_in_the_first_round_count_in_the_second(home) -> None:
    """A student that was trained on no label of fold 1's validation case has learned from a model that was."""
    training(home)
    student = home.model(dataset=NAME, trained_on=("L1", "L2", "U0"))
    home.rank({"U0": "reliable"}, [student])
    made = training(home, "Dataset952_Tiny")
    assert [one.number for one in made.cases.carried] == [0]
    assert "(L0)" in str(made.cases.folds[1].reason)


def test_a_round_starts_from_the_source(home) -> None:
    training(home)
    home.rank({"U0": "reliable"}, [home.model(dataset="Dataset950_Other")])
    refused(
        home,
        "nnUNetTrainer fold 0 of Dataset950_Other was trained on a dataset of which no self_training.json",
        name="Dataset952_Tiny",
    )
    home.raw, home.preprocessed = home.made()
    refused(home, "was made by self-training.*self-train -d Dataset007_Tiny", name="Dataset952_Tiny")


# Models


def train(home: RankedHome, *, weights: bytes = b"weights", log: str = "", trainer: str = "nnUNetTrainer") -> Path:
    folder = home.results / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"
    folder.mkdir(parents=True)
    (folder / "checkpoint_final.pth").write_bytes(weights)
    (folder / "training_log_2026_1_1_0_0_0.txt").write_text(log)
    return folder


def test_a_model_that_was_trained_again(home) -> None:
    train(home, weights=b"others")
    refused(home, r"fold_0/checkpoint_final.pth is not the one that ranked the cases")


def test_folds_that_changed_after_the_training(home) -> None:
    folder = train(home, log="This split has 2 training and 1 validation cases.\nEpoch 0\nCurrent learning rate: 0.01")
    later = folder / "training_log_2026_1_2_0_0_0.txt"
    later.write_text("This split has 3 training and 1 validation cases.\npredicting L3")
    os.utime(later, (2**31, 2**31))
    refused(home, "was trained with 2 and validated with 1 cases, as its log says; the queue names 3 and 1")
    later.write_text(later.read_text() + "\nEpoch 0\nCurrent learning rate: 0.01")
    os.utime(later, (2**31, 2**31))
    training(home)


# What is wrong is named, and nothing is half done


def test_validation_cases_under_another_name(home) -> None:
    write_image(home.images / "U1_0000.nii.gz", image("L3") * 2)
    refused(home, r"1 case\(s\) to train on are validation cases under another name \(U1 = L3\)")


def other_voxels(home: RankedHome) -> None:
    write_image(home.queue / "consensus" / "U1.nii.gz", consensus("U1") * 7)


def other_grid(home: RankedHome) -> None:
    write_image(home.queue / "disagreement" / "U1.nii.gz", disagreement("U1")[1:])


def other_spacing(home: RankedHome) -> None:
    write_image(home.queue / "consensus" / "U1.nii.gz", consensus("U1"), spacing=2.0)


def change_json(file: Path, **entries) -> None:
    write_json(file, {**read_json(file), **entries})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_voxels, r"U1: its consensus holds the value\(s\) 7, which dataset.json does not have \(blob 1\)"),
        (other_grid, r"U1: .*disagreement.*does not lie on the image: size"),
        (other_spacing, r"U1: .*consensus.*does not lie on the image: spacing"),
        (
            lambda home: (home.queue / "consensus" / "U1.nii.gz").unlink(),
            r"U1: in .*consensus, U1.nii.gz is not a regular",
        ),
        (
            lambda home: (home.queue / "disagreement" / "U0.nii.gz").write_bytes(b"x"),
            "U0: in .*disagreement, U0.nii.gz",
        ),
        (lambda home: (home.images / "U1_0000.nii.gz").write_bytes(b"x"), "U1: U1_0000.nii.gz"),
        (lambda home: (home.images / "U1_0000.nii.gz").unlink(), "U1: its images are neither in imagesUn nor in"),
        (lambda home: (home.raw / "labelsTr" / "L0.nii.gz").unlink(), "L0: "),
        (lambda home: (home.raw / "imagesTr" / "L3_0000.nii.gz").unlink(), "L3: a fold names it, but imagesTr has no"),
        (
            lambda home: shutil.copy(home.images / "U0_0000.nii.gz", home.raw / "imagesTr" / "U0_0000.nii.gz"),
            "U0: it is in imagesUn and in imagesTr",
        ),
        (
            lambda home: home.rank({"U0": "look at it", "U1": "label this first"}),
            "there are 1 'label this first', 1 'look",
        ),
        (
            lambda home: change_json(home.queue / "queue.json", dataset="Dataset008_Other"),
            "has cases of Dataset008_Other, not of",
        ),
        (
            lambda home: change_json(home.queue / "queue.json", labels={"background": 0, "a": 1}),
            "'labels' in dataset.json",
        ),
        (
            lambda home: change_json(home.queue / "queue.json", configuration="2d"),
            "have no configuration 2d, with which",
        ),
        (lambda home: change_json(home.queue / "queue.json", plans="Other"), "There is no .*Other.json"),
        (lambda home: shutil.rmtree(home.queue), "is no queue"),
        (lambda home: (home.queue / "cases.csv").unlink(), "There is no .*cases.csv yet"),
        (lambda home: (home.preprocessed / "dataset_fingerprint.json").unlink(), "nnUNetv2_extract_fingerprint -d 7"),
        (lambda home: write_json(home.preprocessed / "splits_final.json", []), "no fold could tell"),
    ],
)
def test_bad_input_is_named(home, change, message) -> None:
    change(home)
    refused(home, message)


def test_cases_that_the_queue_does_not_have(home) -> None:
    refused(home, "has no ranked case U7. Choose", cases=["U7"])


@pytest.mark.parametrize("root", ["raw", "preprocessed", "results"])
def test_a_dataset_of_that_number_is_left_alone(home, root) -> None:
    (home.root / root / "Dataset951_Other").mkdir()
    refused(home, f"There is .*{root}/Dataset951_Other already. Choose another number")


def test_a_link_of_our_folder_is_not_followed(home, tmp_path) -> None:
    (tmp_path / "outside" / NAME).mkdir(parents=True)
    (home.raw.parent / ".nnunet_ssl_new").symlink_to(tmp_path / "outside")
    refused(home, "is a link")
    assert (tmp_path / "outside" / NAME).is_dir()


@pytest.mark.parametrize("function", ["copyfile", "copy2"])
def test_a_full_disk(home, monkeypatch, function) -> None:
    def no_space(*arguments, **options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(arguments[1]))

    monkeypatch.setattr(shutil, function, no_space)
    refused(home, "Nothing was made, because of .*No space left on device")


@can_limit_files
def test_a_disk_on_which_labels_do_not_fit(home) -> None:
    """ITK does not tell that it could not write; a limit on the size of files is such a disk."""
    before = home.everything()
    with small_disk(100), pytest.raises(UserError, match=r"U0: its labels cannot be stored(.|\n)*Is the disk full\?"):
        training(home)
    assert home.everything() == before


def test_a_rename_that_fails(home, monkeypatch) -> None:
    rename, count = new_dataset_module.rename, iter(range(10))

    def renaming(source: Path, target: Path) -> None:
        if next(count) == 1:
            raise OSError(errno.EACCES, "Permission denied", str(target))
        rename(source, target)

    monkeypatch.setattr(new_dataset_module, "rename", renaming)
    refused(home, "Nothing was made, because of .*Permission denied")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.parametrize(("at", "name"), [(0, NAME), (1, NAME), (1, "Dataset952_Tiny")])
def test_what_a_kill_leaves_is_removed_by_the_next_run(home, monkeypatch, at, name) -> None:
    rename, count, before = new_dataset_module.rename, iter(range(10)), home.everything()

    def renaming(source: Path, target: Path) -> None:
        if next(count) == at:
            os._exit(9)
        rename(source, target)

    monkeypatch.setattr(new_dataset_module, "rename", renaming)
    child = os.fork()
    if not child:
        training(home)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9 << 8
    monkeypatch.setattr(new_dataset_module, "rename", rename)
    assert (home.raw.parent / ".nnunet_ssl_new" / NAME).is_dir() and home.made()[1].exists() == (at == 1)
    training(home, name)
    assert home.made(name)[0].is_dir() and home.made(name)[1].is_dir()
    assert {file: what for file, what in home.everything().items() if f"/{name}" not in file} == before
