"""evaluate, compare and overlay, on label maps of phantoms."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread

from nnunet_ssl.cli.main import main
from nnunet_ssl.data.phantoms import write_phantom_dataset

CASES = 5


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A dataset, its references, and predictions of three models, which are off by 0, 1 and 2 voxels."""
    base = tmp_path_factory.mktemp("evaluation")
    raw = base / "nnUNet_raw" / "Dataset042_P"
    write_phantom_dataset(raw, labeled=CASES, unlabeled=0, validation=0, test=0, seed=0, shape=(8, 16, 16))
    references = sorted((raw / "labelsTr").glob("*.nii.gz"))
    ground_truth = base / "nnUNet_preprocessed" / "Dataset042_P" / "gt_segmentations"
    ground_truth.mkdir(parents=True)
    for shift in range(3):
        model = base / "nnUNet_results" / "Dataset042_P" / f"Off{shift}Trainer__nnUNetPlans__2d"
        folder = model / "fold_0" / "validation"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
        (model / "dataset.json").write_bytes((raw / "dataset.json").read_bytes())
        for file in references:
            (ground_truth / file.name).write_bytes(file.read_bytes())
            reference = sitk.ReadImage(str(file))
            moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(reference), shift, axis=2))
            moved.CopyInformation(reference)
            sitk.WriteImage(moved, str(folder / file.name))
    return base


@pytest.fixture
def base(written, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(written / name))
    return written


def predictions(base, shift):
    return base / "nnUNet_results" / "Dataset042_P" / f"Off{shift}Trainer__nnUNetPlans__2d" / "fold_0" / "validation"


def references(base):
    return base / "nnUNet_raw" / "Dataset042_P" / "labelsTr"


def first_case(base):
    return sorted(references(base).iterdir())[0].name.removesuffix(".nii.gz")


