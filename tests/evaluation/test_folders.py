from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from skimage import io

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.folders import FolderResult, evaluate_folder, hardest_cases
from nnunet_ssl.evaluation.metrics import CaseMetrics, CaseResult
from nnunet_ssl.evaluation.result_files import summary, write_csv, write_json
from nnunet_ssl.evaluation.segmentations import Segmentations

SLAB = Segmentations({"slab": 1}, ".nii.gz")


@pytest.fixture
def folders(tmp_path):
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for folder in (predictions, references):
        folder.mkdir()
    return predictions, references


def write(file, array, spacing=(1.0, 1.0, 2.0), origin=(0.0, 0.0, 0.0), direction=None, dtype=np.uint8):
    image = sitk.GetImageFromArray(np.asarray(array, dtype))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(file))


def slab(position):
    array = np.zeros((6, 5, 4))
    array[position] = 1
    return array


@pytest.mark.parametrize("num_processes", [1, 2])
def test_folder(folders, num_processes):
    predictions, references = folders
    write(references / "b.nii.gz", slab(1))
    write(predictions / "b.nii.gz", slab(3))
    write(references / "a.nii.gz", slab(1))
    write(predictions / "a.nii.gz", slab(1))
    write(references / "not predicted.nii.gz", slab(1))
    (predictions / "plans.json").write_text("{}")
    (predictions / "._a.nii.gz").write_text("what other systems leave behind")
    result = evaluate_folder(predictions, references, SLAB, num_processes=num_processes)
    assert [case.case for case in result.cases] == ["a", "b"]
    assert result.values("slab", "dice") == {"a": 1, "b": 0}
    assert result.cases[1].metrics["slab"].hd95 == pytest.approx(4.0), "the slices are 2 mm apart"
    assert result.cases[1].metrics["slab"].hd95_voxels == pytest.approx(2.0)
    assert result.missing == ["not predicted"] and not result.failed
    assert hardest_cases([result]) == ["b", "a"]


@pytest.mark.parametrize("reader", [None, "NibabelIO"])
@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("size", {"array": np.ones((6, 5, 5))}),
        ("spacing", {"spacing": (1.0, 1.0, 2.1)}),
        ("origin", {"origin": (0.0, 3.0, 0.0)}),
        ("direction", {"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}),
    ],
)
def test_geometries_must_agree(folders, what, changed, reader):
    predictions, references = folders
    array = np.ones((6, 5, 4))
    for folder in folders:
        write(folder / "good.nii.gz", array)
    write(references / "a.nii.gz", array)
    write(predictions / "a.nii.gz", **{"array": array, **changed})
    result = evaluate_folder(predictions, references, Segmentations({"slab": 1}, ".nii.gz", None, reader))
    assert f"the prediction's {what} (" in result.failed["a"]
    assert [case.case for case in result.cases] == ["good"], "the others go on"


def test_rounding_of_a_header_is_no_other_geometry(folders):
    predictions, references = folders
    write(references / "a.nii.gz", slab(1), spacing=(0.7123456, 0.7, 3.3), origin=(-212.123456, 1, 1))
    write(predictions / "a.nii.gz", slab(1), spacing=(0.71234561, 0.7, 3.3), origin=(-212.12346, 1, 1))
    assert not evaluate_folder(predictions, references, SLAB).failed


