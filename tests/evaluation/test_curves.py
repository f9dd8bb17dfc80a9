from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pytest

from nnunet_ssl.evaluation import curves
from nnunet_ssl.evaluation.curves import class_names, save_training_curves


def logged(epochs):
    return {
        "train_losses": [1.0] * epochs,
        "ssl/loss/supervised": list(np.linspace(0, -0.8, epochs)),
        "ssl/loss/tkd": [float("nan") if epoch == 1 else 0.5 for epoch in range(epochs)],
        "ssl/loss/total": [0.25] * epochs,
        "ssl/weight/tkd": list(np.linspace(0, 1, epochs)),
        "ssl/coverage": [0.5] * epochs,
        "ssl/coverage_per_class": [[0.9, 0.1]] * epochs,
        "ssl/seconds/unlabeled_wait": [12.0] * epochs,
        "ssl/never_logged": [],
    }


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    saved = []
    original = curves.Figure.savefig

    def savefig(figure, *args, **kwargs):
        saved.append(figure)
        original(figure, *args, **kwargs)

    monkeypatch.setattr(curves.Figure, "savefig", savefig)
    return saved


def lines(figure):
    return {axis.get_title(loc="left"): {line.get_label(): line for line in axis.lines} for axis in figure.axes}


@pytest.mark.parametrize("epochs", [1, 2, 1000])
def test_panels_and_lines(tmp_path, figures, epochs):
    file = tmp_path / "progress_ssl.png"
    file.write_bytes(b"older")
    save_training_curves(file, logged(epochs), title="CrossMatchTrainer")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["progress_ssl.png"], "nothing unfinished is left"
    drawn = lines(figures[0])
    tkd = "distillation by the teacher (tkd)"
    assert [set(names) for names in drawn.values()] == [
        {"supervised", tkd, "total"},
        {tkd},
        {"overall", "class 1", "class 2"},
        {"unlabeled wait"},
    ]
    losses = drawn["loss: terms without their weights, and the total"]
    assert losses["supervised"].get_ydata()[-1] == logged(epochs)["ssl/loss/supervised"][-1]
    assert len(losses["supervised"].get_xdata()) == epochs
    assert (losses["supervised"].get_marker() == "o") == (epochs <= 20), "a single epoch shows as a point"
    assert losses[tkd].get_color() == drawn["weights of the terms"][tkd].get_color()
    assert losses[tkd].get_color() != losses["supervised"].get_color()


def test_classes_have_their_names_and_lines_that_cover_each_other_differ(tmp_path, figures):
    logging = {
        **{f"ssl/weight/{name}": [0.5, 1.0] for name in ("a", "b", "c", "d")},
        "ssl/coverage_per_class": [[0.5, 0.25]] * 2,
        "ssl/share/unlabeled_per_class": [[0.1, 0.1]] * 2,
    }
    save_training_curves(tmp_path / "a.png", logging, names=["chamber", "wall"])
    weights, coverage, share = figures[0].axes
    for axis in (coverage, share):
        assert {line.get_label() for line in axis.lines if line.get_label()[0] != "_"} == {"chamber", "wall"}
    looks = [(line.get_linewidth(), line._dash_pattern) for line in weights.lines]
    assert all(below > above for (below, _), (above, _) in itertools.pairwise(looks)), "the upper ones are narrower"
    assert len({str(dashes) for _, dashes in looks}) == 4 and looks[0][1] == (0.0, None), "the lowest is solid"
    widths = [line.get_linewidth() for line in share.lines if line.get_label()[0] != "_"]
    assert widths[0] > widths[1]


def test_names_of_classes_are_in_nnunets_order():
    assert class_names({"labels": {"background": 0, "wall": 2, "chamber": 1, "ignore": 3}}) == ["chamber", "wall"]
    regions = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    assert class_names({"labels": regions, "regions_class_order": [1, 2]}) == ["whole", "core"]


