"""The queue's files: what is written is read again, and what is foreign or broken is named."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_ssl.data.queue import (
    FIRST,
    RELIABLE,
    Model,
    Queue,
    Row,
    StructureRow,
    case_files,
    is_case_name,
    read_queue,
    read_rows,
    write_queue,
    write_rows,
)
from nnunet_ssl.errors import UserError

MODEL = Model("CrossMatchTrainer", "nnUNetPlans", "3d_fullres", 0, "checkpoint_final.pth", "ab" * 32, ("a",), ("b",))
QUEUE = Queue(
    dataset="Dataset902_Hippocampus",
    configuration="3d_fullres",
    plans="nnUNetPlans",
    file_ending=".nii.gz",
    labels={"background": 0, "whole, all": [1, 2], "core": [2], "ignore": 3},
    regions_class_order=(1, 2),
    cases={"case_1": ("imagesUn/case_1_0000.nii.gz",), "käse 2": ("/data/käse 2_0000.nii.gz",)},
    models=(MODEL, replace(MODEL, trainer="nnUNetTrainer", fold="all", dataset="Dataset951_Round")),
    mirroring=False,
)
ROWS = [
    Row("käse 2", FIRST, 'they "disagree", on both', 0.5, 0.25, {
        "whole, all": StructureRow(0.75, 12.5, 2), "core": StructureRow(0.25, 0.125, 0)}),
    Row("case_1", RELIABLE, "", 0.9375, math.nan, {
        "whole, all": StructureRow(1.0, 3.0, 1), "core": StructureRow(0.875, 1.0, 1)}),
]  # fmt: skip


def test_a_queue_is_read_as_it_was_written(tmp_path) -> None:
    write_queue(tmp_path / "queue", QUEUE)
    assert read_queue(tmp_path / "queue") == QUEUE
    assert [file.name for file in (tmp_path / "queue").iterdir()] == ["queue.json"]


def test_the_file_has_the_documented_entries(tmp_path) -> None:
    write_queue(tmp_path, QUEUE)
    content = json.loads((tmp_path / "queue.json").read_text())
    assert content["version"] == 1
    assert content["cases"]["case_1"] == {"images": ["imagesUn/case_1_0000.nii.gz"]}
    assert content["regions_class_order"] == [1, 2]
    assert content["models"][1]["fold"] == "all"
    assert content["models"][0] == {
        "trainer": "CrossMatchTrainer", "plans": "nnUNetPlans", "configuration": "3d_fullres", "fold": 0,
        "checkpoint": "checkpoint_final.pth", "sha256": "ab" * 32, "trained_on": ["a"], "validated_on": ["b"],
    }  # fmt: skip


def test_structures_leave_out_background_and_ignore_label() -> None:
    assert QUEUE.structures == {"whole, all": [1, 2], "core": [2]}
    assert QUEUE.ignore_label == 3


def test_files_of_a_case_lie_in_the_queue() -> None:
    files = case_files(Path("Q"), "case_1", ".nrrd")
    assert files.consensus == Path("Q/consensus/case_1.nrrd")
    assert files.disagreement == Path("Q/disagreement/case_1.nrrd")
    assert files.uncertainty == Path("Q/uncertainty/case_1.nii.gz")


@pytest.mark.parametrize("name", ["..", ".", "", "../a", "a/b", "a\\b", "/a", "C:a", ".hidden", "a\nb", "a\0", 7, None])
def test_a_path_is_no_case_name(name) -> None:
    assert not is_case_name(name)


def test_usual_names_are_case_names() -> None:
    assert all(map(is_case_name, ["LA_011", "käse 2", "a.b-c", "<b>&'\""]))


def test_a_queue_with_a_path_for_a_case_is_not_written(tmp_path) -> None:
    with pytest.raises(ValueError, match="no case names"):
        write_queue(tmp_path, replace(QUEUE, cases={"../../etc": ("a.nii.gz",)}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "has version 2"),
        ({"version": None}, "has version None"),
        ({"cases": {"../x": {"images": ["a"]}}}, "no case names"),
        ({"cases": {"x": {"images": ["../../secret"]}}}, "leads elsewhere"),
        ({"cases": {"x": {"images": []}}}, "has no image"),
        ({"cases": {"x": {}}}, "no entry 'images'"),
        ({"cases": ["x"]}, "cases is"),
        ({"dataset": "../Dataset902_Hippocampus"}, "dataset is"),
        ({"dataset": "Hippocampus"}, "no name of a dataset"),
        ({"file_ending": ".nii.gz/.."}, "no file ending"),
        ({"file_ending": 3}, "no file ending"),
        ({"labels": {"background": 0}}, "no structure"),
        ({"labels": {"background": 0, "a": "1"}}, "label 'a'"),
        ({"regions_class_order": [1, "2"]}, "regions_class_order"),
        ({"models": []}, "no model"),
        ({"models": [{"trainer": "x"}]}, "no entry 'fold'"),
        ({"mirroring": "yes"}, "mirroring"),
    ],
)
def test_what_is_wrong_in_a_queue_is_named(tmp_path, change, said) -> None:
    write_queue(tmp_path, QUEUE)
    file = tmp_path / "queue.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=said) as error:
        read_queue(tmp_path)
    assert str(file) in str(error.value)
    assert "nnunet-ssl rank" in str(error.value)


@pytest.mark.parametrize(
    "change", [{"fold": -1}, {"fold": True}, {"fold": "0"}, {"sha256": "xyz"}, {"trainer": "a/b"}, {"trained_on": "a"}]
)
def test_what_is_wrong_in_a_model_is_named(tmp_path, change) -> None:
    write_queue(tmp_path, QUEUE)
    file = tmp_path / "queue.json"
    content = json.loads(file.read_text())
    content["models"][1] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is broken"):
        read_queue(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufeff{}", '{"version": 1}'])
def test_a_broken_file_is_named(tmp_path, text) -> None:
    (tmp_path / "queue.json").write_text(text)
    with pytest.raises(UserError, match=r"queue\.json"):
        read_queue(tmp_path)


def test_a_folder_without_a_queue_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="is no queue"):
        read_queue(tmp_path / "nowhere")


def test_rows_are_read_as_they_were_written(tmp_path) -> None:
    write_rows(tmp_path, QUEUE, ROWS)
    found = read_rows(tmp_path, QUEUE)
    assert [repr(row) for row in found] == [repr(row) for row in ROWS]  # nan is not equal to itself
    header = next(csv.reader((tmp_path / "cases.csv").read_text().splitlines()))
    assert header == [
        "case", "verdict", "reason", "dice", "entropy",
        "dice whole, all", "volume whole, all (ml)", "components whole, all",
        "dice core", "volume core (ml)", "components core",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("case_1", "case_9", "Line 3 .* no case 'case_9'"),
        ("case_1", "../case_1", "no case"),
        (RELIABLE, "good", "'good' is no verdict"),
        ("0.9375", "much", "Line 3"),
        ("case_1", "käse 2", "has käse 2 more than once"),
        ("dice core", "dice tumor", "should have the columns"),
        ("3.0000,1,", "3.0000,", "it has 10 columns"),
    ],
)
def test_what_is_wrong_in_the_rows_is_named(tmp_path, before, after, said) -> None:
    write_rows(tmp_path, QUEUE, ROWS)
    file = tmp_path / "cases.csv"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    with pytest.raises(UserError, match=said):
        read_rows(tmp_path, QUEUE)


@pytest.mark.parametrize("saved", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n") + "\r\n"])
def test_a_table_that_an_editor_has_saved(tmp_path, saved) -> None:
    write_rows(tmp_path, QUEUE, ROWS)
    file = tmp_path / "cases.csv"
    file.write_text(saved(file.read_text()), encoding="utf-8", newline="")
    assert [row.case for row in read_rows(tmp_path, QUEUE)] == [row.case for row in ROWS]


def test_a_table_of_other_columns_costs_no_prediction(tmp_path) -> None:
    write_rows(tmp_path, QUEUE, ROWS)
    file = tmp_path / "cases.csv"
    file.write_text(file.read_text().replace(",", ";"))
    with pytest.raises(
        UserError, match="the same nnunet-ssl rank again: it writes the table again and predicts nothing"
    ):
        read_rows(tmp_path, QUEUE)


def test_rows_that_are_not_there_or_no_text_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="run nnunet-ssl rank again"):
        read_rows(tmp_path, QUEUE)
    (tmp_path / "cases.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no table"):
        read_rows(tmp_path, QUEUE)