def test_bad_files_are_named_and_the_others_evaluated(folders):
    predictions, references = folders
    for name in ("good", "truncated", "garbage", "empty", "fractions", "no_reference"):
        write(predictions / f"{name}.nii.gz", slab(1))
        write(references / f"{name}.nii.gz", slab(1))
    (references / "no_reference.nii.gz").unlink()
    (predictions / "garbage.nii.gz").write_bytes(b"not an image")
    (predictions / "empty.nii.gz").write_bytes(b"")
    write(predictions / "fractions.nii.gz", slab(1) / 2, dtype=np.float32)
    write(predictions / "truncated.nii.gz", np.random.default_rng(0).integers(0, 2, (20, 30, 30)))
    whole = (predictions / "truncated.nii.gz").read_bytes()
    (predictions / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    result = evaluate_folder(predictions, references, SLAB)
    assert [case.case for case in result.cases] == ["good"]
    assert result.failed["no_reference"].startswith("it has no reference: ")
    assert str(predictions) in result.failed["garbage"] and "garbage.nii.gz" in result.failed["garbage"]
    assert str(predictions) in result.failed["empty"] and "is empty" in result.failed["empty"]
    assert "not whole numbers" in result.failed["fractions"]
    assert "damaged or incomplete" in result.failed["truncated"], "ITK would fill it up with background"


def test_empty_folders_are_errors(folders, tmp_path):
    with pytest.raises(UserError, match=r"contains no file that ends in \.nii\.gz"):
        evaluate_folder(*folders, SLAB)
    with pytest.raises(UserError, match="There is no folder"):
        evaluate_folder(tmp_path / "none", folders[1], SLAB)


def test_a_folder_that_cannot_be_listed(folders, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folders[0]), "iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot be listed: Permission denied\. Check its permissions"):
        SLAB.cases(folders[0])


def test_a_file_that_may_not_be_read_is_not_called_damaged(folders, monkeypatch):
    for folder in folders:
        write(folder / "a.nii.gz", slab(1))

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nnunet_ssl.data.image_checks.gzip.open", refuse)
    assert evaluate_folder(*folders, SLAB).failed["a"] == f"in {folders[1]}, a.nii.gz cannot be read: Permission denied"


def test_references_without_foreground(folders):
    """A lesion-free case is one like others: what is found there counts as Dice 0."""
    predictions, references = folders
    for name in ("found", "not found"):
        write(references / f"{name}.nii.gz", 0 * slab(1))
    write(predictions / "found.nii.gz", slab(1))
    write(predictions / "not found.nii.gz", 0 * slab(1))
    found, nothing = (case.metrics["slab"] for case in evaluate_folder(predictions, references, SLAB).cases)
    assert found.dice == 0 and math.isnan(found.hd95)
    assert math.isnan(nothing.dice) and math.isnan(nothing.hd95)


def test_natural_images_and_tiff_stacks(folders):
    predictions, references = folders
    disk = np.zeros((9, 9), np.uint8)
    disk[2:7, 2:7] = 1
    io.imsave(references / "a.png", disk, check_contrast=False)
    io.imsave(predictions / "a.png", np.roll(disk, 1, axis=0), check_contrast=False)
    metrics = evaluate_folder(predictions, references, Segmentations({"disk": 1}, ".png")).cases[0].metrics["disk"]
    assert metrics.dice == pytest.approx(0.8) and metrics.hd95 == metrics.hd95_voxels == 1

    volume = np.zeros((6, 5, 4), np.uint8)
    volume[1] = 1
    for folder, shift in ((references, 0), (predictions, 2)):
        tifffile.imwrite(folder / "b.tif", np.roll(volume, shift, axis=0))
        (folder / "b.json").write_text(json.dumps({"spacing": [2.0, 1.0, 1.0]}))
    as_stack = Segmentations({"slab": 1}, ".tif", reader="Tiff3DIO")
    metrics = evaluate_folder(predictions, references, as_stack).cases[0].metrics["slab"]
    assert (metrics.hd95, metrics.hd95_voxels) == (4.0, 2.0), "spacing comes from the file beside"


def test_labels_that_nobody_named(folders):
    predictions, references = folders
    write(references / "a.nii.gz", 255 * slab(1))
    write(predictions / "a.nii.gz", slab(1))
    with pytest.raises(UserError, match=r"labels are 1, but the references in .* contain 255"):
        evaluate_folder(predictions, references, SLAB)
    with pytest.raises(UserError, match=r"labels are 1, but the predictions in .* contain 255"):
        evaluate_folder(references, predictions, SLAB)
    known = Segmentations({"slab": 1, "both": [1, 2]}, ".nii.gz", 9, complete=True)
    write(references / "b.nii.gz", slab(1) + 2 * slab(2) + 9 * slab(3))
    write(predictions / "b.nii.gz", slab(1))
    write(references / "c.nii.gz", slab(1))
    write(predictions / "c.nii.gz", 7 * slab(1))
    result = evaluate_folder(predictions, references, known)
    assert [case.case for case in result.cases] == ["b"]
    assert result.failed["a"] == "the reference contains 255; the dataset's labels are 0, 1, 2, 9"
    assert "the prediction contains 7" in result.failed["c"]
    write(references / "a.nii.gz", slab(1) + 5 * slab(2))
    assert len(evaluate_folder(predictions, references, SLAB).cases) == 3, "--labels may name some of many"


