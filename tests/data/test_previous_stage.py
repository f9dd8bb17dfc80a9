"""The previous stage's segmentation of unlabeled cases: made once, made anew when outdated, read as channels."""

from __future__ import annotations

import os

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from previous_stage import Stage

from nnunet_ssl.data.loader import UnlabeledDataset
from nnunet_ssl.data.previous_stage import check_labeled_cases
from nnunet_ssl.data.views import UnlabeledViews
from nnunet_ssl.errors import UserError


@pytest.fixture
def stage(planned_3d, tmp_path) -> Stage:
    return Stage(planned_3d, tmp_path)


def test_segmentations_are_made_once_and_anew_when_they_are_missing_or_outdated(stage):
    log = stage.segment()
    assert "Predicting 4 unlabeled case(s)" in log[0] and str(stage.checkpoint) in log[0]
    made = stage.files()
    assert set(made) == {case.identifier for case in stage.cases}
    assert [path.name for path in stage.folder.parent.iterdir()] == ["fold_0"]  # nothing in the making is left
    assert stage.segment() == [] and stage.files() == made

    first, second, *_ = sorted(made)
    (stage.folder / "imagesUn" / f"{first}.b2nd").unlink()
    (stage.folder.parent / "fold_0_tmp_killed").mkdir()
    os.utime(stage.folder.parent / "fold_0_tmp_killed", (0, 0))  # long ago
    (stage.folder.parent / "fold_0_tmp_at_work").mkdir()
    os.utime(stage.folder / "imagesUn" / f"{second}.b2nd", ns=(1, 1))  # older than image and checkpoint
    assert "Predicting 2 unlabeled case(s)" in stage.segment()[0]
    assert {path.name for path in stage.folder.parent.iterdir()} == {"fold_0", "fold_0_tmp_at_work"}
    again = stage.files()
    assert set(again) == set(made) and {name for name in made if made[name] == again[name]} == set(made) - {
        first,
        second,
    }

    # It is what nnU-Net's predictor makes of the case: here without another resolution.
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.manual_initialization(stage.network, stage.plans, stage.manager, None, stage.dataset_json, "", (0, 1, 2))
    image = UnlabeledDataset(stage.cases).load_case(f"imagesUn/{first}")[0][:]
    expected = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)).argmax(0).numpy()
    found = blosc2.open(str(stage.folder / "imagesUn" / f"{first}.b2nd"))[:]
    assert np.array_equal(found, expected) and len(np.unique(expected)) > 1


def test_a_case_that_the_previous_stage_lacks_is_named(stage):
    with pytest.raises(UserError, match=rf"{stage.cases[0].identifier}.*nnunet-ssl preprocess -c tiny"):
        stage.segment(images=stage.cases[1:])


def test_labeled_cases_without_a_segmentation_are_named_with_what_to_do(tmp_path):
    for name in ("a.b2nd", "b.npz"):
        (tmp_path / name).touch()
    check_labeled_cases(tmp_path, ["a", "b"], to_do="")
    with pytest.raises(UserError, match=r"2 labeled case\(s\).*: c, d\. .*Train all folds\."):
        check_labeled_cases(tmp_path, ["d", "a", "c"], to_do="Train all folds.")


def test_views_have_the_segmentation_as_channels_and_strong_ones_its_errors():
    transforms = nnUNetTrainer.get_training_transforms(
        (16, 24, 24), (-0.3, 0.3), None, (0, 1, 2), False, use_mask_for_norm=[True], is_cascaded=True,
        foreground_labels=[1, 2],
    )  # fmt: skip
    views = UnlabeledViews(transforms, strong=1, normalization_schemes=["ZScoreNormalization"], intensity_properties={})
    torch.manual_seed(0)
    np.random.seed(0)
    differ = 0
    for _ in range(20):
        segmentation = torch.zeros(2, 16, 24, 24, dtype=torch.int16)
        segmentation[0, :, :4] = -1
        segmentation[1, 4:12, 6:20, 6:12] = 1
        segmentation[1, 4:12, 6:20, 12:20] = 2
        image = segmentation[1:].float() * 2 + 1  # so that the channels can be read off the weak view
        weak, (strong,), _ = views(image, segmentation)
        assert weak.shape == strong.shape == (3, 16, 24, 24)
        inside = weak[0] != 0
        exact = inside & ((weak[0] - weak[0].round()).abs() < 1e-4)
        for label in (1, 2):
            assert torch.equal(weak[label][exact] > 0, weak[0][exact].round() == 2 * label + 1)
        assert set(weak[1:].unique().tolist()) <= {0.0, 1.0}
        assert (weak[1:].sum(0) <= 1).all()
        differ += not torch.equal(weak[1:], strong[1:])
    assert 2 < differ < 20  # nnU-Net's probabilities are 0.4 and 0.2
