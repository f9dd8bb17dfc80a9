from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import SubFigure
from matplotlib.image import imread

from nnunet_ssl.evaluation.pictures import Case, save_overlay, slice_of_interest


def test_slice_of_interest():
    reference = np.zeros((5, 8, 8), int)
    reference[1:4, 2:6, 2:6] = 1
    reference[2, 1:7, 1:7] = 1
    prediction = reference.copy()
    labels = {"one": 1, "two": 2}
    assert slice_of_interest(reference, [prediction], labels=labels) == 2, "no disagreement: most foreground"
    prediction[3, 2:4] = 2
    assert slice_of_interest(reference, [reference, prediction], labels=labels) == 3
    reference[1] = 9
    assert slice_of_interest(reference, [prediction], labels=labels, ignore_label=9) == 3
    prediction[4] = 7
    assert slice_of_interest(reference, [prediction], labels=labels, ignore_label=9) == 3, "7 is not asked for"


@pytest.mark.parametrize("shape", [(6, 24, 32), (24, 32)])
def test_overlay_shows_contours_in_the_structures_colors(tmp_path, shape):
    reference = np.zeros(shape, np.uint8)
    reference[..., 6:18, 6:18] = 1
    reference[..., 6:18, 20:30] = 2
    prediction = np.roll(reference, 2, axis=-1)
    image = np.random.default_rng(0).normal(100, 1, shape)
    labels = {"chamber": 1, "neighbor": 2}
    save_overlay(tmp_path / "with.png", [Case("case", image, reference, {"trainer": prediction})], labels=labels)
    empty = {"trainer": np.zeros_like(reference)}
    save_overlay(tmp_path / "without.png", [Case("case", image, reference, empty)], labels=labels)

    def red(file):
        """Pixels in the first structure's color, by column of the panels: image, reference, trainer."""
        pixels = imread(file)[:, :, :3]
        matching = np.abs(pixels - np.array([255, 90, 79]) / 255).max(axis=-1) < 0.02
        matching[int(0.85 * len(matching)) :] = False  # the legend
        return [part.sum() for part in np.array_split(matching, 3, axis=1)]

    with_prediction, without = red(tmp_path / "with.png"), red(tmp_path / "without.png")
    assert with_prediction[0] == 0 and without[0] == 0
    assert with_prediction[1] > 100 and with_prediction[2] > 100
    assert without[1] > 100 and without[2] == 0


@pytest.mark.parametrize(
    ("shape", "title"), [((6, 8, 8), "case (slice 1 of 6)"), ((1, 8, 8), "case"), ((8, 8), "case")]
)
def test_a_title_names_the_slice_where_there_are_several(tmp_path, monkeypatch, shape, title):
    titles = []
    monkeypatch.setattr(SubFigure, "suptitle", lambda part, text, **options: titles.append(text))
    segmentation = np.zeros(shape, np.uint8)
    case = Case("case", segmentation, segmentation, {"trainer": segmentation})
    save_overlay(tmp_path / "a.png", [case], labels={"one": 1})
    assert titles == [title]


def test_constant_image_and_no_foreground(tmp_path):
    empty = np.zeros((3, 8, 8), np.uint8)
    save_overlay(tmp_path / "a.png", [Case("", empty, empty, {"trainer": empty}, (3, 1, 2))], labels={"one": 1})
    assert (tmp_path / "a.png").stat().st_size > 0


def test_each_case_is_a_row(tmp_path):
    reference = np.zeros((2, 16, 16), np.uint8)
    reference[1, 4:12, 4:12] = 1
    case = Case("first", reference, reference, {"trainer": reference})
    save_overlay(tmp_path / "one.png", [case], labels={"one": 1})
    save_overlay(tmp_path / "two.png", [case, replace(case, title="second")], labels={"one": 1})
    one, two = (imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.shape[1] == two.shape[1] and 1.7 < two.shape[0] / one.shape[0] < 2.1
    upper, lower = np.array_split(np.abs(two[:, :, :3] - np.array([255, 90, 79]) / 255).max(axis=-1) < 0.02, 2)
    assert upper.sum() > 100 and lower.sum() > 100