def test_labels_of_a_dataset_json(tmp_path):
    file = tmp_path / "dataset.json"
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    file.write_text(json.dumps({"labels": labels, "file_ending": ".mha", "overwrite_image_reader_writer": "X"}))
    found = Segmentations.from_dataset_json(file)
    assert found == Segmentations({"whole": [1, 2], "core": 2}, ".mha", 3, "X", True)
    assert found.values == {0, 1, 2, 3}
    with pytest.raises(UserError, match="There is no"):
        Segmentations.from_dataset_json(tmp_path / "other.json")
    for text in (
        *("{", "{}", "[]", '{"labels": 3, "file_ending": ".mha"}'),
        '{"labels": {"background": 0, "organ": "1"}, "file_ending": ".mha"}',
        '{"labels": {"background": 0, "organ": []}, "file_ending": ".mha"}',
        '{"labels": {"background": 0, "organ": 1}, "file_ending": null}',
    ):
        file.write_text(text)
        with pytest.raises(UserError, match="is not a dataset"):
            Segmentations.from_dataset_json(file)
    file.write_text('{"labels": {"0": "background", "1": "organ"}, "file_ending": ".mha"}')
    with pytest.raises(UserError, match="nnUNetv2_convert_old_nnUNet_dataset"):
        Segmentations.from_dataset_json(file)


def test_labels_of_a_command_line():
    found = Segmentations.from_options(["1", "tumor=2", "whole=1,2"], ".nii.gz", 9)
    assert found == Segmentations({"1": 1, "tumor": 2, "whole": [1, 2]}, ".nii.gz", 9)
    with pytest.raises(UserError, match="tumor=x"):
        Segmentations.from_options(["tumor=x"], ".nii.gz", None)
    with pytest.raises(UserError, match="twice"):
        Segmentations.from_options(["a=1", "a=2"], ".nii.gz", None)


def test_files_of_results(tmp_path):
    missed = CaseMetrics(0.0, 0.0)
    result = FolderResult(
        [
            CaseResult("a", {"one": CaseMetrics(0.5, 0.25, 3.0, 2.0, 1.0, 6.0, 5.0, 4.0)}),
            CaseResult("b", {"one": missed}),
        ],
        {"c": "broken"},
        ["d"],
    )
    write_json(tmp_path / "new" / "evaluation.json", result)
    content = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert content["mean"]["one"]["dice"] == {
        "mean": 0.25,
        "median": 0.25,
        "standard_deviation": pytest.approx(math.sqrt(0.125)),
        "cases": 2,
        "missing": 0,
    }
    assert content["mean"]["one"]["hd95"]["mean"] == 3 and content["mean"]["one"]["hd95"]["missing"] == 1
    assert content["cases"]["b"]["one"]["hd95"] is None
    assert content["failed"] == {"c": "broken"} and content["without_prediction"] == ["d"]
    write_csv(tmp_path / "one.csv", {"": result})
    rows = list(csv.DictReader((tmp_path / "one.csv").open()))
    assert rows[0]["case"] == "a" and float(rows[0]["hd95"]) == 3 and float(rows[0]["assd_voxels"]) == 4
    assert rows[1]["dice"] == "0.0" and rows[1]["hd95"] == ""
    write_csv(tmp_path / "two.csv", {"x": result, "y": result}, key="model")
    assert [row["model"] for row in csv.DictReader((tmp_path / "two.csv").open())] == ["x", "x", "y", "y"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "one.csv", "two.csv"], "nothing is left aside"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_csv(tmp_path / "file" / "one.csv", {"": result})


def test_summary_of_nothing():
    assert summary([math.nan])["mean"] is None and summary([math.nan])["missing"] == 1
    assert summary([2.0]) == {"mean": 2, "median": 2, "standard_deviation": None, "cases": 1, "missing": 0}