def test_evaluate_writes_and_prints(base, tmp_path, capsys):
    arguments = ["-p", predictions(base, 1), "-g", references(base), "-o", tmp_path / "results", "--per-case"]
    assert main(["evaluate", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    labels = json.loads((references(base).parent / "dataset.json").read_text())["labels"]
    structures = [name for name in labels if name != "background"]
    rows = list(csv.DictReader((tmp_path / "results" / "evaluation.csv").open()))
    assert len(rows) == CASES * len(structures) and {row["structure"] for row in rows} == set(structures)
    assert all(0.5 < float(row["dice"]) < 1 and float(row["hd95_voxels"]) == 1 for row in rows), "off by one voxel"
    mean = json.loads((tmp_path / "results" / "evaluation.json").read_text())["mean"][structures[0]]["dice"]["mean"]
    assert mean == pytest.approx(np.mean([float(row["dice"]) for row in rows if row["structure"] == structures[0]]))
    assert f"{mean:.3f} ±" in out and out.count(first_case(base)) == len(structures)


def test_labels_come_from_where_the_user_says(base, tmp_path, capsys):
    arguments = ["evaluate", "-p", str(predictions(base, 0)), "-g", str(references(base)), "-o", str(tmp_path)]
    for options in (["-d", "42"], ["--labels", "all=1,2", "2"]):
        assert main([*arguments, *options]) == 0
    assert capsys.readouterr().out.count("\nall ") == 1
    assert {row["dice"] for row in csv.DictReader((tmp_path / "evaluation.csv").open())} == {"1.0"}


def test_a_case_without_prediction_counts_unless_it_may_be_missing(base, tmp_path, capsys):
    some = tmp_path / "some"
    some.mkdir()
    for file in sorted(predictions(base, 0).iterdir())[1:]:
        (some / file.name).write_bytes(file.read_bytes())
    arguments = ["evaluate", "-p", str(some), "-g", str(references(base)), "-d", "42"]
    assert main(arguments) == 1
    assert f"{first_case(base)}  has no prediction" in capsys.readouterr().out
    assert main([*arguments, "--chill"]) == 0
    (some / f"{first_case(base)}.nii.gz").write_bytes(b"broken")
    assert main(arguments) == 1
    assert "1 case not evaluated" in capsys.readouterr().out
    assert len(list(csv.DictReader((some / "evaluation.csv").open()))) == 2 * (CASES - 1), "the others were"


@pytest.mark.slow
def test_compare_trained_models(base, tmp_path, capsys):
    trainers = ["Off2Trainer", "Off1Trainer", "Off0Trainer"]
    arguments = ["compare", "-d", "42", "-c", "2d", "-tr", *trainers, "-o", str(tmp_path / "comparison")]
    best = f"Off1Trainer={predictions(base, 0)}"
    assert main([*arguments, "--best", best, "--metrics", "dice", "hd95", "asd"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "Off0Trainer" in line]
    assert len(lines) == 3 * 2, "metrics times structures"
    assert "1.000" in lines[0] and "+0." in lines[0] and " -" in lines[2], "a better Dice, a smaller distance"
    assert "best - last" in out
    folder = tmp_path / "comparison"
    assert sorted(one.name for one in folder.iterdir()) == [f"comparison.{end}" for end in ("csv", "md", "png", "tex")]
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert {row["model"] for row in rows} == {*(f"{one} run 0" for one in trainers), "Off1Trainer best, run 0"}
    assert (folder / "comparison.md").read_text().count("| Off0Trainer") == 6
    assert (folder / "comparison.tex").read_text().count(r"\end{tabular}") == 3
    assert imread(folder / "comparison.png").shape[0] > 200


def test_an_interrupted_validation_is_not_compared(base, tmp_path, capsys, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(base / "nnUNet_results", results)
    monkeypatch.setenv("nnUNet_results", str(results))
    arguments = ["compare", "-d", "42", "-c", "2d", "-tr", "Off0Trainer", "Off1Trainer", "-np", "1"]
    assert main(arguments) == 0
    (results / predictions(base, 1).relative_to(base / "nnUNet_results") / "summary.json").unlink()
    assert main(arguments) == 2
    assert "no finished validation" in capsys.readouterr().err


def test_a_folder_can_have_an_equals_sign_in_its_name(base, tmp_path, capsys):
    folder = tmp_path / "lr=0.1"
    shutil.copytree(predictions(base, 1), folder)
    arguments = ["compare", f"base={folder}", str(folder), "-g", str(references(base)), "-d", "42"]
    assert main(arguments) == 0
    assert f" {folder} " in capsys.readouterr().out


def test_compare_folders_and_their_runs(base, capsys):
    folders = [f"ours={predictions(base, 1)}", f"ours={predictions(base, 0)}"]
    arguments = [
        "compare",
        f"base={predictions(base, 2)}",
        *folders,
        "-g",
        str(references(base)),
        "-d",
        "42",
        "-np",
        "1",
    ]
    assert main(arguments) == 0
    header, *lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()][1:]
    ours = next(line for line in lines if " ours " in line)
    assert header.split()[2] == "runs" and ours.split()[2] == "2"


def copied(base, folder, model, cases):
    """Predictions of some of the cases, by number."""
    folder.mkdir()
    for file in [sorted(references(base).glob("*.nii.gz"))[number] for number in cases]:
        shutil.copy(predictions(base, model) / file.name, folder)
    return folder


def test_folders_that_are_joined_miss_what_none_of_them_has(base, tmp_path, capsys):
    folds = [f"ours={copied(base, tmp_path / 'f0', 1, [0, 1])}", f"ours={copied(base, tmp_path / 'f1', 1, [2, 3])}"]
    options = ["-g", str(references(base)), "-d", "42", "-np", "1"]
    assert main(["compare", f"base={predictions(base, 2)}", *folds, *options]) == 1
    printed = capsys.readouterr().out
    assert printed.count("has no prediction") == 1 and "Not all have the same cases" in printed
    folds.append(f"ours={copied(base, tmp_path / 'f2', 1, [4])}")
    assert main(["compare", f"base={predictions(base, 2)}", *folds, *options]) == 0
    assert "Not all have the same cases" not in capsys.readouterr().out


def test_models_without_a_common_case_are_not_compared(base, tmp_path, capsys):
    folders = [f"{name}={copied(base, tmp_path / name, 0, cases)}" for name, cases in (("a", [0, 1]), ("b", [2, 3]))]
    assert main(["compare", *folders, "-g", str(references(base)), "-d", "42", "--chill"]) == 2
    assert "b and a have no case in common" in capsys.readouterr().err


def test_overlay_names_cases_that_only_some_folders_have(base, tmp_path, capsys):
    some = copied(base, tmp_path / "some", 1, [0])
    assert main(["overlay", "-d", "42", f"a={some}", f"b={predictions(base, 2)}", "-o", str(tmp_path / "o")]) == 0
    assert "Left out, because not all folders have them" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written(base, tmp_path, capsys):
    (tmp_path / f"{first_case(base)}.png").mkdir()
    arguments = ["overlay", "-d", "42", f"a={predictions(base, 2)}", "-o", str(tmp_path), "--cases", first_case(base)]
    assert main(arguments) == 2
    assert f"{first_case(base)}.png cannot be written" in capsys.readouterr().err


def test_overlay_draws_the_worst_cases(base, tmp_path, capsys):
    arguments = ["overlay", "-d", "42", f"off by 2={predictions(base, 2)}", f"exact={predictions(base, 0)}", "-np", "1"]
    assert main([*arguments, "-o", str(tmp_path), "--worst", "2"]) == 0
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 2 and str(pictures[0]) in capsys.readouterr().out
    other = tmp_path / "other"
    assert main([*arguments, "-o", str(other), "--cases", first_case(base), "none"]) == 1
    assert [one.name for one in other.iterdir()] == [f"{first_case(base)}.png"]
    assert "none was not drawn" in capsys.readouterr().out


def test_overlay_finds_images_and_references_of_test_cases(base, tmp_path, capsys, monkeypatch):
    raw = tmp_path / "nnUNet_raw" / "Dataset042_P"
    shutil.copytree(references(base).parent, raw)
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    (raw / "labelsTs").mkdir()
    (raw / "imagesTs").mkdir()
    predicted = copied(base, tmp_path / "predicted", 1, [0])
    for file, new in (
        (next(predicted.iterdir()), predicted),
        (references(base) / f"{first_case(base)}.nii.gz", raw / "labelsTs"),
    ):
        shutil.copy(file, new / "test.nii.gz")
    (predicted / f"{first_case(base)}.nii.gz").unlink()
    call = ["overlay", "-d", "42", f"a={predicted}", "-o", str(tmp_path / "pictures")]
    assert main(call) == 2
    said = capsys.readouterr().err
    assert f"There is no test_0000.nii.gz in {raw / 'imagesTr'} or {raw / 'imagesTs'}. Name the folder with -i" in said
    shutil.copy(raw / "imagesTr" / f"{first_case(base)}_0000.nii.gz", raw / "imagesTs" / "test_0000.nii.gz")
    assert main(call) == 0
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["test.png"]


def test_compare_says_what_few_cases_and_trainings_do_not_show(base, tmp_path, capsys):
    cases = [0, 1, 2, 3]
    folders = [f"{name}={copied(base, tmp_path / name, shift, cases)}" for name, shift in (("a", 2), ("b", 1))]
    call = ["-g", str(references(base)), "-d", "42", "--chill", "-np", "1", "--metrics", "dice"]
    assert main(["compare", *folders, *call, "-o", str(tmp_path / "written")]) == 0
    out = capsys.readouterr().out
    assert "  0.125  " in out and "with 4 pairs p cannot be below 0.12, however" in out, "as low as it can be"
    assert "One training each" in out
    assert "with 4 pairs" in (tmp_path / "written" / "comparison.md").read_text()
    assert main(["compare", *folders, f"b={copied(base, tmp_path / 'again', 1, cases)}", *call]) == 0
    assert "One training each" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "-p", "PRED", "-g", "GT", "-d", "42", "--labels", "1"], "one of them"),
        (["evaluate", "-p", "PRED", "-g", "GT", "-d", "43"], "43"),
        (["evaluate", "-p", "PRED", "-g", "GT", "-np", "0"], "-np"),
        (["evaluate", "-p", "PRED", "-g", "GT", "--ignore-label", "3"], "--ignore-label"),
        (["evaluate", "-p", "GT", "-g", "GT"], "contains no file"),
        (["evaluate", "-p", "nowhere", "-g", "GT"], "-p nowhere: there is no folder"),
        (["evaluate", "-p", "PRED", "-g", "nowhere"], "-g nowhere: there is no folder"),
        (["evaluate", "-p", "PRED", "-g", "GT", "--labels", "1", "--file-ending", "nii.gz"], "with its dot"),
        (["evaluate", "-p", "PRED", "-g", "GT", "--labels", "none=0"], "1 or more"),
        (["compare", "one=PRED"], "at least two"),
        (["compare", "one=PRED", "two=nowhere"], "no folder"),
        (["compare", "one=PRED", "two=PRED"], "-g"),
        (["compare", "one=PRED", "two=PRED", "-d", "42", "--best", "three=PRED"], "three"),
        (["compare", "one=PRED", "two=PRED", "-d", "42", "--metrics", "DSC"], "dice"),
        (["compare", "-tr", "Off0Trainer", "Off1Trainer"], "-d and -c"),
        (["compare", "-d", "42", "-c", "2d", "-tr", "Off0Trainer", "Off9Trainer"], "-tr Off1Trainer -p"),
        (["overlay", "one=PRED", "-o", "OUT"], "-g and -i"),
        (["overlay", "one=PRED", "-d", "42", "-o", "OUT", "--worst", "0"], "--worst"),
        (["overlay", "one=PRED", "one=GT", "-d", "42", "-o", "OUT"], "several folders"),
        (["compare", "one=PRED", "one=PRED", "two=GT", "-d", "42"], "one has that folder already"),
        (["overlay", "one=PRED", "-d", "42", "-o", "OUT", "-np", "0"], "-np is 0"),
        (["overlay", "one=PRED", "-d", "42", "-o", "OUT", "-np", "0", "--cases", "a"], "-np is 0"),
        (["compare", "one=PRED", "two=PRED", "-g", "LABELS", "-d", "42", "-o", "OUT", "-np", "0"], "-np is 0"),
        (["overlay", "one=PRED", "-d", "42", "-o", "FILE"], "cannot be created"),
        (["evaluate", "-p", "PRED", "-g", "GT", "-o", "FILE"], "cannot be created"),
        (["evaluate", "-p", "PRED", "-g", "GT", "--file-ending", ".png"], "--file-ending"),
        (["evaluate", "-p", "PRED", "-g", "LABELS", "--labels", "7"], "contain 1, 2"),
    ],
)
def test_mistakes_are_explained(base, tmp_path, capsys, arguments, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "dataset.json").write_bytes((references(base).parent / "dataset.json").read_bytes())
    (tmp_path / "file").write_text("")
    places = {"PRED": predictions(base, 0), "GT": empty, "OUT": tmp_path / "out", "FILE": tmp_path / "file"}
    places = {short: str(path) for short, path in {**places, "LABELS": references(base)}.items()}
    replaced = []
    for argument in arguments:
        for short, path in places.items():
            if argument == short or argument.endswith(f"={short}"):
                argument = argument.removesuffix(short) + path
                break
        replaced.append(argument)
    assert main(replaced) == 2
    assert message in capsys.readouterr().err
    assert not (Path.cwd() / "nowhere").exists()
    assert not (tmp_path / "out").exists(), "nothing is made before all is checked"
