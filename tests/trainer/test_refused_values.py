"""Settings, streams, views, labels and masks that cannot be: each is refused, with what is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from author_methods import MeanTeacher, changed

from nnunet_ssl.api import (
    CutMix,
    MethodError,
    SemiSupervisedSettings,
    Stream,
    TrainingNetwork,
    Views,
    consistency_mse,
    dice_and_cross_entropy,
    entropy,
    masked_cross_entropy,
    masked_dice_loss,
    random_boxes,
    setting,
    voxelwise_cross_entropy,
)


def _settings_class(base=SemiSupervisedSettings, **fields):
    annotations = dict.fromkeys(fields, float)
    return dataclass(frozen=True)(type("Ours", (base,), {"__annotations__": annotations, **fields}))


@pytest.mark.parametrize(
    ("settings_class", "message"),
    [
        (_settings_class(weight=setting(1.5, "w", maximum=1.0)), "default of the setting 'weight' of Ours is 1.5"),
        (_settings_class(weight=setting(1.5, "w", maximum=1.0)), "allowed is number, at most 1"),
        (
            _settings_class(kind=setting("soft", "kind")),
            r"'kind' of Ours is 'soft'.* a text needs choices",
        ),
        (
            _settings_class(seed=setting(0.5, "s", minimum=0.0)),
            "'seed' of Ours is one of SemiSupervisedSettings",
        ),
        (
            _settings_class(memory_mode=setting("bank", "m", choices=("bank", "none"))),
            "'memory_mode' of Ours is",
        ),
        (_settings_class(as_dict=setting(1.0, "a", minimum=0.0)), "'as_dict' of Ours hides a method of SemiSuperv"),
        (
            type("Untyped", (SemiSupervisedSettings,), {"ramp_length": 0.9}),
            "Untyped has ramp_length = 0.9 without",
        ),
    ],
)
def test_settings_that_do_not_say_what_their_author_means_are_named(settings_class, message) -> None:
    with pytest.raises(MethodError, match=message):
        settings_class.from_plans({})


def test_a_method_may_change_a_default_and_a_range() -> None:
    ours = _settings_class(ramp_length=setting(0.9, "r", minimum=0.5, maximum=1.0))
    assert ours().ramp_length == 0.9


def test_settings_that_are_no_dataclass_or_have_no_allowed_values_are_named() -> None:
    class NoDataclass(SemiSupervisedSettings):
        weight: float = setting(0.1, "weight", minimum=0.0)

    @dataclass(frozen=True)
    class NoSetting(SemiSupervisedSettings):
        weight: float = 0.1

    with pytest.raises(MethodError, match=r"NoDataclass is no dataclass: write @dataclass\(frozen=True\)"):
        NoDataclass.from_plans({})
    with pytest.raises(MethodError, match="'weight' of NoSetting does not say which values are allowed"):
        NoSetting.from_plans({})


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_box_larger_than_the_patch_is_refused(fraction) -> None:
    with pytest.raises(ValueError, match="the side of a box is a share of the patch's"):
        random_boxes(2, (8, 8), fraction=fraction, device=torch.device("cpu"))


def test_a_teacher_without_its_settings_is_named(made) -> None:
    with pytest.raises(MethodError, match="derive SemiSupervisedSettings from TeacherSettings"):
        made(changed(settings_class=SemiSupervisedSettings, build_training_network=_teacher))


def _teacher(self, network):
    return TrainingNetwork(network, teacher=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Views(cutmix=CutMix()), "ask for some with strong=1"),
        (lambda: Views(strong=-1), "strong is -1; it is a number of views"),
        (lambda: Views(strong="2"), "strong is '2'; it is a number of views"),
        (lambda: Views(strong=True), "strong is True"),
        (lambda: Views(augmented="no"), "augmented is 'no'; it is True or False"),
        (lambda: Views(weak_labeled=2), "weak_labeled is 2; it is True or False"),
        (lambda: Views(strong=1, cutmix=0.5), "cutmix is 0.5; give a CutMix"),
        (lambda: Stream("u", dropout=1.0), "dropout is 1.0; it is a probability, from 0 to below 1"),
        (lambda: Stream("u", dropout=-0.1), "dropout is -0.1"),
        (lambda: Stream("u", dropout_on="features"), "dropout_on is 'features'; give a tuple"),
        (lambda: CutMix(5.0), "probability is 5.0"),
        (lambda: CutMix(volume=(0.0, 0.0)), r"volume is \(0.0, 0.0\)"),
        (lambda: CutMix(volume=(1.2, 1.5)), r"volume is \(1.2, 1.5\)"),
        (lambda: CutMix(volume=(0.4, 0.2)), r"volume is \(0.4, 0.2\)"),
        (lambda: CutMix(volume=0.3), "volume is 0.3"),
        (lambda: CutMix(aspect_ratio=2.0), "aspect_ratio is 2.0"),
        (lambda: CutMix(aspect_ratio=0), "aspect_ratio is 0"),
    ],
)
def test_streams_and_views_that_cannot_be_are_named(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


LOGITS, CLASSES = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int64)
WHERE = torch.ones(2, 1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "loss",
    [
        lambda: consistency_mse(LOGITS, LOGITS[:1]),
        lambda: consistency_mse(LOGITS, LOGITS[0]),
        lambda: consistency_mse(LOGITS, LOGITS[:, :1]),
        lambda: dice_and_cross_entropy(LOGITS, CLASSES[:, 0], WHERE),
        lambda: dice_and_cross_entropy(LOGITS, CLASSES[:1], WHERE),
        lambda: masked_dice_loss(LOGITS, CLASSES[:, 0], WHERE),
        lambda: masked_cross_entropy(LOGITS, CLASSES.expand(2, 3, 4, 4), WHERE),
        lambda: voxelwise_cross_entropy(LOGITS, WHERE),
    ],
)
def test_shapes_that_would_be_broadcast_are_named(loss) -> None:
    with pytest.raises(ValueError, match=r"(teacher|label|target) has the shape \(.*\); it must be \(2, [13], 4, 4\)"):
        loss()


@pytest.mark.parametrize("mask", [WHERE[:, 0], WHERE[:1], WHERE.float(), torch.ones(2, 2, 4, 4, dtype=torch.bool)])
@pytest.mark.parametrize(
    "loss",
    [
        lambda mask: masked_cross_entropy(LOGITS, CLASSES, mask),
        lambda mask: masked_dice_loss(LOGITS, CLASSES, mask),
        lambda mask: dice_and_cross_entropy(LOGITS, CLASSES, mask),
        lambda mask: consistency_mse(LOGITS, LOGITS, mask),
    ],
)
def test_a_mask_that_is_no_mask_of_the_voxels_is_named(mask, loss) -> None:
    with pytest.raises(
        ValueError, match=r"mask has the shape .*; it must be \(2, 1, 4, 4\)( or \(2, [23], 4, 4\))?, bool"
    ):
        loss(mask)


@pytest.mark.parametrize("decay", [-0.1, 1.5, math.nan])
def test_a_teachers_decay_is_a_share(decay, made) -> None:
    with pytest.raises(ValueError, match=r"max_decay is .*; it is a share, from 0 to 1"):
        made(MeanTeacher).training_network.update_teacher(decay)


OF_LOGITS = {
    "entropy": lambda z, y, m: entropy(z, regions=False),
    "consistency_mse": lambda z, y, m: consistency_mse(z, torch.zeros(1, 2, 4, 4)),
    "consistency_mse, teacher": lambda z, y, m: consistency_mse(torch.zeros(1, 2, 4, 4), z),
    "masked_dice_loss": masked_dice_loss,
    "voxelwise_cross_entropy": lambda z, y, m: voxelwise_cross_entropy(z, y),
    "masked_cross_entropy": masked_cross_entropy,
    "dice_and_cross_entropy": dice_and_cross_entropy,
}


@pytest.mark.parametrize("loss", OF_LOGITS.values(), ids=OF_LOGITS)
def test_logits_that_are_a_list_are_named(loss) -> None:
    logits = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
    label, everywhere = torch.zeros(1, 1, 4, 4, dtype=torch.int64), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"deep_supervision=True.*full_resolution"):
        loss(logits, label, everywhere)