def test_odd_values(tmp_path, figures):
    logging = {
        "ssl/loss/term": [None, float("inf"), 1.0],
        "ssl/coverage_per_class": [[0.5], [0.5, 0.25], []],
        "ssl/queue": [1, 2, 3],
    }
    save_training_curves(tmp_path / "a.png", logging)
    drawn = lines(figures[0])
    np.testing.assert_array_equal(
        drawn["loss: terms without their weights, and the total"]["term"].get_ydata(), [np.nan, np.nan, 1.0]
    )
    coverage = drawn["pseudo-label coverage: share of voxels above the threshold"]
    np.testing.assert_array_equal(coverage["class 2"].get_ydata(), [np.nan, 0.25, np.nan])
    assert set(drawn["other"]) == {"queue"}


def test_every_other_group_has_its_own_panel(tmp_path, figures):
    logging = {
        "ssl/learned/a_from_b": [0.25, 0.5],
        "ssl/seconds/unlabeled_wait": [3.0, 4.0],
        "ssl/learned/b_from_a": [0.5, float("nan")],
        "ssl/norm/gradient": [0.5, 12.0],
        "ssl/loss/a_from_b": [2.0, 1.0],
    }
    save_training_curves(tmp_path / "a.png", logging)
    drawn = lines(figures[0])
    assert {title: set(names) for title, names in drawn.items()} == {
        "loss: terms without their weights, and the total": {"a from b"},
        "learned": {"a from b", "b from a"},
        "norm": {"gradient"},
        "seconds per epoch": {"unlabeled wait"},
    }
    _, learned, norm, _ = figures[0].axes
    assert learned.get_ylim() == (-0.03, 1.03), "shares"
    assert norm.get_ylim()[1] > 12
    assert list(drawn) == ["loss: terms without their weights, and the total", "learned", "norm", "seconds per epoch"]


@pytest.mark.parametrize("collapsed", [0.0, 1.0])
def test_shares_and_collapses_leave_no_gap_between_panels(tmp_path, figures, collapsed):
    shares = {
        "ssl/loss/total": [1.0, 0.5],
        "ssl/share/unlabeled_per_class": [[0.1, 0.01], [0.1, 0.001]],
        "ssl/share/labeled_per_class": [[0.1, 0.02], [0.1, 0.02]],
        "ssl/share/collapsed_per_class": [[0.0, 0.0], [0.0, collapsed]],
        "ssl/seconds/unlabeled_wait": [3.0, 4.0],
    }
    save_training_curves(tmp_path / "a.png", shares)
    panels = [axis.get_position() for axis in figures[0].axes]
    assert all(above.y0 - below.y1 < 0.1 for above, below in itertools.pairwise(panels))
    marks = [line for line in figures[0].axes[1].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in marks] == ([[1]] if collapsed else [])


@pytest.mark.filterwarnings("error")
def test_a_panel_without_lines_has_no_legend(tmp_path, figures):
    """As after a first epoch without unlabeled images."""
    nothing = float("nan")
    save_training_curves(
        tmp_path / "a.png",
        {"ssl/loss/total": [1.0], "ssl/share/unlabeled_per_class": [nothing], "ssl/share/labeled_per_class": [nothing]},
    )
    assert [axis.get_legend() is None for axis in figures[0].axes] == [False, True]


def test_nothing_logged_nothing_written(tmp_path):
    save_training_curves(tmp_path / "a.png", {"train_losses": [1.0], "ssl/loss/term": []})
    assert list(tmp_path.iterdir()) == []


def test_is_not_disturbed_by_the_global_style_and_leaves_it(tmp_path, figures):
    with matplotlib.rc_context({"font.size": 60.0, "lines.linewidth": 9.0}):
        save_training_curves(tmp_path / "a.png", logged(3))
        assert matplotlib.rcParams["font.size"] == 60.0
    assert figures[0].axes[-1].xaxis.get_label().get_fontsize() < 20


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "progress_ssl.png"
    file.write_bytes(b"older")

    def savefig(figure, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(curves.Figure, "savefig", savefig)
    with pytest.raises(OSError, match="disk full"):
        save_training_curves(file, logged(2))
    assert file.read_bytes() == b"older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["progress_ssl.png"]
